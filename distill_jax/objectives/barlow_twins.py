"""Barlow Twins (Zbontar, Jing, Misra, LeCun, Deny 2021, arXiv:2103.03230).

`L = sum_i (1 - C_ii)^2 + trade_off sum_{i != j} C_ij^2`, eq. 1, where C is the cross-correlation of
the projections of two views over the whole batch, on any mesh. With more views, L is the mean over
pairs.

The published trade-off of 0.0051 is for 8192 features. The second sum grows with the square of the
number of features, the first with the number. With fewer examples than features C cannot become the
identity.
"""

import dataclasses
import itertools
from typing import ClassVar

import jax.numpy as jnp

from distill_jax.core.api import TASKS, Array, Batch, Nets, Objective, PyTree, Terms
from distill_jax.losses.noncontrastive import cross_correlation, redundancy
from distill_jax.objectives._distillation import check_not_negative
from distill_jax.objectives._views import MOST_PAIRED, encode, project, share, views_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class BarlowTwins(Objective):
    """The loss term "redundancy" on `views`, a batch statistic shared by all examples.

    Attributes:
      trade_off: lambda, weight of the off-diagonal entries, 0 or more.
    """

    trade_off: float = 0.0051

    roles: ClassVar[tuple[str, ...]] = ("student", "projector")
    tasks: ClassVar[tuple[str, ...]] = TASKS
    couples_batch: ClassVar[bool] = True

    def __post_init__(self):
        check_not_negative(trade_off=self.trade_off)

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        del memory, step
        mask = batch["mask"]
        h, state = encode(nets, "student", views_of(batch, most=MOST_PAIRED))
        z, projector = project(nets, "projector", h)
        values = [
            redundancy(cross_correlation(z[:, i], z[:, j], mask), trade_off=self.trade_off)
            for i, j in itertools.combinations(range(z.shape[1]), 2)
        ]
        return Terms(
            values={"redundancy": share(jnp.stack(values).mean(), mask)},
            state={"student": state, "projector": projector},
            embeddings={"student": h, "projector": z},
        )


make = BarlowTwins
