"""Swin transformers (Liu et al. 2021, arXiv:2103.14030): attention within windows that shift.

Every second block moves the windows by half of their side (section 3.2); pixels that were not
neighbours before the move do not attend to each other. Between the stages squares of four tokens
become one of twice the width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core import ranges
from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.models.adapters import from_linen
from distill_jax.models.convnext import Patches
from distill_jax.models.layers import Dense, DropPath, LayerNorm
from distill_jax.weights.sizes.stages import SWINS, SwinSize

EPSILON = 1e-5

_normal = nn.initializers.truncated_normal(0.02)


def offsets(window: int) -> np.ndarray:
    """Returns the row of the table of relative positions for each pair, `[w w, w w]`."""
    at = np.stack(np.divmod(np.arange(window * window), window), 1)
    difference = at[:, None] - at[None] + window - 1
    return difference[..., 0] * (2 * window - 1) + difference[..., 1]


def strangers(grid: tuple[int, int], window: int, shift: int) -> np.ndarray:
    """Returns the pairs of a shifted window that were apart before, bool `[windows, w w, w w]`."""
    parts = [
        np.digitize(np.arange(n), (n - window, n - shift)) if n > window else np.zeros(n, int)
        for n in grid
    ]
    regions = parts[0][:, None] * 3 + parts[1][None]
    h, w = grid
    windows = regions.reshape(h // window, window, w // window, window).swapaxes(1, 2)
    windows = windows.reshape(-1, window * window)
    return windows[:, :, None] != windows[:, None, :]


class WindowAttention(nn.Module):
    """Self-attention within windows, `[b, h, w, d]` to `[b, h, w, d]`.

    The first kernel's columns are ordered by head as in `vit.Attention`.
    """

    heads: int
    window: int
    shift: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, d = x.shape
        side, heads = self.window, self.heads
        n, c = side * side, d // heads
        x = jnp.roll(x, (-self.shift, -self.shift), (1, 2)) if self.shift else x
        x = x.reshape(b, h // side, side, w // side, side, d).swapaxes(2, 3)
        qkv = Dense(3 * d, kernel_init=_normal, name="qkv")(x)
        qkv = qkv.reshape(-1, n, heads, 3, c)
        q, k, v = jnp.moveaxis(qkv, (3, 2), (0, 2))  # each [b windows, heads, n, c]
        scores = jnp.einsum("bhqc,bhkc->bhqk", q * c**-0.5, k)
        scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        table = self.param("relative_positions", _normal, ((2 * side - 1) ** 2, heads))
        scores += table[offsets(side)].transpose(2, 0, 1)[None].astype(scores.dtype)
        if self.shift:
            apart = strangers((h, w), side, self.shift)
            scores = scores.reshape(b, -1, heads, n, n)
            scores += jnp.where(apart, -100.0, 0.0)[None, :, None].astype(scores.dtype)
            scores = scores.reshape(-1, heads, n, n)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        mixed = jnp.einsum("bhqk,bhkc->bhqc", weights, v).swapaxes(1, 2).reshape(-1, n, d)
        y = Dense(d, kernel_init=_normal, name="project")(mixed)
        y = y.reshape(b, h // side, w // side, side, side, d).swapaxes(2, 3).reshape(b, h, w, d)
        return jnp.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y


class Block(nn.Module):
    """Window attention and a perceptron, each on a normalized residual branch."""

    heads: int
    window: int
    shift: int
    drop_path: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        def residual(x, branch):
            return x + (DropPath(self.drop_path)(branch, train=train) if self.drop_path else branch)

        _, h, w, d = x.shape
        # a grid that one window covers is not shifted
        side = min(self.window, h, w)
        shift = self.shift if side == self.window and min(h, w) > self.window else 0
        y = LayerNorm(EPSILON, name="norm1")(x)
        bottom, right = -h % side, -w % side
        y = jnp.pad(y, ((0, 0), (0, bottom), (0, right), (0, 0))) if bottom or right else y
        y = WindowAttention(self.heads, side, shift, name="attention")(y)[:, :h, :w]
        x = residual(x, y)
        y = LayerNorm(EPSILON, name="norm2")(x)
        y = Dense(4 * d, kernel_init=_normal, name="expand")(y)
        y = jax.nn.gelu(y, approximate=False)
        return residual(x, Dense(d, kernel_init=_normal, name="project")(y))


def merged(x: Array) -> Array:
    """Joins squares of four tokens by column, `[b, h, w, d]` to `[b, h / 2, w / 2, 4 d]`."""
    b, h, w, d = x.shape
    x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0))) if h % 2 or w % 2 else x
    x = x.reshape(b, (h + 1) // 2, 2, (w + 1) // 2, 2, d).transpose(0, 1, 3, 4, 2, 5)
    return x.reshape(b, (h + 1) // 2, (w + 1) // 2, 4 * d)


class Swin(nn.Module):
    """The network of `make`."""

    num_classes: int
    size: SwinSize
    window: int
    drop_path: float

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Outputs:
        width, repeats, heads = self.size
        outputs, index = {}, 0
        x = Patches(width, 4, name="stem")(x)
        x = outputs["stem"] = LayerNorm(EPSILON, name="stem_norm")(x)
        for s, (blocks, split) in enumerate(zip(repeats, heads, strict=True), 1):
            if s > 1:
                x = LayerNorm(EPSILON, name=f"stage{s}_norm")(merged(x))
                d = x.shape[-1] // 2
                x = Dense(d, kernel_init=_normal, use_bias=False, name=f"stage{s}_merge")(x)
            for b in range(blocks):
                rate = self.drop_path * index / max(1, sum(repeats) - 1)
                shift = self.window // 2 if b % 2 else 0
                block = Block(split, self.window, shift, rate, name=f"stage{s}_block{b}")
                x = block(x, train=train)
                index += 1
            outputs[f"stage{s}"] = x
        x = LayerNorm(EPSILON, name="norm")(x)
        x = outputs["embedding"] = x.mean((1, 2))
        if self.num_classes:
            outputs["logits"] = Dense(self.num_classes, name="head")(x)
        return outputs


def make(
    *,
    num_classes: int,
    variant: str = "tiny",
    window: int = 7,
    width: int = 0,
    repeats: tuple[int, ...] = (),
    heads: tuple[int, ...] = (),
    drop_path: float = 0.0,
) -> Model:
    """Returns a Swin transformer for images `[b, h, w, c]` of one size.

    Tables of relative positions are as large as the window, or as a grid that is smaller.
    Endpoints: `stem`, `stage1` to `stage4` `[b, h, w, d]`, `embedding` and `logits`.

    Args:
      num_classes: k; 0 leaves the last layer and `logits` out.
      variant: "tiny", "small", "base" or "large".
      window: side of a window in tokens.
      width: of the first stage, in place of the variant's; 0 keeps it.
      repeats: blocks of each stage, in place of the variant's.
      heads: attention heads of each stage, in place of the variant's.
      drop_path: rate of the last block's stochastic depth, growing linearly from 0.

    Raises:
      ArgumentError: an unknown variant, or heads that do not divide the widths.
    """
    ranges.counts(num_classes=num_classes, width=width)
    ranges.sizes(window=window, repeats=repeats, heads=heads)
    ranges.rates(drop_path=drop_path)
    if variant not in SWINS:
        raise ArgumentError(f"no Swin {variant!r}", where="variant", hint=nearest(variant, SWINS))
    known = SWINS[variant]
    size = SwinSize(
        width or known.width, tuple(repeats) or known.repeats, tuple(heads) or known.heads
    )
    if len(size.repeats) != len(size.heads):
        raise ArgumentError(
            f"{len(size.heads)} stages have heads, {len(size.repeats)} have blocks",
            where="heads",
            hint="one number for each stage",
        )
    for stage, count in enumerate(size.heads):
        if size.width * 2**stage % count:
            raise ArgumentError(
                f"{count} heads do not divide a width of {size.width * 2**stage}",
                where="heads",
                hint="a divisor of the width of each stage",
            )
    return from_linen(Swin(num_classes, size, window, drop_path))
