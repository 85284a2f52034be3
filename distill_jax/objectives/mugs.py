"""Mugs, several granularities in one representation (Zhou et al. 2022, arXiv:2203.14415).

`L = (L_instance + L_clusters) / 2`. The first term is InfoNCE (section 3.1) between the student's
instance head, a projector and a predictor, and the keys of whole views from the moving average's
projector, against a queue of earlier keys as in `moco.py`. The second term is DINO's loss (section
3.3; `dino.py`). If the batch has `local_views`, each term is half the mean over pairs of different
whole views plus half the mean over pairs of a whole view and a small crop; otherwise it is the mean
over the former.

Deviations: the intermediate term, contrast of local groups (section 3.2: an image and its nearest
neighbours in a memory, mixed by a transformer block), is left out. Empty slots of the queue are not
negatives, so that the first loss is 0. The weakly augmented views of some images are treated like
all other views.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array, Batch, Key, Nets, PyTree, Role, Terms
from distill_jax.losses.clustering import between_views
from distill_jax.losses.contrastive import normalize, queue_contrast
from distill_jax.objectives import _queue
from distill_jax.objectives._distillation import check_not_negative, check_positive
from distill_jax.objectives._views import count, encode, project, views_of
from distill_jax.objectives.dino import DINO


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mugs(DINO):
    """Terms "instances" and "clusters" on `views` and `local_views` of the batch.

    Attributes:
      instance_weight: coefficient, 0 or more.
      cluster_weight: coefficient, 0 or more.
      contrast_temperature: tau of InfoNCE, positive.
      queue: number of keys in the queue, at least those of the whole views of a batch; 65536 in the
        paper.
      dim: width of the instance head.
    """

    instance_weight: float = 0.5
    cluster_weight: float = 0.5
    contrast_temperature: float = 0.2
    queue: int = 4096
    dim: int = 128

    def __post_init__(self):
        super().__post_init__()
        check_not_negative(instance_weight=self.instance_weight, cluster_weight=self.cluster_weight)
        check_positive(
            contrast_temperature=self.contrast_temperature, queue=self.queue, dim=self.dim
        )

    @property
    def roles(self) -> tuple[Role, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        head = ("instance_projector", "instance_predictor", "target_instance_projector")
        return (*DINO.roles, *head)

    def memory(self, key: Key, batch: Batch) -> PyTree:
        """The memory of `DINO`, and `queue`, see `_queue.empty`."""
        rows = batch["mask"].shape[0] * count(views_of(batch))
        queue = _queue.empty(self.queue, self.dim, rows=rows)
        return {**super().memory(key, batch), "queue": queue}

    def remembered(self, batch: Batch) -> Mapping[str, int]:
        return {"queue": count(views_of(batch))}

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        views, mask = views_of(batch), batch["mask"]
        h, student = encode(nets, "student", views)
        h, local = self.hold(h, step), self.encode_local(nets, batch, step)
        t, target = encode(nets, "target", views)
        clustered = self.cluster(nets, h, local, t, mask, memory, step)

        every, state = h if local is None else jnp.concatenate([h, local], axis=1), {}
        q, state["instance_projector"] = project(nets, "instance_projector", every)
        q, state["instance_predictor"] = project(nets, "instance_predictor", normalize(q))
        k, state["target_instance_projector"] = project(nets, "target_instance_projector", t)
        k, queue = jax.lax.stop_gradient(normalize(k)), memory["queue"]
        _queue.check_width(k, self.dim)
        usable = _queue.usable(queue)
        contrast = lambda u, w: queue_contrast(  # noqa: E731
            q[:, w], k[:, u], queue["keys"], usable, temperature=self.contrast_temperature
        )
        pairs = [
            jnp.stack([contrast(u, w) for w in range(q.shape[1])], axis=1)
            for u in range(k.shape[1])
        ]
        rows = jnp.repeat(mask, k.shape[1])
        return Terms(
            values={
                "instances": self.over_pairs(jnp.stack(pairs, axis=1)),
                "clusters": clustered.value,
            },
            coef={"instances": self.instance_weight, "clusters": self.cluster_weight},
            state={"student": student, "target": target, **clustered.state, **state},
            memory={
                **clustered.memory,
                "queue": _queue.enqueue(queue, k.reshape(-1, self.dim), rows),
            },
            embeddings={"student": h, "instances": q[:, : k.shape[1]]},
            metrics={**clustered.metrics, "filled": queue["filled"] / self.queue},
        )

    def over_pairs(self, values: Array) -> Array:
        u, w = values.shape[1:]
        whole = between_views(values[:, :, :u])
        return whole if w == u else (whole + values[:, :, u:].mean((1, 2))) / 2


make = Mugs
