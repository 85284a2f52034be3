"""Hints (FitNets: Romero et al. 2015, arXiv:1412.6550), eq. 3.

`L = label_weight CE + weight mean((r(s) - t)^2)`, with an intermediate feature s of the student, t
of the teacher, and a convolutional regressor r that is trained with the student.

Deviations: the paper uses half the sum over the elements; here it is their mean, for which the
weight 100 was published (Tian et al. 2020, arXiv:1910.10699). The larger of two maps is
average-pooled to the size of the smaller, where the paper's regressor has a kernel as large as the
difference. Training has one stage in place of two. For the two stages of the paper, run once with
`label_weight=0`, then start a second run from the student of the first.

Networks: student; teacher; regressor, model `regressor`, in the published setting with
`batch_norm=True` and, for features behind a ReLU, `relu=True`.
"""

import dataclasses
from typing import ClassVar

from distill_jax.core.api import TASKS, Array, Batch, Nets, Outputs, PyTree
from distill_jax.losses.features import mean_square
from distill_jax.objectives._distillation import Distillation, Signals
from distill_jax.objectives._features import connect, feature


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitNet(Distillation):
    """Regression of one feature of the teacher from one of the student.

    Attributes:
      weight: coefficient of the squared error; 1 to 1000, published 100.
      student_stage: output of the student.
      teacher_stage: output of the teacher.
    """

    weight: float = 100.0
    student_stage: str = "stage2"
    teacher_stage: str = "stage2"

    roles: ClassVar[tuple[str, ...]] = ("student", "teacher", "regressor")
    tasks: ClassVar[tuple[str, ...]] = TASKS

    def loss_terms(
        self,
        nets: Nets,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        memory: PyTree,
        step: Array,
    ) -> Signals:
        own = feature(student, self.student_stage, role="student", where="student_stage")
        hint = feature(teacher, self.teacher_stage, role="teacher", where="teacher_stage")
        _, regressed, targets, state = connect(nets, "regressor", [own], [hint])
        return Signals(
            values={"hint": mean_square(regressed[0] - targets[0])}, state={"regressor": state}
        )


make = FitNet
