"""Ranking and calibration of the probability of one class: click-through prediction."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from distill_jax.core.errors import ArgumentError
from distill_jax.evaluators._logits import read_labels, read_logits


def log_odds(logits: np.ndarray) -> np.ndarray:
    """Returns log p / (1 - p) of every class against the rest, `[n, k]` for logits `[n, k]`.

    It ranks examples as p does, even if p rounds to 1.
    """
    edge = np.full((len(logits), 1), -np.inf)
    before = np.logaddexp.accumulate(logits[:, :-1], axis=1)
    after = np.logaddexp.accumulate(logits[:, :0:-1], axis=1)[:, ::-1]
    return logits - np.logaddexp(np.hstack([edge, before]), np.hstack([after, edge]))


def _by_score(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns positives and negatives at each distinct score, the highest first."""
    _, group = np.unique(-scores, return_inverse=True)
    hits = np.bincount(group[positive], minlength=group.max() + 1)
    return hits, np.bincount(group) - hits


def area_under_roc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Returns the probability that a positive outranks a negative, ties counting one half.

    The Mann-Whitney statistic over the number of pairs (Hanley and McNeil, 1982), from integers.

    Args:
      scores: `[n]`.
      positive: bool `[n]`; both values must occur.
    """
    hits, misses = _by_score(scores, positive)
    doubled = (hits * (2 * (misses.sum() - np.cumsum(misses)) + misses)).sum()
    return float(doubled / 2 / (hits.sum() * misses.sum()))


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Returns the sum over thresholds of precision times the growth of recall.

    Args:
      scores: `[n]`; examples of equal score pass a threshold together.
      positive: bool `[n]`; must hold somewhere.
    """
    hits, misses = _by_score(scores, positive)
    true_positives = np.cumsum(hits)
    return float(
        (hits * true_positives / (true_positives + np.cumsum(misses))).sum() / true_positives[-1]
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CTR:
    """Metrics of the probability that `role` gives the class `positive`; see `make`."""

    role: str = "student"
    positive: int = 1

    @property
    def outputs(self) -> Mapping[str, tuple[str, ...]]:
        return {self.role: ("logits",)}

    def __call__(
        self, outputs: Mapping[str, Mapping[str, np.ndarray]], batch: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        logits = read_logits(outputs, self.role)
        k = logits.shape[1]
        if not self.positive < k or k < 2:
            raise ArgumentError(
                f"class {self.positive} against the rest, of {k} logits",
                where="positive",
                hint="two or more classes, counted from 0, are needed",
            )
        clicked = read_labels(batch, logits) == self.positive
        z = log_odds(logits)[:, self.positive]
        loss = np.logaddexp(0, np.where(clicked, -z, z)).mean()
        metrics = {"log_loss": float(loss)}
        if clicked.any():
            metrics["calibration_ratio"] = float(np.exp(-np.logaddexp(0, -z)).sum() / clicked.sum())
            metrics["average_precision"] = average_precision(z, clicked)
        if 0 < (rate := clicked.mean()) < 1:
            entropy = -rate * np.log(rate) - (1 - rate) * np.log1p(-rate)
            metrics["normalised_entropy"] = float(loss / entropy)
            metrics["auc"] = area_under_roc(z, clicked)
        return metrics


def make(*, role: str = "student", positive: int = 1) -> CTR:
    """Makes the evaluator of the probability p of one class of `logits` `[n, k]`.

    All other classes count as negative: p is the softmax probability of `positive`. Examples are
    ranked by log p / (1 - p), in float64.

    Metrics:
      auc: area under the ROC curve, the share of pairs of a positive and a negative that are
        ranked correctly; ties count one half. Omitted unless both occur.
      average_precision: sum over thresholds of precision times the growth of recall, without
        interpolation; ties pass together. Omitted without positives.
      log_loss: mean of -y log p - (1 - y) log(1 - p), in nats and without clipping.
      normalised_entropy: `log_loss` over that of always predicting the share of positives in this
        split (He et al., 2014); below 1 is better than that. Omitted with `auc`.
      calibration_ratio: sum of p over the number of positives (same source); 1 is right
        on average. Omitted without positives.

    Args:
      role: the network to measure.
      positive: the class whose probability is measured (a click), counted from 0.

    Raises:
      ArgumentError: `positive` is below 0; on evaluation, if it is not a class or the only one.
      NonFiniteError: on evaluation, if a logit is NaN or infinite.
    """
    if positive < 0:
        raise ArgumentError(f"positive is {positive}", where="positive", hint="a class, from 0")
    return CTR(role=role, positive=positive)
