"""Errors and correlations of real-valued predictions."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from distill_jax.evaluators._logits import read_columns, read_logits
from distill_jax.evaluators.trust import ranks


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the correlation of `x` and `y` `[n]`; NaN if either is constant."""
    x, y = x - x.mean(), y - y.mean()
    size = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size > 0 else float("nan")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regression:
    """Metrics of the predictions of `role` against the targets; see `make`."""

    role: str = "student"

    tasks: ClassVar[tuple[str, ...]] = ("regression",)

    @property
    def outputs(self) -> Mapping[str, tuple[str, ...]]:
        return {self.role: ("logits",)}

    def __call__(
        self, outputs: Mapping[str, Mapping[str, np.ndarray]], batch: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        values = read_logits(outputs, self.role)
        targets, known = read_columns(batch, values)
        names, m = ("rmse", "mae", "r2", "pearson", "spearman"), values.shape[1]
        found = {name: np.full(m, np.nan) for name in names}
        for i in range(m):
            rows = known[:, i]
            x, y = values[rows, i], targets[rows, i]
            if not len(x):
                continue
            found["rmse"][i] = np.sqrt(np.square(x - y).mean())
            found["mae"][i] = np.abs(x - y).mean()
            if np.ptp(y):
                found["r2"][i] = 1 - np.square(x - y).sum() / np.square(y - y.mean()).sum()
            if np.ptp(x) and np.ptp(y):
                found["pearson"][i] = pearson(x, y)
                found["spearman"][i] = pearson(ranks(x), ranks(y))
        metrics: dict[str, Any] = {
            name: float(np.nanmean(column))
            for name, column in found.items()
            if np.isfinite(column).any()
        }
        if m > 1:
            metrics |= {f"{name}_by_target": column for name, column in found.items()}
        return metrics


def make(*, role: str = "student") -> Regression:
    """Makes the evaluator of the predictions `logits` `[n, m]` of m targets, in their units.

    Each metric is computed per target and averaged over the targets for which it is defined.
    Unknown targets are excluded.

    Metrics:
      rmse: root of the mean squared error.
      mae: mean absolute error.
      r2: share of the target's variance in this split that is explained; predicting the mean gives
        0, and worse predictions are negative. Omitted for a constant target.
      pearson, spearman: correlation of predictions and target, and of their ranks, with ties
        sharing their mean rank. Omitted if either is constant.
      <metric>_by_target: arrays `[m]` where m > 1.

    Args:
      role: the network to measure.

    Raises:
      NonFiniteError: on evaluation, if a value is NaN or infinite.
    """
    return Regression(role=role)
