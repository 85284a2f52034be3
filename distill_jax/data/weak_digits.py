"""Digits of scikit-learn in the stages of weak-to-strong training: pretrain, supervise, generalise.

The 1,797 images (see `digits`) are divided at random into disjoint stages: `pretrain` (500 images),
`weak` (250, which train the supervisor), `student` (550, which the supervisor labels), 100 images
with clean labels that are held out, and the rest, 397, for the test. The held-out and the test part
are those of every stage. Tasks are made from the digit: `digit` itself, `parity` and `at_least_5`
(the splits of Burns et al. 2023, arXiv:2312.09390, at the size of these data).
"""

from typing import Any

import numpy as np

from distill_jax.core import ranges
from distill_jax.core.api import Dataset, Provenance
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.data import digits, source

SIZES = {"pretrain": 500, "weak": 250, "student": 550}
CLEAN = 100
"""Held-out images."""

TASKS = {
    "digit": (lambda label: label, tuple(map(str, range(10)))),
    "parity": (lambda label: label % 2, ("even", "odd")),
    "at_least_5": (lambda label: label // 5, ("0 to 4", "5 to 9")),
}
"""Labels of a digit, and their names."""


def make(
    *,
    stage: str = "student",
    task: str = "parity",
    examples: int | None = None,
    labels: int | None = None,
    split_seed: int = 0,
) -> Dataset:
    """Returns uint8 images 8x8x1 of one stage, with `labelled` if some labels are hidden.

    `conflict` int32 is the label of `at_least_5` in the task `parity`, and of `parity` else: a
    second task, on which a supervisor can disagree.

    Args:
      stage: "pretrain", "weak" or "student": the training part.
      task: "digit", "parity" or "at_least_5".
      examples: number of images of the stage, its first ones; all of them by default.
      labels: number of images, the first ones, whose label is shown: `labelled` is 1 there and in
        the other parts, and 0 elsewhere. By default all are, and there is no `labelled`.
      split_seed: seed of the division; in a config "run" stands for the seed of the run.

    Raises:
      ArgumentError: an unknown stage or task, or more examples or labels than there are.
      DataUnavailable: scikit-learn is not installed.
    """
    for name, value, known in (("stage", stage, SIZES), ("task", task, TASKS)):
        if value not in known:
            hint = nearest(value, known)
            raise ArgumentError(f"unknown {name} {value!r}", where=name, hint=hint)
    ranges.within(f"[1, {SIZES[stage]}]", whole=True, examples=examples)
    n = SIZES[stage] if examples is None else examples
    ranges.within(f"[0, {n}]", whole=True, labels=labels)
    ranges.counts(split_seed=split_seed)
    whole = digits.make(held_out=0.0)
    rows: list[Any] = [part.read(np.arange(len(part))) for part in (whole.train, whole.test)]
    images, digit = (np.concatenate([row[key] for row in rows]) for key in ("input", "label"))
    order = np.random.Generator(np.random.Philox(key=[split_seed, 5])).permutation(len(digit))
    ends = np.cumsum([*SIZES.values(), CLEAN])
    *stages, clean, test = np.split(order, ends)
    first = dict(zip(SIZES, stages, strict=True))[stage][:n]
    label_of, classes = TASKS[task]
    other, _ = TASKS["parity" if task == "at_least_5" else "at_least_5"]

    def part(name: str, chosen: np.ndarray, shown: np.ndarray) -> source.ArraySource:
        more = {"conflict": other(digit[chosen]).astype(np.int32)}
        if labels is not None:
            more["labelled"] = shown.astype(np.float32)
        arrays = images[chosen], label_of(digit[chosen]).astype(np.int32)
        origin = whole.train.provenance
        sha = source.checksum({"input": arrays[0], "label": arrays[1], **more})
        name = f"scikit-learn digits, {task} ({name}, split {split_seed})"
        provenance = Provenance(name, origin.origin, len(chosen), sha, origin.licence)
        return source.ArraySource(*arrays, provenance, more=more)

    chosen = np.concatenate([first, clean])
    shown = np.arange(len(chosen)) < (n if labels is None else labels)
    held = np.arange(len(chosen)) >= n
    return source.make_dataset(
        part(stage, chosen, shown | held),
        part("test", test, np.ones(len(test), bool)),
        held_out=0.0,
        split_seed=split_seed,
        classes=classes,
        held=held,
    )
