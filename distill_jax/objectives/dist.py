"""DIST: distillation from a stronger teacher (Huang et al. 2022, arXiv:2205.10536).

The loss requires correlated rather than equal probabilities, between the classes of an example
(`inter`, rows of the batch) and between the examples for a class (`intra`, columns):

`L = CE(student, label) + beta T^2 (1 - mean_i r(row_i)) + gamma T^2 (1 - mean_c r(column_c))`.

Deviations: the factor T^2 is not in the paper's equations, where T is 1 on ImageNet. It keeps the
size of the gradient independent of T, as in Hinton et al. 2015. Rows and columns without variation
count as uncorrelated and give no gradient, in place of a small constant in the denominator.
"""

import dataclasses
from typing import ClassVar

from distill_jax.core.api import Array, Batch, Nets, Outputs, PyTree
from distill_jax.losses.logits import inter_class, intra_class
from distill_jax.objectives._distillation import (
    Distillation,
    Signals,
    check_not_negative,
    check_same_classes,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DIST(Distillation):
    """Terms `inter` and `intra`, with coefficients `weight beta` and `weight gamma`.

    Masked examples are excluded from the columns. A column needs many examples: use batches of 64
    and more.

    Attributes:
      beta: weight of the relation between classes, 0 or more; 1 to 2 is usual.
      gamma: weight of the relation within a class, 0 or more; usually equal to beta.
      temperature: T of both softmaxes, positive; 1 on ImageNet, 4 on CIFAR-100.
    """

    beta: float = 1.0
    gamma: float = 1.0
    temperature: float = 1.0

    couples_batch: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_not_negative(beta=self.beta, gamma=self.gamma)

    def loss_terms(
        self,
        nets: Nets,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        memory: PyTree,
        step: Array,
    ) -> Signals:
        logits = student["logits"], teacher["logits"]
        check_same_classes(*logits)
        return Signals(
            values={
                "inter": inter_class(*logits, temperature=self.temperature),
                "intra": intra_class(*logits, batch["mask"], temperature=self.temperature),
            },
            coef={"inter": self.weight * self.beta, "intra": self.weight * self.gamma},
        )


make = DIST
