"""MoCo v3, momentum contrast within the batch (Chen, Xie, He 2021, arXiv:2104.02057).

`L = 2 tau (ctr(q_1, k_2) + ctr(q_2, k_1))`, algorithm 1: q are the views encoded by student,
projector and predictor, k by the moving averages of student and projector, without gradient;
`ctr(q, k) = -q_i . k_i / tau + log sum_j exp(q_i . k_j / tau)` over the keys of the whole batch.
With more views, L is the mean over ordered pairs, times 4 tau.

Deviation: keys are computed with the moving averages after the last step, not with already updated
averages. The frozen random patch projection of the paper's vision transformers belongs to the
network, not to the loss.

Usual: tau 1 for a ResNet, 0.2 for a vision transformer; decay from 0.99 to 1 along a cosine; a
normalization without gain and shift at the end of projector and predictor (`last_norm`).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from distill_jax.core.api import TASKS, Array, Batch, Nets, Objective, PyTree, Terms
from distill_jax.losses.contrastive import Form, pair_contrast
from distill_jax.objectives._distillation import check_positive
from distill_jax.objectives._views import MOST_PAIRED, encode, project, views_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoCoV3(Objective):
    """The loss term "contrastive" on `views` of the batch.

    Attributes:
      temperature: tau, positive.
      form: how similarities are stored, see `losses/contrastive.py`; the values are the same.
    """

    temperature: float = 1.0
    form: Form = "dense"

    roles: ClassVar[tuple[str, ...]] = (
        "student",
        "projector",
        "predictor",
        "target",
        "target_projector",
    )
    tasks: ClassVar[tuple[str, ...]] = TASKS
    couples_batch: ClassVar[bool] = True

    def __post_init__(self):
        check_positive(temperature=self.temperature)

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        del memory, step
        views = views_of(batch, most=MOST_PAIRED)
        h, student = encode(nets, "student", views)
        z, projector = project(nets, "projector", h)
        q, predictor = project(nets, "predictor", z)
        k, target = encode(nets, "target", views)
        k, target_projector = project(nets, "target_projector", k)
        k = jax.lax.stop_gradient(k)
        tau, v = self.temperature, q.shape[1]
        values = [
            pair_contrast(q[:, i], k[:, j], batch["mask"], temperature=tau, form=self.form)
            for i in range(v)
            for j in range(v)
            if i != j
        ]
        return Terms(
            values={"contrastive": 4 * tau * jnp.stack(values).mean(0)},
            state={
                "student": student,
                "projector": projector,
                "predictor": predictor,
                "target": target,
                "target_projector": target_projector,
            },
            embeddings={"student": h, "projector": z},
        )


make = MoCoV3
