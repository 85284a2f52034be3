"""Distances between predicted and true tokens, `[b, m, n_t, d], [b, m, n_t, d] -> [b]`.

Means over sets, tokens and features, in float32 or wider.
"""

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array
from distill_jax.losses import ties


def _difference(x: Array, y: Array) -> Array:
    wide = jnp.promote_types(jnp.result_type(x, y), jnp.float32)
    return x.astype(wide) - y.astype(wide)


def _mean(x: Array) -> Array:
    return x.reshape(len(x), -1).mean(1)


def squared(x: Array, y: Array) -> Array:
    """Mean square of the difference, `[b]`."""
    return _mean(_difference(x, y) ** 2)


def absolute(x: Array, y: Array) -> Array:
    """Mean absolute difference, `[b]`; without a gradient where it is 0."""
    return _mean(ties.absolute(_difference(x, y)))


def smooth_l1(x: Array, y: Array, *, beta: float = 1.0) -> Array:
    """Mean of `e^2 / 2 beta` where a difference e is below beta, else `|e| - beta / 2`, `[b]`."""
    error = ties.absolute(_difference(x, y))
    return _mean(jnp.where(error < beta, error**2 / (2 * beta), error - beta / 2))


DISTANCES = {"squared": squared, "absolute": absolute, "smooth_l1": smooth_l1}


def standardize(x: Array, *, epsilon: float = 1e-5, unbiased: bool = False) -> Array:
    """Returns `(x - mean) / sqrt(variance + epsilon)` along the last axis.

    This is layer normalization without scale and bias; a constant row gives zeros.

    Args:
      x: `[..., d]`.
      epsilon: added to the variance; the default is PyTorch's for layer normalization.
      unbiased: whether the variance is divided by d - 1 instead of d.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = x - x.mean(-1, keepdims=True)
    total = (centred**2).sum(-1, keepdims=True)
    return centred * jax.lax.rsqrt(total / max(x.shape[-1] - unbiased, 1) + epsilon)
