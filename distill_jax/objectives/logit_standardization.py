"""Distillation of standardised logits (Sun et al. 2024, arXiv:2403.01427).

Each row of logits is standardized to mean 0 and deviation 1 before the softmax. The student learns
the relations of the teacher's logits and not their range:

`L = 0.1 CE(student, label) + 9 T^2 KL(softmax(Z(teacher) / T) || softmax(Z(student) / T))`.

`dkd` also supports standardised logits (`standardize`).

Deviations: a row without variation gives no gradient, in place of a small constant in the
denominator. The variance divides by the number of classes k, where the authors' program divides by
k - 1: its T is `T sqrt(k / (k - 1))` here, .5 % more with 100 classes.
"""

import dataclasses

from distill_jax.core.api import Array, Batch, Nets, Outputs, PyTree
from distill_jax.losses.classification import distillation_kl
from distill_jax.losses.logits import standardize
from distill_jax.objectives._distillation import Distillation, Signals, check_same_classes


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitStandardization(Distillation):
    """Term `standardized`.

    Attributes:
      weight: coefficient of the term, 9 in the paper; 3 to 15 are in use.
      label_weight: coefficient of the label term, 0.1 in the paper.
      temperature: the base temperature T, in units of a row's deviation; 2 in the paper, 2 to 3
        in use.
    """

    weight: float = 9.0
    label_weight: float = 0.1
    temperature: float = 2.0

    def loss_terms(
        self,
        nets: Nets,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        memory: PyTree,
        step: Array,
    ) -> Signals:
        check_same_classes(student["logits"], teacher["logits"])
        value = distillation_kl(
            standardize(student["logits"]),
            standardize(teacher["logits"]),
            temperature=self.temperature,
        )
        return Signals(values={"standardized": value})


make = LogitStandardization
