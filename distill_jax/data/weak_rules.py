"""Digits with the votes of several weak sources, some of which abstain (weak supervision).

The stages are those of `weak_digits`; the training part is `student`, whose labels are hidden. The
sources are made from the 250 images of the stage `weak`. A rule sees four of the 16 pixels of an
image that is averaged to 4 x 4, a least-squares line fitted on 60 of these images tells the classes
apart, and it votes on the share of images that are farthest from its threshold. The last source
votes on every image, by a line on all 16 pixels: it stands for a model whose errors depend on the
input. Rules with the same four pixels are copies, which are wrong together.
"""

from typing import Any

import numpy as np

from distill_jax.core import ranges
from distill_jax.core.api import Dataset
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.data import digits, source, weak_digits

FITTED = 60
"""Images from which a rule is made."""

COVERAGE = (0.3, 0.7)
"""Least and largest share of images on which a rule votes."""


def make(
    *,
    task: str = "parity",
    rules: int = 8,
    copies: int = 1,
    labels: int | None = 0,
    split_seed: int = 0,
) -> Dataset:
    """Returns images 8x8x1 with `votes` int32 `[rules + copies + 1]`, -1 where a source abstains.

    Args:
      task: "parity" or "at_least_5".
      rules: number of different rules.
      copies: number of exact copies of the first rule.
      labels: number of images whose label is shown; None for all.
      split_seed: seed of the division and of the rules; in a config "run" stands for the seed of
        the run.

    Raises:
      ArgumentError: an unknown task, no rule, or more copies than rules.
      DataUnavailable: scikit-learn is not installed.
    """
    tasks = ("parity", "at_least_5")
    if task not in tasks:
        raise ArgumentError(f"unknown task {task!r}", where="task", hint=nearest(task, tasks))
    ranges.within("[1, 1000]", whole=True, rules=rules)
    ranges.within(f"[0, {rules}]", whole=True, copies=copies)
    random = np.random.Generator(np.random.Philox(key=[split_seed, 7]))
    made = weak_digits.make(stage="weak", task=task, split_seed=split_seed).train
    seen: Any = made.read(np.arange(len(made)))
    lines = [_line(seen, random, alone=False) for _ in range(rules)]
    lines += [lines[0]] * copies + [_line(seen, random, alone=True)]
    dataset = weak_digits.make(stage="student", task=task, labels=labels, split_seed=split_seed)

    def one(part: source.Source) -> source.Source:
        rows: Any = part.read(np.arange(len(part)))
        votes = np.stack([vote(rows["input"]) for vote in lines], axis=1).astype(np.int32)
        return _Voted(part, votes)

    return dataset._replace(**{name: one(part) for name, part in dataset.parts.items()})


class _Voted:
    """A source with `votes` beside what it has."""

    def __init__(self, parent: source.Source, votes: np.ndarray):
        self.source, self.votes = parent, votes
        self.labels, self.ids = source.example_labels(parent), source.example_ids(parent)
        of = np.frombuffer(parent.provenance.sha256.encode(), np.uint8)
        sha = source.checksum({"parent": of, "votes": votes})
        name = f"{parent.provenance.name}, {votes.shape[1]} sources"
        self.provenance = parent.provenance._replace(name=name, sha256=sha)

    def __len__(self) -> int:
        return len(self.votes)

    def read(self, indices: np.ndarray) -> dict[str, Any]:
        """Returns the examples at `indices` `[b]`, with `votes` int32 `[b, m]`."""
        return {**self.source.read(indices), "votes": self.votes[indices]}


def _line(seen: dict[str, np.ndarray], random: np.random.Generator, *, alone: bool) -> Any:
    """Returns a source: a function from images to votes."""
    pixels = np.arange(16) if alone else random.choice(16, 4, replace=False)
    fitted = random.choice(len(seen["label"]), FITTED, replace=False)
    x = digits.pooled(seen["input"])[:, pixels]
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    target = 2.0 * seen["label"] - 1
    ridge = np.eye(x.shape[1]) * 1e-2
    w = np.linalg.solve(x[fitted].T @ x[fitted] + ridge, x[fitted].T @ target[fitted])
    coverage = 1.0 if alone else random.uniform(*COVERAGE)
    least = 0.0 if alone else np.quantile(np.abs(x @ w), 1 - coverage)

    def vote(images: np.ndarray) -> np.ndarray:
        score = digits.pooled(images)[:, pixels] @ w[:-1] + w[-1]
        return np.where(np.abs(score) < least, -1, score > 0)

    return vote
