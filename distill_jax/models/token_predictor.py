"""A transformer that predicts hidden tokens: MAE's decoder, JEPA's predictor.

He et al. (2022, MAE, arXiv:2111.06377), section 3; Assran et al. (2023, I-JEPA, arXiv:2301.08243),
section 3.
"""

import math

import flax.linen as nn
import jax.numpy as jnp

from distill_jax.core import ranges, tokens
from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ArgumentError
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import Dense, LayerNorm
from distill_jax.models.vit import Block


class TokenPredictor(nn.Module):
    """The network of `make`."""

    width: int
    depth: int
    heads: int
    mlp_ratio: int
    grid: tuple[int, ...]

    @nn.compact
    def __call__(
        self, context: Array, keep: Array, targets: Array, like: Array, train: bool = False
    ) -> Outputs:
        b, m, size = targets.shape
        t, front = like.shape[1], context.shape[1] - keep.shape[1]
        if self.grid and math.prod(self.grid) != t:
            raise ArgumentError(
                f"a grid of {' x '.join(map(str, self.grid))} for {t} tokens",
                where="grid",
                hint="leave grid out to learn positions",
            )
        normal = nn.initializers.normal(0.02)
        x = Dense(self.width, name="context")(context)
        if self.grid:
            places = jnp.asarray(tokens.fourier_positions(self.grid, self.width), x.dtype)
        else:
            places = self.param("positions", normal, (t, self.width)).astype(x.dtype)
        x = x.at[:, front:].add(places[keep])
        blank = self.param("mask_token", normal, (self.width,)).astype(x.dtype)
        blanks = blank[None, None, None] + places[targets]
        x = jnp.broadcast_to(x[:, None], (b, m, *x.shape[1:]))
        x = jnp.concatenate([x, blanks], axis=2).reshape(b * m, -1, self.width)
        for _ in range(self.depth):
            x = Block(self.heads, self.mlp_ratio, 0.0, 0.0)(x, train=train)
        x = LayerNorm()(x[:, -size:])
        x = Dense(like.shape[-1], name="output")(x)
        return {"output": x.reshape(b, m, size, -1)}


def make(
    *,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    mlp_ratio: int = 4,
    grid: tuple[int, ...] = (),
) -> Model:
    """Returns a map of encoded tokens to predictions of the tokens at other positions.

    Inputs are `context` `[b, r + n, d]`, n encoded tokens after r tokens without a position;
    `keep`, int `[b, n]`, their positions among t; `targets`, int `[b, m, n_t]`, the positions of m
    sets; and `like` `[b, t, d']`, which only sets the output shape. A set is predicted from the
    context and from a learned token at each of its positions, independently of the other sets. The
    endpoint is `output` `[b, m, n_t, d']`.

    Args:
      width: of its tokens.
      depth: number of blocks.
      heads: number of attention heads.
      mlp_ratio: hidden width of the perceptrons over the width.
      grid: numbers of tokens along each axis, for fixed positions of sines and cosines; without,
        positions are learned.

    Raises:
      ArgumentError: a size below 1, or a width that the heads do not divide; when the network is
        first called, also a grid of another number of tokens.
    """
    ranges.depths(depth=depth)
    ranges.sizes(width=width, heads=heads, mlp_ratio=mlp_ratio, grid=grid)
    if width % heads:
        raise ArgumentError(
            f"{heads} heads do not divide a width of {width}",
            where="heads",
            hint=f"divisors: {tokens.divisors(width)}",
        )
    return from_linen(TokenPredictor(width, depth, heads, mlp_ratio, tuple(grid)))
