"""A queue of keys of earlier batches, part of the memory of an objective."""

import jax.numpy as jnp

from distill_jax.core.api import Array, PyTree
from distill_jax.core.errors import ArgumentError


def empty(size: int, dim: int, *, rows: int) -> PyTree:
    """Returns `keys` `[q, d]`; `next`, the slot that is written next; `filled`, how many are used.

    Args:
      size: q.
      dim: d.
      rows: keys of a batch, which must fit.

    Raises:
      ArgumentError: they do not.
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
    """Returns which slots hold a key, bool `[q]`."""
    return jnp.arange(len(memory["keys"])) < memory["filled"]


def check_width(keys: Array, dim: int) -> None:
    """Raises `ArgumentError` where keys `[..., d]` have another width than the queue."""
    if keys.shape[-1] != dim:
        raise ArgumentError(
            f"the projector gives {keys.shape[-1]} features and the queue has {dim}",
            where="dim",
            hint=f"set it to {keys.shape[-1]}",
        )


def enqueue(memory: PyTree, keys: Array, mask: Array) -> PyTree:
    """Writes the keys of real rows over the oldest ones; padding takes no slot.

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
