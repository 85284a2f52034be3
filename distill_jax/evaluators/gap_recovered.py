"""Performance gap recovered by a student of a weak supervisor (Burns et al. 2023, section 3)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from distill_jax.evaluators._logits import read_labels, read_logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class GapRecovered:
    """The share of the gap between two networks that a third closes; see `make`."""

    role: str = "student"
    weak: str = "teacher"
    ceiling: str = "ceiling"

    @property
    def outputs(self) -> Mapping[str, tuple[str, ...]]:
        return dict.fromkeys((self.role, self.weak, self.ceiling), ("logits",))

    def __call__(
        self, outputs: Mapping[str, Mapping[str, np.ndarray]], batch: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        right = {}
        for role in self.outputs:
            logits = read_logits(outputs, role)
            right[role] = logits.argmax(1) == read_labels(batch, logits)
        accuracy = {role: float(hits.mean()) for role, hits in right.items()}
        low, high = accuracy[self.weak], accuracy[self.ceiling]
        metrics = {"weak_accuracy": low, "ceiling_accuracy": high}
        wrong = ~right[self.weak]
        if wrong.any():
            metrics["accuracy_where_weak_wrong"] = float(right[self.role][wrong].mean())
        if high > low:
            metrics["gap_recovered"] = (accuracy[self.role] - low) / (high - low)
        return metrics


def make(*, role: str = "student", weak: str = "teacher", ceiling: str = "ceiling") -> GapRecovered:
    """Makes the evaluator of a student beside its supervisor and a ceiling, on the same examples.

    Metrics:
      gap_recovered: `(accuracy - weak) / (ceiling - weak)`; 0 for the supervisor, 1 for the
        ceiling, and left out unless the ceiling is better than the supervisor. Its spread grows
        without bound as the gap closes: read the accuracies beside it.
      weak_accuracy, ceiling_accuracy: of the other two networks.
      accuracy_where_weak_wrong: of the student, on examples on which the supervisor errs.

    Args:
      role: the student.
      weak: the supervisor.
      ceiling: a network like the student, trained on the true labels.
    """
    return GapRecovered(role=role, weak=weak, ceiling=ceiling)
