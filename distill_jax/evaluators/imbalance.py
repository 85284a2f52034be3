"""Class-balanced metrics of a classifier under class imbalance."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from distill_jax.evaluators._logits import read_labels, read_logits
from distill_jax.evaluators.classification import Classification
from distill_jax.evaluators.ctr import area_under_roc, log_odds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imbalance:
    """Metrics of the logits of `role` that weigh classes equally; see `make`."""

    role: str = "student"

    @property
    def outputs(self) -> Mapping[str, tuple[str, ...]]:
        return {self.role: ("logits",)}

    def __call__(
        self, outputs: Mapping[str, Mapping[str, np.ndarray]], batch: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        known = Classification(role=self.role)(outputs, batch)
        metrics = {name: known[name] for name in ("macro_f1", "balanced_accuracy", "recall")}
        confusion = known["confusion"]
        predicted = confusion.sum(axis=0)
        precision = metrics["precision"] = np.full(len(confusion), np.nan)
        chosen = predicted > 0
        precision[chosen] = confusion.diagonal()[chosen] / predicted[chosen]
        logits = read_logits(outputs, self.role)
        labels = read_labels(batch, logits)
        classes = np.unique(labels)
        if len(classes) > 1:
            odds = log_odds(logits)
            areas = [area_under_roc(odds[:, c], labels == c) for c in classes]
            metrics["macro_auc"] = float(np.mean(areas))
        return metrics


def make(*, role: str = "student") -> Imbalance:
    """Makes the evaluator of a classifier's `logits` `[n, k]` under class imbalance.

    Metrics; those shared with `classification` have the same values:
      macro_f1: F1 averaged over the classes that occur among labels or predictions.
      balanced_accuracy: recall averaged over the classes that occur among the labels.
      macro_auc: area under the ROC curve of every class against the rest, averaged over the
        classes that occur among the labels; left out if there is only one.
      recall: array `[k]`, NaN for a class without examples.
      precision: array `[k]`, NaN for a class that is never predicted.

    Args:
      role: the network to measure.

    Raises:
      NonFiniteError: on evaluation, if a logit is NaN or infinite.
    """
    return Imbalance(role=role)
