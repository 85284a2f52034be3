"""Softmax regression representation learning (Yang et al. 2021, ICLR).

`L = label_weight CE + weight mean((r(s) - t)^2) + regression_weight mean((C(r(s)) - z_t)^2)`. The
student's last feature s, mapped by a regressor r, should equal the teacher's feature t. The
teacher's classifier C on r(s) should give the teacher's logits z_t.

Deviations: means over elements in place of sums.

Networks: student; teacher; regressor, model `regressor` with `batch_norm=True, relu=True` as
published; teacher_head, model `linear_head`, frozen, initialized from the teacher's last layer by
`init="<run>#<role>/<layer>"`, e.g. `"runs/teacher#student/Dense_0"`.
"""

import dataclasses
from typing import ClassVar

from distill_jax.core.api import TASKS, Array, Batch, Nets, Outputs, PyTree
from distill_jax.losses.features import mean_square
from distill_jax.objectives._distillation import (
    Distillation,
    Signals,
    check_not_negative,
    check_same_classes,
)
from distill_jax.objectives._features import connect, feature


@dataclasses.dataclass(frozen=True, kw_only=True)
class SRRL(Distillation):
    """Regression of the teacher's last feature and of its classifier's logits.

    Attributes:
      weight: coefficient of the distance of features; 0.1 to 10.
      regression_weight: coefficient of the distance of logits, 0 or more.
      student_stage: output of the student; empty takes its last `stage<i>`.
      teacher_stage: output of the teacher whose mean over positions is the input of its classifier;
        empty takes its last `stage<i>`.
    """

    weight: float = 1.0
    regression_weight: float = 1.0
    student_stage: str = "embedding"
    teacher_stage: str = "embedding"

    roles: ClassVar[tuple[str, ...]] = ("student", "teacher", "regressor", "teacher_head")
    tasks: ClassVar[tuple[str, ...]] = TASKS

    def __post_init__(self):
        super().__post_init__()
        check_not_negative(regression_weight=self.regression_weight)

    def loss_terms(
        self,
        nets: Nets,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        memory: PyTree,
        step: Array,
    ) -> Signals:
        regressed, target, state = self._regress(nets, student, teacher)
        logits = self._reuse(nets, regressed)
        check_same_classes(logits, teacher["logits"])
        return Signals(
            values={
                "feature": mean_square(regressed - target),
                "regression": mean_square(logits - teacher["logits"]),
            },
            coef={"regression": self.regression_weight},
            state={"regressor": state},
        )

    def _regress(self, nets: Nets, student: Outputs, teacher: Outputs, *, train: bool = True):
        own = feature(student, self.student_stage, role="student", where="student_stage")
        target = feature(teacher, self.teacher_stage, role="teacher", where="teacher_stage")
        _, regressed, targets, state = connect(nets, "regressor", [own], [target], train=train)
        return regressed[0], targets[0], state

    def _reuse(self, nets: Nets, regressed: Array) -> Array:
        """Returns the teacher classifier's logits for a map that replaces the teacher's."""
        return nets("teacher_head", regressed.mean((1, 2)), stop_gradient_params=True)[0]["logits"]


make = SRRL
