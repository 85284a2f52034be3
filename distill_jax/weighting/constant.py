"""The same weights for every example at every step."""

import dataclasses
import math

import jax.numpy as jnp

from distill_jax.core.api import Array, Evidence, ExampleWeighting, Nets
from distill_jax.core.errors import ArgumentError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(ExampleWeighting):
    """Fixed weights.

    Attributes:
      ratio: weight of the second of two loss terms, in [0, 1]; the first gets the rest.
      weights: one weight per loss term, instead of `ratio`.
    """

    ratio: float = 0.5
    weights: tuple[float, ...] = ()

    def __post_init__(self):
        if not 0 <= self.ratio <= 1:
            raise ArgumentError(f"ratio is {self.ratio}", where="ratio", hint="from 0 to 1")
        if not all(0 <= w < math.inf for w in self.weights):
            raise ArgumentError(f"weights are {self.weights}", where="weights", hint="0 or more")

    def __call__(self, nets: Nets, evidence: Evidence, step: Array) -> Array:
        del nets, step
        weights = self.weights or (1 - self.ratio, self.ratio)
        if len(weights) != len(evidence.loss_terms):
            raise ArgumentError(
                f"{len(weights)} weights for {len(evidence.loss_terms)} loss terms",
                where="weights",
                hint=f"one for each of {', '.join(evidence.loss_terms)}",
            )
        row = jnp.asarray(weights, jnp.float32)[None]
        return jnp.broadcast_to(row, (evidence.mask.shape[0], len(weights)))


make = Constant
