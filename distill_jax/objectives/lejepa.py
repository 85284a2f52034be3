"""LeJEPA (Balestriero, LeCun 2025, arXiv:2511.08544): views of an image agree, and all of them
together are an isotropic normal distribution. No moving average, no stopped gradient.

`L = (1 - lambda) mean over views v, features |z_v - c|^2 + lambda mean over views of SIGReg(z_v)`,
with c the mean of the global views of an image. SIGReg is the statistic of `losses.isotropy` on
random directions, sampled anew in each step. It is computed for each view separately, over the
examples of the whole batch on any mesh.

`spread` adds the hinge of VICReg's variance, since the gradient of SIGReg vanishes if all
embeddings are equal. The directions are a function of the step alone, not of the run's seed.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from distill_jax.core.api import TASKS, Array, Batch, Nets, Objective, PyTree, Terms
from distill_jax.core.errors import ArgumentError
from distill_jax.losses.isotropy import random_directions, sigreg
from distill_jax.losses.noncontrastive import variance_hinge
from distill_jax.objectives._distillation import check_not_negative, check_positive
from distill_jax.objectives._views import encode, project, share, views_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeJEPA(Objective):
    """Terms "invariance", "isotropy" and, with a weight, "spread".

    `local_views`, where batches have them, are pulled towards the centre of `views` and are
    included in the isotropy term.

    Attributes:
      trade_off: lambda, from 0 (a control that collapses) to 1.
      directions: number of random directions per step.
      largest: upper end of the integration range.
      knots: number of integration points.
      spread: coefficient of the hinge on deviations below 1.
    """

    trade_off: float = 0.05
    directions: int = 256
    largest: float = 3.0
    knots: int = 17
    spread: float = 0.0

    roles: ClassVar[tuple[str, ...]] = ("student", "projector")
    tasks: ClassVar[tuple[str, ...]] = TASKS
    couples_batch: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 <= self.trade_off <= 1:
            raise ArgumentError(
                f"trade_off is {self.trade_off}",
                where="trade_off",
                hint="between 0 and 1",
            )
        check_positive(largest=self.largest, directions=self.directions)
        check_not_negative(spread=self.spread)
        if self.knots < 2:
            raise ArgumentError(f"knots is {self.knots}", where="knots", hint="2 or more")

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        del memory
        mask = batch["mask"]
        h, student = encode(nets, "student", views_of(batch))
        every = [h]
        if "local_views" in batch:  # running statistics are those of the large views
            every += [encode(nets, "student", views_of(batch, key="local_views", least=1))[0]]
        z, projector = project(nets, "projector", jnp.concatenate(every, axis=1))
        z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
        centre = z[:, : h.shape[1]].mean(1, keepdims=True)
        # A function of the step alone: the same on every device, and after a resume.
        a = random_directions(
            jax.random.fold_in(jax.random.key(0), step), width=z.shape[-1], count=self.directions
        )
        test = functools.partial(sigreg, largest=self.largest, knots=self.knots)
        tests = jax.vmap(test, in_axes=(1, None, None))(z, mask, a)
        values = {
            "invariance": ((z - centre) ** 2).mean((1, 2)),
            "isotropy": share(tests.mean(), mask),
        }
        coef = {"invariance": 1 - self.trade_off, "isotropy": self.trade_off}
        if self.spread:
            hinges = jax.vmap(variance_hinge, in_axes=(1, None))(z, mask)
            values["spread"], coef["spread"] = share(hinges.mean(), mask), self.spread
        return Terms(
            values=values,
            coef=coef,
            state={"student": student, "projector": projector},
            embeddings={"student": h, "projector": z},
        )


make = LeJEPA
