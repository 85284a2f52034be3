"""Self-training with a moving average (the loss of FST, Du et al. 2022, arXiv:2209.06993).

`L = L_sup(student; labelled) + weight L_unsup(student; pseudo-labels of the average)`.
The teacher is a moving average (`roles.teacher.ema_of = "student"`; Tarvainen, Valpola 2017,
arXiv:1703.01780) or, in plain self-training, a frozen network. `lookahead.steps` advances it by
virtual steps.

Deviations: classification in place of segmentation, so that the share of confident pixels of an
image becomes 0 or 1 for an example (the default threshold 0.968 is the authors'); no ClassMix and
no feature distance.
"""

import dataclasses
from typing import ClassVar

import jax

from distill_jax.core.api import Array, Batch, Nets, Objective, PyTree, Terms
from distill_jax.core.errors import ArgumentError
from distill_jax.losses.classification import cross_entropy
from distill_jax.objectives._distillation import (
    ask_teacher,
    check_not_negative,
    check_same_classes,
)
from distill_jax.objectives._labels import check_smoothing, label_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfTraining(Objective):
    """Cross-entropy with labels and with confident pseudo-labels.

    If the data hide labels (`data.corrupt.labels_per_class`), pseudo-labels are used for examples
    without a label; otherwise for all examples.

    Attributes:
      weight: coefficient of the unsupervised term, 0 or more.
      threshold: minimum probability of the teacher's top class for a pseudo-label, in [0, 1].
      label_smoothing: of the supervised term, in [0, 1).
    """

    weight: float = 1.0
    threshold: float = 0.968
    label_smoothing: float = 0.0

    roles: ClassVar[tuple[str, ...]] = ("student", "teacher")
    couples_batch: ClassVar[bool] = False

    def __post_init__(self):
        check_smoothing(self.label_smoothing)
        check_not_negative(weight=self.weight)
        if not 0 <= self.threshold <= 1:
            raise ArgumentError(
                f"threshold is {self.threshold}",
                where="threshold",
                hint="a probability in [0, 1]",
            )

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        student, state = nets("student", batch["input"], train=True)
        teacher = ask_teacher(nets, batch)["logits"]
        check_same_classes(student["logits"], teacher)
        trusted = jax.nn.softmax(teacher).max(-1) >= self.threshold
        if "labelled" in batch:
            trusted &= batch["labelled"] == 0
        pseudo = cross_entropy(student["logits"], teacher.argmax(-1))
        return Terms(
            values={
                "cross_entropy": label_loss(
                    student["logits"], batch, smoothing=self.label_smoothing
                ),
                "pseudo_labels": trusted * pseudo,
            },
            coef={"pseudo_labels": self.weight},
            state={"student": state},
            logits={"student": student["logits"], "teacher": teacher},
        )


make = SelfTraining
