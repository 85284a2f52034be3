"""Distillation on learned augmentations (HARD, Nix, Burg, Sinz 2023, arXiv:2305.14890).

With a frozen teacher t, student s, augmentor g, `x~ = g(x, eps)` and a divergence d:

    student:    min  d(t(x~), s(x~))           + the terms of `Distillation` on x
    augmentor:  max  student_weight d(s(x), s(x~)) - teacher_weight d(t(x), t(x~))

so that the augmentor changes the student's prediction and preserves the teacher's.
`adversary = "disagreement"` maximizes `d(t(x~), s(x~))` in place of the first term. Each network
gets the gradient of its own term only.

Deviations: d is `T^2 KL`. The authors alternate between the two networks when their losses pass
thresholds; here both are updated in every step, and the augmentor's gain per example is capped at
`bound`. The weights of the two terms in the paper were not available. One optimizer updates both
networks: under Adam, a coefficient does not change the augmentor's rate of change, but its `scale`
does. The noise is a function of step, epoch and example, the same for every seed of a run.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from distill_jax.core import rng
from distill_jax.core.api import Array, Batch, Nets, Outputs, PyTree
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.losses.classification import distillation_kl
from distill_jax.objectives._distillation import (
    Distillation,
    Signals,
    check_not_negative,
    check_positive,
    damaged,
)

ADVERSARIES = ("student_change", "disagreement")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HARD(Distillation):
    """Terms `augmented`, for the student, and `augmentor`, for the augmentor, possibly negative.

    Attributes:
      distillation_weight: coefficient of the distillation term on unaugmented inputs.
      label_weight: coefficient of the label term on unaugmented inputs, 0 in the paper.
      student_weight: weight of the augmentor's gain, 0 or more.
      teacher_weight: weight of the augmentor's penalty on a changed teacher output, 0 or more;
        without it, the augmentor finds inputs on which the teacher is uninformative.
      bound: the largest gain from one example, in nats times T^2, positive.
      adversary: "student_change" or "disagreement".
      noise: e, dimension of the augmentor's noise.
    """

    distillation_weight: float = 1.0
    label_weight: float = 0.0
    student_weight: float = 1.0
    teacher_weight: float = 1.0
    bound: float = 20.0
    adversary: str = "student_change"
    noise: int = 6

    roles: ClassVar[tuple[str, ...]] = ("student", "teacher", "augmentor")

    def __post_init__(self):
        super().__post_init__()
        check_positive(bound=self.bound, noise=self.noise)
        check_not_negative(student_weight=self.student_weight, teacher_weight=self.teacher_weight)
        if self.adversary not in ADVERSARIES:
            raise ArgumentError(
                f"unknown adversary {self.adversary!r}",
                where="adversary",
                hint=nearest(self.adversary, ADVERSARIES),
            )

    def loss_terms(
        self,
        nets: Nets,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        memory: PyTree,
        step: Array,
    ) -> Signals:
        def d(p: Array, q: Array) -> Array:
            return distillation_kl(q, p, temperature=self.temperature)

        x = batch["input"]
        keys = rng.example_keys(jax.random.fold_in(jax.random.key(0), step), batch)
        eps = jax.vmap(lambda key: jax.random.normal(key, (self.noise,), x.dtype))(keys)
        warped = nets("augmentor", x, eps)[0]["output"]

        still = jax.lax.stop_gradient(warped)
        # Keep the running statistics of real inputs.
        learner = nets("student", still, train=True)[0]["logits"]
        target = jax.lax.stop_gradient(damaged(nets("teacher", still)[0]["logits"], batch))

        probed = nets("student", warped, stop_gradient_params=True)[0]["logits"]
        answer = damaged(nets("teacher", warped, stop_gradient_params=True)[0]["logits"], batch)
        if self.adversary == "disagreement":
            gain = d(answer, probed)
        else:
            # In the same mode as the output that it is compared with.
            before = nets("student", x, stop_gradient_params=True)[0]["logits"]
            gain = d(jax.lax.stop_gradient(before), probed)
        cost = d(teacher["logits"], answer)
        gain = jnp.minimum(gain, self.bound)
        return Signals(
            values={
                "augmented": d(target, learner),
                "augmentor": self.teacher_weight * cost - self.student_weight * gain,
            },
            coef={"augmentor": 1.0},
        )


make = HARD
