"""Teacher annealing (Clark et al. 2019, BAM, arXiv:1907.04829, section 3.2)."""

import dataclasses

import jax.numpy as jnp

from distill_jax.core.api import Array, Evidence, ExampleWeighting, Nets
from distill_jax.core.errors import ArgumentError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annealed(ExampleWeighting):
    """Changes the last loss term's weight linearly; the other terms share the rest.

    Attributes:
      total_steps: length of training.
      start: weight of the last loss term at step 0, in [0, 1].
      end: its weight at the end of training.
    """

    total_steps: int
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self):
        for name in ("start", "end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ArgumentError(
                    f"{name} is {getattr(self, name)}",
                    where=name,
                    hint="from 0 to 1",
                )
        if self.total_steps < 1:
            raise ArgumentError(
                f"total_steps is {self.total_steps}",
                where="total_steps",
                hint="leave it out: it is the length of training",
            )

    def __call__(self, nets: Nets, evidence: Evidence, step: Array) -> Array:
        del nets
        s = len(evidence.loss_terms)
        if s < 2:
            raise ArgumentError(
                "annealing goes from one loss term to others, and there is one",
                where="loss_terms",
                hint="name at least two terms, the teacher's last",
            )
        progress = jnp.clip(step / self.total_steps, 0.0, 1.0)
        last = self.start + (self.end - self.start) * progress
        row = jnp.concatenate([jnp.full(s - 1, (1 - last) / (s - 1)), last[None]])
        return jnp.broadcast_to(row[None], (evidence.mask.shape[0], s))


make = Annealed
