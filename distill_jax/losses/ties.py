"""Non-smooth functions with derivative 0 at the kink, so that exact matches get no gradient."""

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array


def absolute(x: Array) -> Array:
    """Returns `|x|` with the gradient `sign(x)`, which is 0 at 0; that of `jnp.abs` is 1 there."""
    return x * jax.lax.stop_gradient(jnp.sign(x))


def normalized(x: Array, *, epsilon: float = 0.0) -> Array:
    """Divides vectors along the last axis by their Euclidean norm.

    Vectors of length at most `epsilon` become 0 and have no gradient, since theirs is unbounded.
    """
    square = (x * x).sum(-1, keepdims=True)
    positive = square > epsilon**2
    return x * jnp.where(positive, jax.lax.rsqrt(jnp.where(positive, square, 1)), 0)
