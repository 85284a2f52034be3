"""Learned prototypes, and the cosine of a vector with each of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ArgumentError
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import dense_uniform


def _directions(x: Array, axis: int) -> Array:
    """Vectors of length one along an axis, float32 or wider; zero stays, without a gradient."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = (x * x).sum(axis, keepdims=True)
    positive = square > 1e-24
    return x * jnp.where(positive, jax.lax.rsqrt(jnp.where(positive, square, 1)), 0)


class Prototypes(nn.Module):
    """The network of `make`."""

    count: int

    @nn.compact
    def __call__(self, x: Array) -> Outputs:
        kernel = self.param("kernel", dense_uniform, (x.shape[-1], self.count))
        rows = _directions(x.reshape(-1, x.shape[-1]), -1)
        cosines = jnp.matmul(rows, _directions(kernel, 0), precision="highest")
        return {"output": cosines.reshape(*x.shape[:-1], self.count)}


def make(*, count: int) -> Model:
    """Returns a map of `[..., d]` to `output` `[..., count]`, cosines with learned prototypes.

    The last layer of Caron et al. (2021, DINO, arXiv:2104.14294, appendix C): vectors are
    normalized, and so are the columns of the kernel wherever it is used, so that no step can
    change their length. Computed in float32 or wider.

    Args:
      count: k, number of prototypes.

    Raises:
      ArgumentError: fewer than two.
    """
    if count < 2:
        raise ArgumentError(f"must be at least 2, not {count}", where="count")
    return from_linen(Prototypes(count))
