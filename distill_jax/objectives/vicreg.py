"""VICReg, variance-invariance-covariance regularization (Bardes, Ponce, LeCun 2022,
arXiv:2105.04906).

`L = 25 s(z, z') + 25 (v(z) + v(z')) / 2 + (c(z) + c(z'))`, eq. 6, of projections of two views.
Statistics are unbiased and computed over the whole batch on any mesh. With more views s is the mean
over pairs, v the mean and c twice the mean over views.

Deviations from the text, not from the authors' program: s is the mean over features, not their sum,
and the published weights are for this mean; v is halved, which is not in the text.
"""

import dataclasses
import itertools
from typing import ClassVar

import jax.numpy as jnp

from distill_jax.core.api import TASKS, Array, Batch, Nets, Objective, PyTree, Terms
from distill_jax.losses.noncontrastive import covariance_penalty, variance_hinge
from distill_jax.objectives._distillation import check_not_negative
from distill_jax.objectives._views import MOST_PAIRED, encode, project, share, views_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class VICReg(Objective):
    """Terms "invariance", "variance" and "covariance" on `views` of the batch.

    Attributes:
      invariance: coefficient of the mean squared difference, 0 or more.
      variance: coefficient of the hinge that keeps deviations at 1, 0 or more. Without it all
        examples collapse to one point.
      covariance: coefficient of squared covariances, 0 or more. With both `variance` and
        `covariance` at 0, nothing prevents collapse.
    """

    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0

    roles: ClassVar[tuple[str, ...]] = ("student", "projector")
    tasks: ClassVar[tuple[str, ...]] = TASKS
    couples_batch: ClassVar[bool] = True

    def __post_init__(self):
        check_not_negative(
            invariance=self.invariance, variance=self.variance, covariance=self.covariance
        )

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        del memory, step
        mask = batch["mask"]
        h, state = encode(nets, "student", views_of(batch, most=MOST_PAIRED))
        z, projector = project(nets, "projector", h)
        v = z.shape[1]
        pairs = itertools.combinations(range(v), 2)
        differences = [((z[:, i] - z[:, j]) ** 2).mean(-1) for i, j in pairs]
        hinges = jnp.stack([variance_hinge(z[:, i], mask) for i in range(v)])
        penalties = jnp.stack([covariance_penalty(z[:, i], mask) for i in range(v)])
        return Terms(
            values={
                "invariance": jnp.stack(differences).mean(0),
                "variance": share(hinges.mean(), mask),
                "covariance": share(2 * penalties.mean(), mask),
            },
            coef={
                "invariance": self.invariance,
                "variance": self.variance,
                "covariance": self.covariance,
            },
            state={"student": state, "projector": projector},
            embeddings={"student": h, "projector": z},
        )


make = VICReg
