"""Weighted soft labels (Zhou et al. 2021, arXiv:2102.00650).

The label's loss term has weight 1; the teacher's has weight `scale * w`, with
`w = 1 - exp(-CE(student) / CE(teacher))` at temperature 1, without a gradient. The
paper's distillation term is T^2 times a cross-entropy, whose gradient is that of T^2 times the KL
divergence used here.
"""

import dataclasses

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array, Evidence, ExampleWeighting, Nets
from distill_jax.core.errors import ArgumentError
from distill_jax.weighting._evidence import labels, log_probs, need_two_loss_terms

_TINY = 1e-7  # added to the teacher's cross-entropy, as in the authors' code


@dataclasses.dataclass(frozen=True, kw_only=True)
class WSL(ExampleWeighting):
    """Weights `[1, scale * w]`.

    Attributes:
      scale: weight of the teacher's term; the authors use 2.5 on ImageNet.
    """

    scale: float = 2.5

    def __post_init__(self):
        if not self.scale > 0:
            raise ArgumentError(f"scale is {self.scale}", where="scale", hint="a positive number")

    def __call__(self, nets: Nets, evidence: Evidence, step: Array) -> Array:
        del nets, step
        need_two_loss_terms(evidence, "wsl")
        label = labels(evidence)
        student = -(label * log_probs(evidence, "student")).sum(-1)
        teacher = -(label * log_probs(evidence, "teacher")).sum(-1)
        weight = jax.lax.stop_gradient(-jnp.expm1(-student / (teacher + _TINY)))
        return jnp.stack([jnp.ones_like(weight), self.scale * weight], axis=1)


make = WSL
