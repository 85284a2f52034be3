"""Tf-KD with a virtual teacher (Yuan et al. 2020, arXiv:1909.11723, section 5).

Distillation from a fixed distribution, which assigns probability a to the right class and spreads
the rest evenly over the others (eq. 8), softened by a high temperature (eq. 9):

`L = (1 - alpha) CE(student, label) + alpha weight KL(p^d_T || student_T)`,
`p^d(c) = a` for the right class, `(1 - a) / (k - 1)` for any other.

The distribution is softened as one computed from logits, `p^(1/T)` divided by its sum. There is no
factor T^2, as in eq. 9; `weight` can include one.

The self-training variant of the paper and born-again networks (Furlanello et al. 2018,
arXiv:1805.04770) do not need a separate method: they are `kd` with a teacher of the student's
architecture, with `roles.teacher.init` set to an earlier run of it.

Deviations: with mixed labels, a is spread over the classes in proportion to the label. The authors'
program softens the virtual teacher as if its probabilities were logits, which makes it nearly
uniform; this is not reproduced.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array, Batch, Nets, Objective, PyTree, Terms
from distill_jax.core.errors import ArgumentError
from distill_jax.losses.divergences import kl
from distill_jax.objectives._distillation import check_not_negative, check_positive
from distill_jax.objectives._labels import check_smoothing, label_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfKD(Objective):
    """Terms `virtual_teacher` and `cross_entropy`; there is no teacher network.

    Attributes:
      alpha: share of the virtual teacher, in [0, 1]; from 0.1 to 0.95, chosen by data set.
      a: probability of the right class, between 1 / k and 1; above 0.9 in the paper.
      temperature: T of the virtual teacher, positive; 20 and above in the paper.
      weight: multiplier of the virtual teacher's term, 0 or more. The divergence is a sum over the
        classes, in the authors' program a mean. Their multiplier, 1 except for some networks on
        CIFAR-100, is `weight` times k, so that their 1 is `weight=1/k`.
      soften_student: whether the student is also softened in that term, as in eq. 9. The authors
        report that it was not in their CIFAR-100 runs.
      label_smoothing: of the label term, in [0, 1).
    """

    alpha: float = 0.9
    a: float = 0.99
    temperature: float = 20.0
    weight: float = 1.0
    soften_student: bool = True
    label_smoothing: float = 0.0

    roles: ClassVar[tuple[str, ...]] = ("student",)
    couples_batch: ClassVar[bool] = False

    def __post_init__(self):
        check_smoothing(self.label_smoothing)
        check_positive(temperature=self.temperature)
        check_not_negative(weight=self.weight)
        if not 0 <= self.alpha <= 1:
            raise ArgumentError(
                f"alpha is {self.alpha}",
                where="alpha",
                hint="the virtual teacher's share in [0, 1]; labels get 1 - alpha",
            )
        if not 0 < self.a < 1:
            raise ArgumentError(f"a is {self.a}", where="a", hint="between 1 / k and 1")

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        student, state = nets("student", batch["input"], train=True)
        logits = student["logits"]
        k = logits.shape[-1]
        if self.a * k <= 1:
            raise ArgumentError(
                f"a is {self.a} with {k} classes",
                where="a",
                hint="above 1 / k, or the right class is the least likely one",
            )
        label = batch.get("label_probs")
        label = jax.nn.one_hot(batch["label"], k, dtype=logits.dtype) if label is None else label
        rest = (1 - self.a) / (k - 1)
        target = jax.nn.log_softmax(jnp.log(rest + (self.a - rest) * label) / self.temperature)
        softened = logits / self.temperature if self.soften_student else logits
        return Terms(
            values={
                "virtual_teacher": kl(target, jax.nn.log_softmax(softened)),
                "cross_entropy": label_loss(logits, batch, smoothing=self.label_smoothing),
            },
            coef={
                "virtual_teacher": self.alpha * self.weight,
                "cross_entropy": 1 - self.alpha,
            },
            state={"student": state},
            logits={"student": logits},
        )


make = TfKD
