"""Classes recognized by their attributes, also those that training never showed.

Direct attribute prediction (Lampert et al. 2009, CVPR) with equal priors: the class whose signature
is most probable under independent attributes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from distill_jax.evaluators._logits import read_columns, read_logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attributes:
    """Accuracy of classes read off attributes; see `make`."""

    role: str = "student"

    tasks: ClassVar[tuple[str, ...]] = ("multilabel",)

    @property
    def outputs(self) -> Mapping[str, tuple[str, ...]]:
        return {self.role: ("logits",)}

    def __call__(
        self, outputs: Mapping[str, Mapping[str, np.ndarray]], batch: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        logits = read_logits(outputs, self.role)
        labels, _ = read_columns(batch, logits)
        if "digit" not in batch:  # shapes alone: a run asks which metrics there are
            return dict.fromkeys(("zero_shot_accuracy", "all_classes_accuracy"), 0.0)
        digit, unseen = np.asarray(batch["digit"]), np.asarray(batch["unseen"]) > 0
        classes, first = np.unique(digit, return_index=True)
        # log p = sum_a s_a z_a - log(1 + e^z_a): the last part is the same for every class.
        scores = logits @ labels[first].T
        metrics = {"all_classes_accuracy": float((classes[scores.argmax(1)] == digit).mean())}
        if unseen.any():
            among = np.isin(classes, digit[unseen])
            top = classes[among][scores[unseen][:, among].argmax(1)]
            metrics["zero_shot_accuracy"] = float((top == digit[unseen]).mean())
            metrics["zero_shot_chance"] = 1 / int(among.sum())
            named = classes[scores[unseen].argmax(1)]
            metrics["zero_shot_all_accuracy"] = float((named == digit[unseen]).mean())
        return metrics


def make(*, role: str = "student") -> Attributes:
    """Makes the evaluator of `logits` `[n, a]` of attributes; the batch has `digit` and `unseen`.

    The signature of a class is the label of its first example.

    Metrics:
      all_classes_accuracy: of the class among all that occur, over all examples.
      zero_shot_accuracy: over examples of unseen classes, chosen among unseen classes.
      zero_shot_chance: 1 / number of unseen classes.
      zero_shot_all_accuracy: over examples of unseen classes, chosen among all classes.

    Args:
      role: the network.
    """
    return Attributes(role=role)
