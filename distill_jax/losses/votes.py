"""Losses against the votes of several label sources, some of which abstain.

Zhao et al. 2023 (Pareto optimal learning for estimating large language model errors,
arXiv:2306.16564), section 3. With `l_j` the cross-entropy with the vote of source j, divided by the
number m of sources, an example has the loss

| aggregate | loss |
|---|---|
| `linear` | `sum_j l_j` |
| `square` | `(sum_j l_j)^2` |
| `norm` | `sqrt(sum_j l_j^2)` |
| `max` | `max_j l_j` |

over the sources that vote. Each grows with every `l_j`, so that a minimum is Pareto optimal.
"""

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array
from distill_jax.core.errors import ArgumentError, nearest

AGGREGATES = ("linear", "square", "norm", "max")


def vote_losses(logits: Array, votes: Array) -> tuple[Array, Array]:
    """Returns the cross-entropy with each vote, `[b, m]`, 0 for none, and who voted, bool `[b, m]`.

    Args:
      logits: `[b, k]`.
      votes: classes int `[b, m]`, below 0 where a source abstains.
    """
    voted = votes >= 0
    log_p = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(log_p, jnp.where(voted, votes, 0), axis=1)
    return jnp.where(voted, -own, 0), voted


def scalarized(losses: Array, *, aggregate: str) -> Array:
    """Returns the loss `[b]` of each example, see the table of the module.

    Args:
      losses: those of each source `[b, m]`, 0 or more, 0 where it abstains.
      aggregate: one of `AGGREGATES`.
    """
    if aggregate not in AGGREGATES:
        hint = nearest(aggregate, AGGREGATES)
        raise ArgumentError(f"unknown aggregate {aggregate!r}", where="aggregate", hint=hint)
    losses = losses / losses.shape[1]
    if aggregate == "max":
        return losses.max(1)
    if aggregate == "norm":
        # The derivative of a root is infinite at 0, where no source votes.
        squares = (losses**2).sum(1)
        some = squares > 0
        return jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1)), 0)
    total = losses.sum(1)
    return total if aggregate == "linear" else total**2


def majority(votes: Array, *, k: int) -> Array:
    """Returns the classes with most votes as probabilities `[b, k]`, even where they tie.

    Without any vote all classes tie.
    """
    counts = (votes[:, :, None] == jnp.arange(k)[None, None]).sum(1)
    top = (counts == counts.max(1, keepdims=True)).astype(jnp.float32)
    return top / top.sum(1, keepdims=True)
