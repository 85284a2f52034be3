"""Inter-channel correlation distillation, ICKD-C (Liu et al. 2021, arXiv:2202.03680).

`L = CE + weight |G(regressor(f_s)) - G(f_t)|_F^2 / c`, averaged over examples. `G` `[c, c]` holds
the inner products of all pairs of channels of a feature map, as vectors over positions, with rows
of unit length (section 3). A linear map of the channels, model `regressor`, gives the student the
number of channels of the teacher. The grid form for dense prediction is not implemented.

The divisor c, rather than c^2, and rows of unit length follow the authors' program; the usual
weight is for this form.
"""

import dataclasses
from typing import ClassVar

from distill_jax.core.api import TASKS, Array, Batch, Nets, Outputs, PyTree, Role
from distill_jax.losses.relations import channel_correlation
from distill_jax.objectives._distillation import Distillation, Signals
from distill_jax.objectives._features import connect, feature


@dataclasses.dataclass(frozen=True, kw_only=True)
class ICKD(Distillation):
    """Matches the correlations between channels within an example, term `channels`.

    Attributes:
      weight: usually 2.5.
      student_stage: map of the student; empty takes the last stage, as is usual.
      teacher_stage: map of the teacher; empty takes the last stage.
    """

    weight: float = 2.5
    student_stage: str = ""
    teacher_stage: str = ""

    roles: ClassVar[tuple[Role, ...]] = ("student", "teacher", "regressor")
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
        target = feature(teacher, self.teacher_stage, role="teacher", where="teacher_stage")
        _, regressed, targets, state = connect(nets, "regressor", [own], [target])
        value = channel_correlation(regressed[0], targets[0])
        return Signals(values={"channels": value}, state={"regressor": state})


make = ICKD
