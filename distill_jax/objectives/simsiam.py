"""SimSiam, simple siamese networks (Chen, He 2021, arXiv:2011.10566).

`L = -mean over ordered pairs of views of cos(q(z_i), sg z_j)`, eq. 1 to 4, `z = g(f(x))`: BYOL
without a moving average. The method collapses more easily than any other. Its batch normalization
is part of it (roles of the config); the last layer has no gain and shift.

Deviations: the learning rate of the predictor follows the schedule of the other networks; the
published one is constant.
"""

import dataclasses
from typing import ClassVar

import jax

from distill_jax.core.api import TASKS, Array, Batch, Nets, Objective, PyTree, Terms
from distill_jax.losses.noncontrastive import cross_view_cosine
from distill_jax.objectives._views import encode, project, views_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimSiam(Objective):
    """The term "regression" on `views` of the batch, from -1 (equal directions) to 1.

    Attributes:
      stop_gradient: whether the target has no gradient. If false, a control that collapses (section
        4.1).
      predictor: whether the predictor q is used. If false, a control that learns nothing (section
        4.2).
    """

    stop_gradient: bool = True
    predictor: bool = True

    tasks: ClassVar[tuple[str, ...]] = TASKS
    couples_batch: ClassVar[bool] = True

    @property
    def roles(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("student", "projector", *(("predictor",) if self.predictor else ()))

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        del memory, step
        state = {}
        h, state["student"] = encode(nets, "student", views_of(batch))
        z, state["projector"] = project(nets, "projector", h)
        p = z
        if self.predictor:
            p, state["predictor"] = project(nets, "predictor", z)
        target = jax.lax.stop_gradient(z) if self.stop_gradient else z
        return Terms(
            values={"regression": -cross_view_cosine(p, target)},
            state=state,
            embeddings={"student": h, "projector": z},
        )


make = SimSiam
