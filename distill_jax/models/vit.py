"""Vision transformers (Dosovitskiy et al. 2021) with pre-normalization and learned positions."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ConfigError, nearest
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import Dense, DropPath, gelu


class Size(NamedTuple):
    """Width of the tokens, number of blocks and attention heads."""

    width: int
    depth: int
    heads: int


VARIANTS = {
    "micro": Size(96, 6, 3),
    "tiny": Size(192, 12, 3),
    "small": Size(384, 12, 6),
    "base": Size(768, 12, 12),
    "large": Size(1024, 24, 16),
}

_xavier = nn.initializers.xavier_uniform()


def _divisors(n: int) -> str:
    return ", ".join(str(k) for k in range(1, n + 1) if n % k == 0)


class Attention(nn.Module):
    """Multi-head self-attention, `[b, t, d]` to `[b, t, d]`."""

    heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, t, d = x.shape
        qkv = Dense(3 * d, kernel_init=_xavier)(x).reshape(b, t, 3, self.heads, d // self.heads)
        q, k, v = jnp.moveaxis(qkv, (2, 3), (0, 2))  # each [b, heads, t, d / heads]
        scores = jnp.einsum("bhqc,bhkc->bhqk", q * (d // self.heads) ** -0.5, k)
        scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        mixed = jnp.einsum("bhqk,bhkc->bhqc", weights, v)
        return Dense(d, kernel_init=_xavier)(mixed.swapaxes(1, 2).reshape(b, t, d))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each on a normalized residual branch."""

    heads: int
    mlp_ratio: int
    dropout: float
    drop_path: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        def residual(x, branch):
            if self.dropout:
                branch = nn.Dropout(self.dropout)(branch, deterministic=not train)
            if self.drop_path:
                branch = DropPath(self.drop_path)(branch, train=train)
            return x + branch

        x = residual(x, Attention(self.heads)(nn.LayerNorm(epsilon=1e-6)(x)))
        y = Dense(self.mlp_ratio * x.shape[-1], kernel_init=_xavier)(nn.LayerNorm(epsilon=1e-6)(x))
        return residual(x, Dense(x.shape[-1], kernel_init=_xavier)(gelu(y)))


class ViT(nn.Module):
    """The network of `make`."""

    num_classes: int
    size: Size
    patch_size: int
    pool: str
    mlp_ratio: int
    dropout: float
    drop_path: float

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Outputs:
        (width, depth, heads), p = self.size, self.patch_size
        b, h, w, c = x.shape
        if h % p or w % p:
            raise ConfigError(
                f"an image of {h}x{w} cannot be cut into patches of {p}x{p}",
                where="patch_size",
                hint=f"divisors: {_divisors(math.gcd(h, w))}",
            )
        outputs = {}
        x = x.reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3).reshape(b, -1, p * p * c)
        x = Dense(width, kernel_init=_xavier, name="patches")(x)
        if self.pool == "cls":
            cls = self.param("cls", nn.initializers.zeros, (1, 1, width)).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(cls, (b, 1, width)), x], axis=1)
        positions = nn.initializers.normal(0.02)
        x += self.param("positions", positions, (1, *x.shape[1:])).astype(x.dtype)
        if self.dropout:
            x = nn.Dropout(self.dropout)(x, deterministic=not train)
        for index in range(depth):
            rate = self.drop_path * index / max(1, depth - 1)
            x = Block(heads, self.mlp_ratio, self.dropout, rate)(x, train=train)
            outputs[f"block{index + 1}"] = x
        for stage in range(1, 4):
            outputs[f"stage{stage}"] = outputs[f"block{math.ceil(stage * depth / 3)}"]
        x = outputs["tokens"] = nn.LayerNorm(epsilon=1e-6)(x)
        x = outputs["embedding"] = x[:, 0] if self.pool == "cls" else x.mean(1)
        outputs["logits"] = Dense(self.num_classes)(x)
        return outputs


def make(
    *,
    num_classes: int,
    variant: str = "tiny",
    patch_size: int = 4,
    width: int = 0,
    depth: int = 0,
    heads: int = 0,
    mlp_ratio: int = 4,
    pool: str = "cls",
    dropout: float = 0.0,
    drop_path: float = 0.0,
) -> Model:
    """Returns a vision transformer for images `[b, h, w, c]`; positions fix the image size.

    Endpoints: `block<i>` `[b, t, d]` of every block, `stage1` to `stage3` (the blocks at a third,
    two thirds and the end), `tokens` (normalized), `embedding` and `logits`.

    Args:
      num_classes: k.
      variant: "micro", "tiny", "small", "base" or "large".
      patch_size: side of a patch in pixels.
      width: size of a token, in place of the variant's; 0 keeps it.
      depth: number of blocks, in place of the variant's; 0 keeps it.
      heads: number of attention heads, in place of the variant's; 0 keeps it.
      mlp_ratio: hidden width of the perceptrons over the token width.
      pool: "cls" (a class token) or "mean" (over all tokens).
      dropout: rate on the embedded patches and on every residual branch.
      drop_path: rate of the last block's stochastic depth, growing linearly from 0.

    Raises:
      ConfigError: an unknown variant or pool, or a width that the heads do not divide.
    """
    if variant not in VARIANTS:
        raise ConfigError(
            f"no vision transformer {variant!r}", where="variant", hint=nearest(variant, VARIANTS)
        )
    if pool not in ("cls", "mean"):
        raise ConfigError(f"no pooling {pool!r}", where="pool", hint=nearest(pool, ("cls", "mean")))
    published = VARIANTS[variant]
    size = Size(width or published.width, depth or published.depth, heads or published.heads)
    if size.width % size.heads:
        raise ConfigError(
            f"{size.heads} heads do not divide a width of {size.width}",
            where="heads",
            hint=f"divisors: {_divisors(size.width)}",
        )
    return from_linen(ViT(num_classes, size, patch_size, pool, mlp_ratio, dropout, drop_path))
