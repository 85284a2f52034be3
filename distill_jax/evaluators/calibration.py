"""Calibration of a classifier's confidence."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from distill_jax.core.errors import ArgumentError
from distill_jax.evaluators._logits import log_softmax, read_labels, read_logits


def reliability_table(confidence: np.ndarray, correct: np.ndarray, bins: int) -> np.ndarray:
    """Returns equal-width bins `(lower, upper]` as float64 `[bins, 5]`.

    Columns: lower edge, upper edge, number of examples, mean confidence, accuracy. The last two
    are NaN for empty bins.
    """
    edges = np.arange(bins + 1) / bins
    bin_of = np.searchsorted(edges[1:-1], confidence, side="left")
    count = np.bincount(bin_of, minlength=bins).astype(np.float64)
    filled = np.where(count > 0, count, np.nan)
    sums = (np.bincount(bin_of, weights=w, minlength=bins) for w in (confidence, correct))
    return np.stack([edges[:-1], edges[1:], count, *(s / filled for s in sums)], axis=1)


def expected_calibration_error(table: np.ndarray) -> float:
    """Returns the count-weighted mean |accuracy - confidence| of a `reliability_table`."""
    filled = table[table[:, 2] > 0]
    return float(np.average(np.abs(filled[:, 4] - filled[:, 3]), weights=filled[:, 2]))


def by_confidence(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (confidence, correct) `[n]`, most confident first, ties averaged.

    Examples of equal confidence are unordered, so each gets the mean correctness of its tie.
    """
    values, group = np.unique(-confidence, return_inverse=True)
    size = np.bincount(group)
    mean = np.bincount(group, weights=correct) / size
    return np.repeat(-values, size), np.repeat(mean, size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Calibration of the logits of `role`; see `make`."""

    role: str = "student"
    bins: int = 15

    @property
    def outputs(self) -> Mapping[str, tuple[str, ...]]:
        return {self.role: ("logits",)}

    def __call__(
        self, outputs: Mapping[str, Mapping[str, np.ndarray]], batch: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        logits = read_logits(outputs, self.role)
        labels = read_labels(batch, logits)
        n = len(labels)
        confidence = np.exp(log_softmax(logits).max(axis=1))
        correct = (logits.argmax(axis=1) == labels).astype(np.float64)
        table = reliability_table(confidence, correct, self.bins)
        ordered, right = by_confidence(confidence, correct)
        mass = np.array_split(right - ordered, min(self.bins, n))
        risk = np.cumsum(1 - right) / np.arange(1, n + 1)
        return {
            "ece": expected_calibration_error(table),
            "ece_adaptive": float(sum(abs(gap.sum()) for gap in mass) / n),
            "aurc": float(risk.mean()),
            "reliability": table,
        }


def make(*, role: str = "student", bins: int = 15) -> Calibration:
    """Makes the evaluator of the calibration of `logits` `[n, k]`.

    The confidence of an example is its largest probability. No metric depends on the order of
    the examples: examples of equal confidence each get the mean correctness of their tie.

    Metrics:
      ece: expected calibration error over equal-width bins `(lower, upper]` (Guo et al., 2017,
        eq. 3).
      ece_adaptive: the same over bins of equal mass, sizes differing by at most one (Nguyen and
        O'Connor, 2015); as many bins as examples if there are fewer examples.
      aurc: area under the risk-coverage curve, the mean over m = 1..n of the error rate among
        the m most confident examples (Geifman et al., 2019, eq. 4). With ties it is the
        expectation over their orders. Lower is better; 0 for a perfect classifier.
      reliability: array `[bins, 5]`, see `reliability_table`.

    Args:
      role: the network to measure.
      bins: number of bins of both kinds.

    Raises:
      ArgumentError: `bins` is below 1.
      NonFiniteError: on evaluation, if a logit is NaN or infinite.
    """
    if bins < 1:
        raise ArgumentError(f"bins is {bins}", where="bins", hint="1 or more")
    return Calibration(role=role, bins=bins)
