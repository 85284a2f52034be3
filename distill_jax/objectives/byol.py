"""BYOL, bootstrap your own latent (Grill et al. 2020, arXiv:2006.07733).

`L = sum over ordered pairs of views of |n(q(g(f(x)))) - sg n(g'(f'(x')))|^2`, eq. 2, symmetrized.
f' and g' are moving averages of f and g. They have their own batch statistics, computed from their
own inputs in training mode, as in the authors' program.

Deviation: the moving averages start as copies of their sources, not from a separate initialization.
"""

import dataclasses
from typing import ClassVar

from distill_jax.core.api import TASKS, Array, Batch, Nets, Objective, PyTree, Terms
from distill_jax.losses.noncontrastive import cross_view_cosine
from distill_jax.objectives._views import encode, project, views_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class BYOL(Objective):
    """The term "regression" on `views` of the batch, mean over ordered pairs of views, doubled.

    Attributes:
      predictor: whether the predictor q is used. If false, a control that is known to collapse.
    """

    predictor: bool = True

    tasks: ClassVar[tuple[str, ...]] = TASKS
    couples_batch: ClassVar[bool] = True

    @property
    def roles(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        predictor = ("predictor",) if self.predictor else ()
        return ("student", "projector", *predictor, "target", "target_projector")

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        del memory, step
        views, state = views_of(batch), {}
        h, state["student"] = encode(nets, "student", views)
        z, state["projector"] = project(nets, "projector", h)
        p = z
        if self.predictor:
            p, state["predictor"] = project(nets, "predictor", z)
        t, state["target"] = encode(nets, "target", views)
        t, state["target_projector"] = project(nets, "target_projector", t)
        return Terms(
            values={"regression": 4 - 4 * cross_view_cosine(p, t)},
            state=state,
            embeddings={"student": h, "projector": z},
        )


make = BYOL
