"""Variational information distillation (Ahn et al. 2019, arXiv:1904.05835).

`L = label_weight CE + weight sum_stages mean(1/2 (log v_c + (t - mu(s))^2 / v_c))`: the negative
log-likelihood of the teacher's feature t under a Gaussian with mean mu(s) and one variance v_c of
each channel, `v = softplus(a) + 1e-5`.

Deviations: the mean over the elements in place of their sum, for which the weight 1 was published
(Tian et al. 2020, arXiv:1910.10699). If two maps differ in size, the larger is average-pooled
first. There is no term for the logits.

Networks: student; teacher; posterior, model `regressor` with `variance=5.0` and, as published,
`kernel_sizes=(1, 1, 1)`.
"""

import dataclasses
from typing import ClassVar

from distill_jax.core.api import Array, Batch, Nets, Outputs, PyTree
from distill_jax.core.errors import ArgumentError
from distill_jax.losses.features import gaussian_nll
from distill_jax.objectives._distillation import Signals
from distill_jax.objectives._features import StageDistillation, connect


@dataclasses.dataclass(frozen=True, kw_only=True)
class VID(StageDistillation):
    """A lower bound on the mutual information between the student's and the teacher's features.

    Attributes:
      weight: coefficient of the bound; 0.1 to 10, published 1.
    """

    weight: float = 1.0

    roles: ClassVar[tuple[str, ...]] = ("student", "teacher", "posterior")

    def loss_terms(
        self,
        nets: Nets,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        memory: PyTree,
        step: Array,
    ) -> Signals:
        maps = self.maps(student, teacher)
        outputs, means, targets, state = connect(nets, "posterior", *maps)
        if "variance1" not in outputs:
            raise ArgumentError(
                "the posterior has no variance",
                where="posterior.kwargs.variance",
                hint="5.0, the published initial value",
            )
        distances = [
            gaussian_nll(target, mean, outputs[f"variance{i}"])
            for i, (target, mean) in enumerate(zip(targets, means, strict=True), start=1)
        ]
        return Signals(
            values={"vid": sum(distances[1:], start=distances[0])}, state={"posterior": state}
        )


make = VID
