"""Accuracy, proper scores and the confusion matrix of one classifier."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from distill_jax.evaluators._logits import log_softmax, read_labels, read_logits


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, k: int) -> np.ndarray:
    """Returns counts int64 `[k, k]`; rows are labels, columns are predictions."""
    return np.bincount(labels * k + predictions, minlength=k * k).reshape(k, k)


def label_ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the rank `[n]` of each label, 0 for the top; ties go to the lower class index."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    before = np.arange(logits.shape[1])[None, :] < labels[:, None]
    return ((logits > own) | ((logits == own) & before)).sum(axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification:
    """Metrics of the logits of `role` against the labels; see `make`."""

    role: str = "student"

    @property
    def outputs(self) -> Mapping[str, tuple[str, ...]]:
        return {self.role: ("logits",)}

    def __call__(
        self, outputs: Mapping[str, Mapping[str, np.ndarray]], batch: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        logits = read_logits(outputs, self.role)
        labels = read_labels(batch, logits)
        n, k = logits.shape
        log_p = log_softmax(logits)
        ranks = label_ranks(logits, labels)
        confusion = confusion_matrix(labels, logits.argmax(axis=1), k)
        hits, support, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        present, scored = support > 0, support + predicted > 0
        recall = np.full(k, np.nan)
        recall[present] = hits[present] / support[present]
        metrics: dict[str, Any] = {
            "accuracy": float(np.mean(ranks == 0)),
            "balanced_accuracy": float(recall[present].mean()),
            "macro_f1": float(np.mean(2 * hits[scored] / (support + predicted)[scored])),
            "nll": float(-log_p[np.arange(n), labels].mean()),
            "brier": float(np.square(np.exp(log_p) - np.eye(k)[labels]).sum(axis=1).mean()),
            "right": ranks == 0,
            "recall": recall,
            "confusion": confusion,
        }
        if k > 5:
            metrics["top5"] = float(np.mean(ranks < 5))
        return metrics


def make(*, role: str = "student") -> Classification:
    """Makes the evaluator of a classifier's `logits` `[n, k]`.

    Metrics:
      accuracy: share of examples whose label has the largest logit; ties go to the lower class.
      top5: share of labels among the five largest logits, same ties; left out for k <= 5, where
        it is 1 by construction.
      balanced_accuracy: recall averaged over the classes that occur among the labels.
      macro_f1: F1 averaged over the classes that occur among labels or predictions.
      nll: mean negative log-likelihood of the label, in nats.
      brier: mean over examples of the sum over classes of (p - onehot)^2, so in [0, 2] (Brier,
        1950, eq. 2); twice the one-class form where k = 2.
      right: array `[n]`, whether the label of an example has the largest logit.
      recall: array `[k]`, NaN for a class without examples.
      confusion: array `[k, k]` of counts; rows are labels, columns are predictions.

    Args:
      role: the network to measure.

    Raises:
      NonFiniteError: on evaluation, if a logit is NaN or infinite.
    """
    return Classification(role=role)
