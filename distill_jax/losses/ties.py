"""Functions with a kink, with the derivative 0 there: nothing that has arrived is moved."""

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array


def absolute(x: Array) -> Array:
    """Returns `|x|` with the gradient `sign(x)`, 0 at 0; that of `jnp.abs` is 1 there."""
    return x * jax.lax.stop_gradient(jnp.sign(x))


def normalized(x: Array, *, epsilon: float = 0.0) -> Array:
    """Divides vectors along the last axis by their Euclidean norm.

    Vectors no longer than `epsilon` become 0 and have no gradient, which would grow without bound.
    """
    square = (x * x).sum(-1, keepdims=True)
    positive = square > epsilon**2
    return x * jnp.where(positive, jax.lax.rsqrt(jnp.where(positive, square, 1)), 0)
