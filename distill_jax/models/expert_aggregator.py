"""A transformer over the outputs of experts (Meta-DMoE, Zhong et al. 2022, arXiv:2210.03885)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from distill_jax.core import ranges
from distill_jax.core.api import Array, Model, Outputs
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import Dense, LayerNorm, gelu


class ExpertAggregator(nn.Module):
    """The network of `make`."""

    depth: int
    heads: int
    mlp_ratio: float

    @nn.compact
    def __call__(self, x: Array, keep: Array) -> Outputs:
        b, m, d = x.shape
        for _ in range(self.depth):
            qkv = Dense(3 * d)(LayerNorm()(x)).reshape(b, m, 3, self.heads, d // self.heads)
            q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
            score = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (d // self.heads) ** -0.5
            score = jnp.where(keep[:, None, None] > 0, score.astype(jnp.float32), -1e9)
            share = jax.nn.softmax(score).astype(v.dtype)
            seen = jnp.einsum("bhqk,bkhd->bqhd", share, v).reshape(b, m, d)
            x = x + Dense(d)(seen)
            hidden = gelu(Dense(round(self.mlp_ratio * d))(LayerNorm()(x)))
            x = x + Dense(d)(hidden)
        count = jnp.maximum(keep.sum(1), 1)[:, None]
        return {"output": (x * keep[..., None]).sum(1) / count}


def make(*, depth: int = 1, heads: int = 4, mlp_ratio: float = 2.0) -> Model:
    """Returns `(features [b, m, d], keep [b, m]) -> output` `[b, d]`, for any number m of experts.

    Pre-norm attention with experts as tokens and no positions, a perceptron, and the mean over
    the experts that are kept; the others are not attended to.

    Args:
      depth: blocks, 1 in the paper.
      heads: attention heads, a divisor of d; 16 in the paper.
      mlp_ratio: hidden width of the perceptron over d.

    Raises:
      ArgumentError: a value below 1.
    """
    ranges.depths(depth=depth)
    ranges.sizes(heads=heads)
    ranges.within("(0, 1000]", mlp_ratio=mlp_ratio)
    return from_linen(ExpertAggregator(depth, heads, mlp_ratio))
