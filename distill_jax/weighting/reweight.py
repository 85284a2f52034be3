"""Weights from the gradient of the outer loss with respect to them (L2RW and RW-KD).

All weights start at zero. The gradient of the held-out loss after one step, with respect to each
weight, measures how much that loss term of that example would help. Terms that would hurt get
weight zero. Normalized over the batch, this is Ren et al. 2018 (arXiv:1803.09050, eq. 12-14);
normalized over the loss terms of each example, it is Lu et al. 2021 (RW-KD, Findings of EMNLP,
algorithm 1).

Deviation: the outer loss of RW-KD is cross-entropy and distillation on held-out examples. Here it
is an option. Its default, which the arm "rw" of the studies uses, is cross-entropy alone.
`bilevel.outer_loss=cross_entropy,distillation` is the published outer loss.
"""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp

from distill_jax.core.api import Array, Evidence, ExampleWeighting, Nets
from distill_jax.core.errors import ArgumentError, nearest

NORMALIZE = ("batch", "loss_terms")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reweight(ExampleWeighting):
    """Clipped negative gradients as weights.

    Attributes:
      normalize: "batch": the weights of a batch sum to its number of real examples, or are all
        zero if no term helps; "loss_terms": the weights of each example sum to one.
      floor: smallest weight before normalization. None uses the papers' values: 0 over the batch,
        and 1e-8 over loss terms, which then have equal weights if none helps.
    """

    normalize: str = "batch"
    floor: float | None = None

    by_gradient: ClassVar[bool] = True

    def __post_init__(self):
        if self.normalize not in NORMALIZE:
            raise ArgumentError(
                f"unknown normalization {self.normalize!r}",
                where="normalize",
                hint=nearest(self.normalize, NORMALIZE),
            )
        if self.floor is not None and not 0 <= self.floor < math.inf:
            raise ArgumentError(f"floor is {self.floor}", where="floor", hint="0 or more")

    @property
    def couples_batch(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.normalize == "batch"

    def __call__(self, nets: Nets, evidence: Evidence, step: Array) -> Array:
        del nets, step
        return jnp.zeros((evidence.mask.shape[0], len(evidence.loss_terms)), jnp.float32)

    def from_gradient(self, gradient: Array, mask: Array) -> Array:
        """Returns weights `[b, s]` from the gradient of the outer loss in them; 0 on padding."""
        by_loss_term = self.normalize == "loss_terms"
        floor = (1e-8 if by_loss_term else 0.0) if self.floor is None else self.floor
        raw = mask[:, None] * jnp.maximum(-gradient, floor)
        if by_loss_term:
            total = raw.sum(1, keepdims=True)
        else:
            total = raw.sum(keepdims=True) / jnp.maximum(mask.sum(), 1)
        return jnp.where(total > 0, raw / jnp.where(total > 0, total, 1), 0.0)


make = Reweight
