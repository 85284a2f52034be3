"""Selection of examples by loss, of table rows to write, and of leading features."""

import functools

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array, Key


def smallest(loss: Array, mask: Array, *, rate: Array | float) -> Array:
    """Returns 1 for the `ceil(rate * n)` smallest losses of the n non-padding examples, else 0.

    Han et al. 2018 (arXiv:1804.06872), algorithm 1, lines 4 and 5. Ties go to the earlier row. The
    result `[b]` has no gradient.

    Args:
      loss: `[b]`.
      mask: `[b]`, 0 on padding, which is never kept.
      rate: share of examples to keep, in [0, 1].
    """
    loss = jax.lax.stop_gradient(jnp.where(mask > 0, loss, jnp.inf))
    rank = jnp.argsort(jnp.argsort(loss, stable=True), stable=True)
    # A share such as 0.8 is not exact in binary: without the margin, 0.8 of 20 could be 17.
    return mask * (rank < rate * mask.sum() - 1e-4)


def nested_width(key: Key, d: int, *, sigma: float) -> Array:
    """Draws k in 1..d with `p(k)` proportional to `exp(-(k / sigma)^2)`; an int32 scalar.

    Chen et al. 2022 (arXiv:2206.13140): nested dropout of the features with mu = 0.
    """
    k = jnp.arange(1, d + 1)
    return 1 + jax.random.categorical(key, -((k / sigma) ** 2))


def truncate(features: Array, k: Array | int) -> Array:
    """Sets all but the first k features to 0, `[b, d] -> [b, d]`; the others are not rescaled."""
    return jnp.where(jnp.arange(features.shape[-1])[None] < k, features, 0)


def rows_to_write(index: Array, mask: Array, n: int) -> Array:
    """Returns the row of a table `[n, ...]` that each example writes, int `[b]`; n for no write.

    Padding writes nothing. A batch that spans two epochs may contain an example twice. The last
    occurrence is written, so that the result does not depend on the order of a scatter.

    Args:
      index: ids of the examples, int `[b]`, below n.
      mask: `[b]`, 0 on padding.
      n: rows of the table; write with `mode="drop"`.
    """
    position = jnp.arange(index.shape[0])
    later = position[None] > position[:, None]
    again = later & (index[None] == index[:, None]) & (mask[None] > 0)
    return jnp.where((mask > 0) & ~again.any(1), index, n)


def written_after(rows: Array, *reads: Array) -> Array:
    """Returns `rows` unchanged, int `[b]`, as a function of `reads`.

    XLA writes into a donated table in place only where the write depends on all that was computed
    from the table's old rows. Otherwise it copies the table twice, because a read could follow.
    Barriers are no such dependence: XLA:CPU drops them before it decides about copies.

    Args:
      rows: to write, from `rows_to_write`.
      reads: `[b, ...]`, floats that depend on what was read of the table.
    """

    def zero(x: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(
            jax.lax.stop_gradient(x), jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        )
        # At most 64 of 64 bits are set, which the compiler does not know.
        return (jax.lax.population_count(bits) >> 7).reshape(len(x), -1).max(1)

    return functools.reduce(lambda sum_, x: sum_ + zero(x).astype(rows.dtype), reads, rows)
