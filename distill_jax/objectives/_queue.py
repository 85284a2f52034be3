"""A queue of keys of earlier batches, stored in the memory of an objective."""

import jax.numpy as jnp

from distill_jax.core.api import Array, PyTree
from distill_jax.core.errors import ArgumentError


def empty(size: int, dim: int, *, rows: int) -> PyTree:
    """Returns `keys` `[q, d]`; `next`, the next slot to write; `filled`, the number of used slots.

    Args:
      size: q.
      dim: d.
      rows: number of keys per batch, at most q.

    Raises:
      ArgumentError: the keys of a batch do not fit.
    """
    if size < rows:
        raise ArgumentError(
            f"a queue of {size} for batches of {rows} keys",
            where="queue",
            hint=f"at least {rows}; the keys of one batch must fit",
        )
    return {
        "keys": jnp.zeros((size, dim), jnp.float32),
        "next": jnp.int32(0),
        "filled": jnp.int32(0),
    }


def usable(memory: PyTree) -> Array:
    """Returns a mask of the slots that hold a key, bool `[q]`."""
    return jnp.arange(len(memory["keys"])) < memory["filled"]


def check_width(keys: Array, dim: int) -> None:
    """Raises `ArgumentError` if the width of keys `[..., d]` differs from that of the queue."""
    if keys.shape[-1] != dim:
        raise ArgumentError(
            f"the projector gives {keys.shape[-1]} features and the queue has {dim}",
            where="dim",
            hint=f"set it to {keys.shape[-1]}",
        )


def enqueue(memory: PyTree, keys: Array, mask: Array) -> PyTree:
    """Replaces the oldest keys by the keys of real rows; padding takes no slot.

    Args:
      memory: from `empty`.
      keys: `[b, d]`.
      mask: float `[b]`, 0 on padding.
    """
    size = len(memory["keys"])
    real = (mask > 0).astype(jnp.int32)
    slot = (memory["next"] + jnp.cumsum(real, dtype=jnp.int32) - 1) % size
    slot = jnp.where(real > 0, slot, size)
    count = real.sum(dtype=jnp.int32)
    return {
        "keys": memory["keys"].at[slot].set(keys.astype(memory["keys"].dtype), mode="drop"),
        "next": (memory["next"] + count) % size,
        "filled": jnp.minimum(memory["filled"] + count, size),
    }
