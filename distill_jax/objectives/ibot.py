"""iBOT and the losses of DINOv2: clusters of images and of masked patches.

`L = L_clusters + patch_weight L_patches + spread_weight L_spread`. The first term is DINO's
(`dino.py`), with some patches masked in the student's whole views. The second term (Zhou et al.
2022, iBOT, arXiv:2111.07832, eq. 2 and 3) is the cross-entropy between two assignments of the
masked patches: the moving average's, computed on the unmasked view, and the student's, computed on
the masked view. It is the mean over the masked patches of a view, then over views; a view without
masked patches counts as 0. The third term is KoLeo (`losses/noncontrastive.py:koleo`) on the
student's embeddings of whole views before the heads, computed for each view and summed over views
(Oquab et al. 2023, DINOv2, arXiv:2304.07193, section 4). It is published with 0.1,
`centring="sinkhorn"` and `shared_head=False`.

The student is called with a mask, as in `models/vit.py` with `mask_token`. The transform
`patch_masks` samples it.

Deviations: the number of prototypes is the same for patches and images. In a shared head, batch
statistics would be those of images only; the published heads have none. The centre of patches is
computed over masked patches, as in DINOv2; in iBOT over all patches of the whole views.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from distill_jax.core import tokens
from distill_jax.core.api import Array, Batch, Key, Nets, PyTree, Role, Terms
from distill_jax.core.errors import ArgumentError
from distill_jax.losses.clustering import masked_entropy
from distill_jax.losses.noncontrastive import koleo
from distill_jax.objectives._distillation import check_not_negative, check_positive
from distill_jax.objectives._views import project, views_of
from distill_jax.objectives.dino import DINO

HEAD = ("projector", "prototypes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class IBOT(DINO):
    """Terms "clusters", "patches" and, with a weight, "spread".

    Metrics: those of `DINO`, and those of patches with the prefix "patch_".

    Attributes:
      patch_weight: coefficient of the patch term, 0 or more; 1 in both papers.
      shared_head: whether the heads of images also assign patches. If false, the roles
        `patch_projector` and `patch_prototypes` do, with their moving averages.
      spread_weight: coefficient of KoLeo, 0 or more.
      spread_groups: number of parts of the batch within which nearest neighbours are searched;
        divides the batch.
    """

    patch_weight: float = 1.0
    shared_head: bool = True
    spread_weight: float = 0.0
    spread_groups: int = 1

    def __post_init__(self):
        super().__post_init__()
        check_not_negative(patch_weight=self.patch_weight, spread_weight=self.spread_weight)
        check_positive(spread_groups=self.spread_groups)

    @property
    def head(self) -> str:
        """Prefix of the roles that assign patches."""
        return "" if self.shared_head else "patch_"

    @property
    def roles(self) -> tuple[Role, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        own = () if self.shared_head else tuple(f"patch_{role}" for role in HEAD)
        return (*DINO.roles, *own, *(f"target_{role}" for role in own))

    def memory(self, key: Key, batch: Batch) -> PyTree:
        """`centre` and `patch_centre`, `[k]`, zeros."""
        memory = super().memory(key, batch)
        return {**memory, **{f"patch_{name}": jnp.copy(value) for name, value in memory.items()}}

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        views = views_of(batch)
        if "patch_mask" not in batch:
            raise ArgumentError(
                "the method masks patches of views, and batches have no 'patch_mask'",
                where="batch",
                hint="add 'patch_masks' behind 'views'",
            )
        b, v = views.shape[:2]
        flat = views.reshape(b * v, *views.shape[2:])
        hidden, chosen = batch["patch_mask"].astype(bool), batch["masked"]
        t = hidden.shape[2]
        seen, student = nets("student", flat, None, hidden.reshape(b * v, t), train=True)
        seen = {name: self.hold(x, step) for name, x in seen.items()}
        whole, target = nets("target", flat, train=True)
        for outputs in (seen, whole):
            if "tokens" not in outputs or outputs["tokens"].shape[1] < t:
                raise ArgumentError(
                    f"the network gives no {t} patches",
                    where="student.model",
                    hint="vit with mask_token, and the patch_size of the masks",
                )
        h, a = (x["embedding"].reshape(b, v, -1) for x in (seen, whole))
        local = self.encode_local(nets, batch, step)
        clustered = self.cluster(nets, h, local, a, batch["mask"], memory, step)
        patches, seen_whole = (
            tokens.take(x["tokens"][:, -t:].reshape(b, v * t, -1), self._places(chosen, t))
            for x in (seen, whole)
        )
        weights = jnp.take_along_axis(hidden, chosen, axis=2).astype(h.dtype)
        value, state, moved, metrics = self._patches(
            nets, patches, seen_whole, weights, batch["mask"], clustered.memory, step
        )
        values = {"clusters": clustered.value, "patches": value}
        coef: dict[str, Any] = {"patches": self.patch_weight}
        if self.spread_weight:
            values["spread"] = self._spread(h, batch["mask"])
            coef["spread"] = self.spread_weight
        return Terms(
            values=values,
            coef=coef,
            state={"student": student, "target": target, **state, **clustered.state},
            memory=moved,
            embeddings={"student": h},
            metrics={
                **clustered.metrics,
                **{f"patch_{name}": fact for name, fact in metrics.items()},
            },
        )

    @staticmethod
    def _places(chosen: Array, t: int) -> Array:
        """Converts patch indices in [0, t) of each view, `[b, v, m]`, to indices in all,
        `[b, v m]`."""
        b, v, m = chosen.shape
        return (chosen + t * jnp.arange(v)[None, :, None]).reshape(b, v * m)

    def _patches(self, nets, student, target, weights, mask, memory, step):
        """Compares the assignments of patches `[b, v m, d]`, with weights `[b, v, m]`."""
        b, v, m = weights.shape
        state = {}
        projector, prototypes = (f"{self.head}{role}" for role in HEAD)
        z, state[projector] = project(nets, projector, student)
        s, state[prototypes] = self.compare(nets, prototypes, z, step)
        a, state[f"target_{projector}"] = project(nets, f"target_{projector}", target)
        a, state[f"target_{prototypes}"] = project(nets, f"target_{prototypes}", a)
        real = (weights * mask[:, None, None]).reshape(b, v * m)
        targets, memory, metrics = self.assign(a, real, memory, step, centre="patch_centre")
        targets, s = (x.reshape(b, v, m, -1) for x in (targets, s))
        value = masked_entropy(targets, s, weights, temperature=self.student_temperature)
        return value.mean(1), state, memory, metrics

    def _spread(self, h: Array, mask: Array) -> Array:
        b, v = h.shape[:2]
        if b % self.spread_groups:
            raise ArgumentError(
                f"a batch of {b} does not divide into {self.spread_groups} groups",
                where="spread_groups",
                hint="a divisor of batch_size",
            )
        each = [koleo(h[:, i], mask, groups=self.spread_groups) for i in range(v)]
        return jnp.stack(each).sum(0)


make = IBOT
