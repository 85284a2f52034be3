"""A ranker of two towers with shared weights: the score is a product of embeddings."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from distill_jax.core import ranges
from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ArgumentError
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import Dense


class TwoTower(nn.Module):
    """The network of `make`."""

    hidden: tuple[int, ...]
    width: int

    @nn.compact
    def __call__(self, x: Mapping[str, Array], train: bool = False) -> Outputs:
        del train
        if not isinstance(x, Mapping) or not {"query", "candidates"} <= set(x):
            raise ArgumentError(
                "the input has no query and candidates",
                where="input",
                hint="lists, as of digit_lists",
            )
        layers = [Dense(size, use_bias=False) for size in (*self.hidden, self.width)]

        def embed(h: Any) -> Array:
            for layer in layers[:-1]:
                h = jax.nn.relu(layer(h))
            return layers[-1](h)

        query, candidates = x["query"], x["candidates"]
        b, n = candidates.shape[:2]
        own, other = embed(query.reshape(b, -1)), embed(candidates.reshape(b, n, -1))
        logits = jnp.einsum("bw,bnw->bn", own, other) / self.width**0.5
        return {"embedding": own, "candidates": other, "logits": logits}


def make(*, hidden: tuple[int, ...] = (32,), width: int = 32) -> Model:
    """Returns a network for `{"query": [b, ...], "candidates": [b, n, ...]}`.

    Query and candidates pass through one perceptron without biases. Endpoints: `logits` `[b, n]`,
    the products of the embeddings divided by the root of their width; `embedding` `[b, d]` of the
    query and `candidates` `[b, n, d]`.

    Args:
      hidden: widths of the hidden layers.
      width: d.
    """
    ranges.sizes(hidden=hidden, width=width)
    return from_linen(TwoTower(tuple(hidden), width))
