"""MoCo v2, momentum contrast with a queue (He et al. 2020, arXiv:1911.05722; Chen et al. 2020,
arXiv:2003.04297).

`L = -log(exp(q . k / tau) / (exp(q . k / tau) + sum over the queue of exp(q . k_j / tau)))`, eq. 1:
q is the projection of the first view by student and projector, k that of the second by their moving
averages, without gradient. Afterwards the keys of the batch replace the oldest keys in the queue.

Deviations: empty slots of the queue are not negatives, where the authors start from random vectors;
the loss of the first batch is therefore 0. Batch statistics are those of the whole batch, on any
mesh, so examples need not be shuffled between devices. Keys are computed with the moving averages
after the last step, not with already updated averages.

Usual: queue 65536 on ImageNet, tau 0.2, decay 0.999 over some 10^5 steps. A moving average has a
memory of 1 / (1 - decay) steps: in shorter runs use a smaller decay.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax

from distill_jax.core.api import TASKS, Array, Batch, Key, Nets, Objective, PyTree, Terms
from distill_jax.losses.contrastive import normalize, queue_contrast
from distill_jax.objectives import _queue
from distill_jax.objectives._distillation import check_positive
from distill_jax.objectives._views import encode, project, take, views_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoCo(Objective):
    """The term "contrastive" on the first two `views` of the batch; metric `filled` of the queue.

    Attributes:
      temperature: tau, positive.
      queue: number of keys in the queue, at least the batch size.
      dim: width of the projector.
    """

    temperature: float = 0.2
    queue: int = 4096
    dim: int = 128

    roles: ClassVar[tuple[str, ...]] = ("student", "projector", "target", "target_projector")
    tasks: ClassVar[tuple[str, ...]] = TASKS
    couples_batch: ClassVar[bool] = True

    def __post_init__(self):
        check_positive(temperature=self.temperature, queue=self.queue, dim=self.dim)

    def memory(self, key: Key, batch: Batch) -> PyTree:
        """The empty queue, see `_queue.empty`."""
        del key
        return _queue.empty(self.queue, self.dim, rows=batch["mask"].shape[0])

    def remembered(self, batch: Batch) -> Mapping[str, int]:
        del batch
        return {"queue": 1}

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        del step
        views = views_of(batch)
        h, student = encode(nets, "student", take(views, 0, 1))
        q, projector = project(nets, "projector", h)
        k, target = encode(nets, "target", take(views, 1, 2))
        k, target_projector = project(nets, "target_projector", k)
        q, k = q[:, 0], jax.lax.stop_gradient(normalize(k[:, 0]))
        _queue.check_width(k, self.dim)
        usable = _queue.usable(memory)
        value = queue_contrast(q, k, memory["keys"], usable, temperature=self.temperature)
        return Terms(
            values={"contrastive": value},
            state={
                "student": student,
                "projector": projector,
                "target": target,
                "target_projector": target_projector,
            },
            memory=_queue.enqueue(memory, k, batch["mask"]),
            embeddings={"student": h[:, 0], "projector": q},
            metrics={"filled": memory["filled"] / self.queue},
        )


make = MoCo
