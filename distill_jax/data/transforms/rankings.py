"""Noise by which rankings are drawn."""

import jax
import jax.numpy as jnp

from distill_jax.core import ranges, rng
from distill_jax.core.api import Array, Batch, Key, Transform
from distill_jax.data.transforms._draws import require


def make_gumbel_noise(*, rankings: int = 8) -> Transform:
    """Returns a transform that adds `gumbel` float32 `[b, k, n]`, standard Gumbel noise.

    n is the number of labels of an example: a ranking sorts scores of candidates with their noise.

    Args:
      rankings: k, number of rankings of each list.

    Raises:
      ArgumentError: `rankings` is below 1; as it is applied, labels that are not `[b, n]`.
    """
    ranges.sizes(rankings=rankings)

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        labels = jnp.shape(batch.get("label", 0))
        require(len(labels) == 2, "there are no lists of labels", "label")
        shape = (rankings, labels[1])
        draw = jax.vmap(lambda k: jax.random.gumbel(k, shape, jnp.float32))
        return {**batch, "gumbel": draw(rng.example_keys(key, batch))}

    return apply
