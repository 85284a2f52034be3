"""Ranking, decision and proper-score metrics of multilabel classifiers."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from distill_jax.evaluators._logits import read_columns, read_logits
from distill_jax.evaluators.ctr import area_under_roc, average_precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multilabel:
    """Metrics of the logits of `role` against several labels; see `make`."""

    role: str = "student"

    tasks: ClassVar[tuple[str, ...]] = ("multilabel",)

    @property
    def outputs(self) -> Mapping[str, tuple[str, ...]]:
        return {self.role: ("logits",)}

    def __call__(
        self, outputs: Mapping[str, Mapping[str, np.ndarray]], batch: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        logits = read_logits(outputs, self.role)
        labels, known = read_columns(batch, logits)
        present, k = labels > 0.5, logits.shape[1]
        precision, auc, f1 = (np.full(k, np.nan) for _ in range(3))
        loss = np.logaddexp(0, np.where(present, -logits, logits))
        square = np.square(1 / (1 + np.exp(-np.clip(logits, -700, 700))) - labels)
        predicted = logits > 0
        for i in range(k):
            rows = known[:, i]
            z, y, yes = logits[rows, i], present[rows, i], predicted[rows, i]
            if y.any():
                precision[i] = average_precision(z, y)
                if not y.all():
                    auc[i] = area_under_roc(z, y)
            if y.any() or yes.any():
                f1[i] = 2 * (y & yes).sum() / (y.sum() + yes.sum())
        metrics: dict[str, Any] = {
            "nll": float(loss[known].mean()),
            "brier": float(square[known].mean()),
            "binary_accuracy": float((predicted == present)[known].mean()),
        }
        whole = known.all(axis=1)
        if whole.any():
            metrics["subset_accuracy"] = float((predicted == present)[whole].all(axis=1).mean())
        support = (present & known).sum() + (predicted & known).sum()
        if support:
            metrics["micro_f1"] = float(2 * (present & predicted & known).sum() / support)
        for name, values in (
            ("mean_average_precision", precision),
            ("macro_auc", auc),
            ("macro_f1", f1),
        ):
            if np.isfinite(values).any():
                metrics[name] = float(np.nanmean(values))
        return metrics | {
            "average_precision_by_label": precision,
            "auc_by_label": auc,
            "f1_by_label": f1,
        }


def make(*, role: str = "student") -> Multilabel:
    """Makes the evaluator of `logits` `[n, k]` of k labels; a high logit predicts presence.

    Unknown labels are excluded from all metrics. Means over labels skip those for which the metric
    is undefined.

    Metrics:
      mean_average_precision: mean over labels of the average precision (see `ctr`), of labels
        that occur.
      macro_auc: mean over labels of the area under the ROC curve, of labels that are both present
        and absent somewhere.
      macro_f1: mean over labels of F1 of the probability 0.5, of labels that occur or are
        predicted; micro_f1: F1 of all decisions together.
      binary_accuracy: share of correct decisions.
      subset_accuracy: share of examples whose labels are all known and correctly predicted.
      nll: mean binary cross-entropy of a label, in nats.
      brier: mean squared difference of probability and label.
      average_precision_by_label, auc_by_label, f1_by_label: arrays `[k]`, NaN where undefined.

    Args:
      role: the network to measure.

    Raises:
      NonFiniteError: on evaluation, if a logit is NaN or infinite.
    """
    return Multilabel(role=role)
