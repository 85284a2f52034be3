"""Accuracy of a linear classifier of frozen embeddings."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.core.errors import ArgumentError
from distill_jax.evaluators._features import (
    CONTROLS,
    Linear,
    OfEmbedding,
    Part,
    Scaler,
    Split,
    accuracies,
    check_positive,
    class_weights,
    fit_logistic,
    parts_of,
    read_split,
)

WHERE = "probe"
GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


def choose(
    train: Split, held_out: Split | None, k: int, grid: Sequence[float], *, balanced: bool
) -> tuple[Linear, Scaler, float]:
    """Fits a classifier for each penalty strength and returns the best on held-out data.

    The scaler is fitted to the training part alone. Penalties are tried from the strongest on; ties
    go to the stronger one. The search stops at the first strength that is worse than the one
    before, since weaker penalties take longest. With one strength the held-out part is not read.

    Args:
      train: split to fit.
      held_out: split to select the strength on.
      k: number of classes.
      grid: inverse strengths, see `_features.fit_logistic`.
      balanced: whether classes have equal weight, in the fit and in the selection.
    """
    scaler = Scaler.fit(train.z)
    z = scaler(train.z)
    weights = class_weights(train.label) if balanced else None
    linear: Linear | None = None
    best: tuple[float, Linear, float] | None = None
    before = 0.0
    for c in sorted(grid):
        linear = fit_logistic(z, train.label, k, c=c, weights=weights, start=linear)
        score = 0.0
        if len(grid) > 1 and held_out is not None:
            said = linear.predict(scaler(held_out.z))
            score = accuracies(held_out.label, said)[balanced]
        if best is None or score > best[0]:
            best = score, linear, c
        if score < before:
            break
        before = score
    assert best is not None
    return best[1], scaler, best[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe(OfEmbedding):
    """A linear classifier of frozen embeddings; see `make`."""

    c: tuple[float, ...]
    balanced: bool
    max_examples: int | None

    @property
    def parts(self) -> Mapping[str, int | None]:
        chosen = {"held_out": self.max_examples} if len(self.c) > 1 else {}
        return {"train": self.max_examples, **chosen}

    def __call__(
        self,
        outputs: Mapping[str, Mapping[str, np.ndarray]],
        batch: Mapping[str, np.ndarray],
        *,
        parts: Mapping[str, Part] | None = None,
        split: str = "test",
    ) -> dict[str, Any]:
        given = parts_of(parts, *self.parts, where=WHERE)
        read = [read_split(p, self.role, self.output, most=self.max_examples) for p in given]
        train, held_out = read[0], read[1] if len(read) > 1 else None
        query = read_split((outputs, batch), self.role, self.output)
        k = int(max(part.label.max() for part in (*read, query))) + 1
        linear, scaler, c = choose(train, held_out, k, self.c, balanced=self.balanced)
        plain, balanced = accuracies(query.label, linear.predict(scaler(query.z)))
        return {"probe_accuracy": plain, "probe_balanced_accuracy": balanced, "probe_c": c}


def make(
    *,
    role: str = "student",
    output: str = "embedding",
    c: float | tuple[float, ...] = GRID,
    balanced: bool = False,
    max_examples: int | None = 20_000,
    controls: bool = True,
) -> Probe:
    """Makes the evaluator of a linear probe, solved exactly.

    Multinomial logistic regression with an L2 penalty on embeddings that are standardised by the
    training part, fitted to the training part with its labels, and measured on the split. Several
    strengths are tried from the strongest until one is worse than the one before, and the one with
    the highest held-out accuracy is used. Metrics of the held-out split itself are therefore
    slightly optimistic; those of the test split are not.

    Metrics, and those of the controls with the suffixes `_raw` and `_initial`:
      probe_accuracy, probe_balanced_accuracy: of the split; the latter is the mean over the
        classes that occur.
      probe_c: the selected inverse strength.

    Args:
      role: the encoder.
      output: name of the encoder's output; further axes are flattened.
      c: inverse penalty strength, `|W|^2 / 2 + c * sum of losses`, or several.
      balanced: whether classes have equal weight in the fit and in the selection of `c`.
      max_examples: most training (and held-out) examples, spread evenly; none for all.
      controls: whether to evaluate the test split also on the raw input and on the encoder at
        initialisation.

    Raises:
      ArgumentError: a number is not positive; the held-out part is empty and `c` is several.
      NonFiniteError: on evaluation, if an embedding is NaN or infinite.
    """
    cs = (float(c),) if isinstance(c, (int, float)) else tuple(map(float, c))
    if not cs or not all(x > 0 for x in cs):
        raise ArgumentError(f"c is {c}", where=f"{WHERE}.c", hint="positive, or several of them")
    check_positive(WHERE, max_examples=max_examples)
    return Probe(
        role=role,
        output=output,
        c=cs,
        balanced=balanced,
        max_examples=max_examples,
        controls=CONTROLS if controls else (),
    )
