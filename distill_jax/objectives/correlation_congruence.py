"""Correlation congruence (Peng et al. 2019, arXiv:1904.01802).

`L = CE + weight / n^2 sum_ij (K_t(i, j) - K_s(i, j))^2`, with the Gaussian kernel of unit
embeddings for all pairs of a batch, as its Taylor series in their product (section 3).

`form="successive"` is the simplified form that distillation benchmarks often use under this name:
the product of the absolute differences between student and teacher for each two neighbours in the
batch. It compares embeddings coordinate by coordinate and therefore needs a `projector` for the
student and a `projector_of_teacher`, both trained. The two projectors could converge to a constant.

Deviations: the kernels do not need a common width, so no embedding layer is trained for them. The
paper adds the loss of Hinton et al. 2015, here `distillation_weight`, which is 0 by default.
"""

import dataclasses
from typing import ClassVar

from distill_jax.core import ranges
from distill_jax.core.api import TASKS, Array, Batch, Nets, Outputs, PyTree, Role
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.losses.relations import congruence_share, successive_share
from distill_jax.objectives._distillation import Distillation, Signals, check_positive
from distill_jax.objectives._embeddings import flat_pair, project_pair

FORMS = ("kernel", "successive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorrelationCongruence(Distillation):
    """Matches kernels between the examples of a batch, term `congruence`.

    Attributes:
      weight: 100 suits the kernels, whose squared differences are small; usually 0.02 for
        "successive".
      form: one of `FORMS`.
      gamma: width parameter of the kernel `exp(-gamma |x - y|^2)`, positive; 0.4 in the paper.
      order: order of the Taylor series, 1 or more; 2 in the paper.
      feature: output of both networks that is compared.
    """

    weight: float = 100.0
    form: str = "kernel"
    gamma: float = 0.4
    order: int = 2
    feature: str = "embedding"

    couples_batch: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = TASKS

    def __post_init__(self):
        super().__post_init__()
        check_positive(gamma=self.gamma)
        ranges.depths(order=self.order)
        if self.form not in FORMS:
            raise ArgumentError(
                f"unknown form {self.form!r}",
                where="form",
                hint=nearest(self.form, FORMS),
            )

    @property
    def roles(self) -> tuple[Role, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        projectors = ("projector", "projector_of_teacher") if self.form == "successive" else ()
        return ("student", "teacher", *projectors)

    def loss_terms(
        self,
        nets: Nets,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        memory: PyTree,
        step: Array,
    ) -> Signals:
        pair, mask = flat_pair(student, teacher, self.feature), batch["mask"]
        if self.form == "kernel":
            value = congruence_share(*pair, mask, gamma=self.gamma, order=self.order)
            return Signals(values={"congruence": value})
        pair, state = project_pair(nets, *pair)
        return Signals(values={"congruence": successive_share(*pair, mask)}, state=state)


make = CorrelationCongruence
