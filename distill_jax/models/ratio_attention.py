"""A ratio network with self-attention between the blocks of trilateral features.

Hu et al. 2024 (arXiv:2312.15112), table 5, compare perceptrons with attention of one to three heads
and give no further details. The details here are ours: one token for each block, by a linear map of
its own; one residual attention layer on normalized tokens; the mean over tokens; a linear map to
the logits.
"""

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ArgumentError
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import LayerNorm
from distill_jax.models.ratio_mlp import check_head, head
from distill_jax.models.vit import Attention

_by_block = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=0)


class RatioAttention(nn.Module):
    """The network of `make`."""

    outputs: int
    heads: int
    width: int
    ratio: float
    zero_init: bool

    @nn.compact
    def __call__(self, x: Array) -> Outputs:
        if x.ndim != 3:
            raise ArgumentError(
                f"attention is between blocks [b, blocks, f], and the weighting gives {x.shape}",
                where="input",
                hint="ratio_mlp takes any shape",
            )
        _, t, f = x.shape
        kernel = self.param("kernel", _by_block, (t, f, self.width))
        # The bias of a block's map also identifies the block.
        names = self.param("names", nn.initializers.normal(0.02), (1, t, self.width))
        x, kernel, names = promote_dtype(x, kernel, names)
        x = jnp.einsum("btf,tfd->btd", x, kernel) + names
        x += Attention(self.heads)(LayerNorm()(x))
        logits = head(x.mean(1), outputs=self.outputs, ratio=self.ratio, zero_init=self.zero_init)
        return {"logits": logits}


def make(
    *,
    outputs: int = 1,
    heads: int = 2,
    width: int = 64,
    ratio: float = 0.5,
    zero_init: bool = True,
) -> Model:
    """Returns self-attention between blocks, `[b, blocks, f] -> logits [b, outputs]`.

    Args:
      outputs: number of loss terms, or one fewer, depending on the weighting.
      heads: number of attention heads.
      width: size of a token, a multiple of `heads`.
      ratio: the sigmoid of every output at the start, in (0, 1).
      zero_init: whether the last kernel starts at zero, which makes that exact. A network that is
        never trained needs a random one.

    Raises:
      ArgumentError: a ratio outside (0, 1), no outputs, or heads that do not divide the width; on
        first use, an input that has no blocks.
    """
    check_head(outputs, ratio)
    if heads < 1:
        raise ArgumentError(f"heads is {heads}", where="heads", hint="at least 1")
    if width < 1 or width % heads:
        raise ArgumentError(
            f"{heads} heads do not divide a width of {width}",
            where="width",
            hint=f"a multiple of {heads}, such as {heads * max(1, round(width / heads))}",
        )
    return from_linen(RatioAttention(outputs, heads, width, ratio, zero_init))
