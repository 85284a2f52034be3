"""ConvNeXt (Liu et al. 2022, arXiv:2201.03545) and ConvNeXt V2 (Woo et al. 2023, arXiv:2301.00808).

A block is a 7x7 depthwise convolution, a layer norm and a perceptron of four times the width. V1
scales its branch by a learned gain of each channel; V2 normalizes the hidden layer by the relative
length of each channel over the image (global response normalization) instead.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from distill_jax.core import ranges, tokens
from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import Conv, Dense, DropPath, LayerNorm
from distill_jax.weights.sizes.stages import CONVNEXTS

_normal = nn.initializers.truncated_normal(0.02)


class ResponseNorm(nn.Module):
    """Global response normalization (Woo et al. 2023, algorithm 1), `[b, h, w, d]`."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        d = x.shape[-1]
        scale = self.param("scale", nn.initializers.zeros, (d,)).reshape(1, 1, 1, d)
        bias = self.param("bias", nn.initializers.zeros, (d,)).reshape(1, 1, 1, d)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        # the square root has no derivative at a channel of zeros
        square = jnp.square(wide).sum((1, 2), keepdims=True)
        length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
        relative = length / (length.mean(-1, keepdims=True) + self.epsilon)
        return (wide + bias + scale * (wide * relative)).astype(x.dtype)


class Block(nn.Module):
    """The residual block; `layer_scale` is the first gain of V1's branch, None makes it V2's."""

    layer_scale: float | None
    drop_path: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        d = x.shape[-1]
        y = Conv(d, kernel_size=7, groups=d, use_bias=True, name="depthwise")(x)
        y = LayerNorm(name="norm")(y)
        y = Dense(4 * d, kernel_init=_normal, name="expand")(y)
        y = jax.nn.gelu(y, approximate=False)
        if self.layer_scale is None:
            y = ResponseNorm(name="response_norm")(y)
        y = Dense(d, kernel_init=_normal, name="project")(y)
        if self.layer_scale is not None:
            gain = self.param("gain", nn.initializers.constant(self.layer_scale), (d,))
            y *= gain.reshape(1, 1, 1, d).astype(y.dtype)
        return x + (DropPath(self.drop_path)(y, train=train) if self.drop_path else y)


class Patches(nn.Module):
    """A convolution whose stride is its kernel's side, as a product: `[b, h, w, c]` to a grid."""

    features: int
    side: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, _ = x.shape
        p = self.side
        x = x[:, : h // p * p, : w // p * p]  # a last row or column that fills no patch is left out
        kernel = Dense(self.features, kernel_init=_normal, name="patches")
        return kernel(tokens.patchify(x, patch_size=p)).reshape(b, h // p, w // p, -1)


class ConvNeXt(nn.Module):
    """The network of `make`."""

    num_classes: int
    widths: tuple[int, ...]
    repeats: tuple[int, ...]
    layer_scale: float | None
    drop_path: float

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Outputs:
        outputs, index = {}, 0
        x = LayerNorm(name="stem_norm")(Patches(self.widths[0], 4, name="stem")(x))
        outputs["stem"] = x
        for s, (width, repeats) in enumerate(zip(self.widths, self.repeats, strict=True), 1):
            if s > 1:
                x = LayerNorm(name=f"stage{s}_norm")(x)
                x = Patches(width, 2, name=f"stage{s}_down")(x)
            for b in range(repeats):
                rate = self.drop_path * index / max(1, sum(self.repeats) - 1)
                x = Block(self.layer_scale, rate, name=f"stage{s}_block{b}")(x, train=train)
                index += 1
            outputs[f"stage{s}"] = x
        x = outputs["embedding"] = LayerNorm(name="norm")(x.mean((1, 2)))
        if self.num_classes:
            outputs["logits"] = Dense(self.num_classes, name="head")(x)
        return outputs


def make(
    *,
    num_classes: int,
    variant: str = "tiny",
    version: int = 1,
    widths: tuple[int, ...] = (),
    repeats: tuple[int, ...] = (),
    layer_scale: float = 1e-6,
    drop_path: float = 0.0,
) -> Model:
    """Returns a ConvNeXt for images `[b, h, w, c]` of at least 32x32.

    Endpoints: `stem`, `stage1` to `stage4`, `embedding` (pooled, then normalized) and `logits`.

    Args:
      num_classes: k; 0 leaves the last layer and `logits` out.
      variant: "atto", "femto", "pico", "nano", "tiny", "small", "base", "large", "xlarge", "huge".
      version: 1, or 2 with global response normalization.
      widths: of the four stages, in place of the variant's.
      repeats: blocks of the four stages, in place of the variant's.
      layer_scale: first gain of the branches of version 1.
      drop_path: rate of the last block's stochastic depth, growing linearly from 0.

    Raises:
      ArgumentError: an unknown variant or version, or a number out of its range.
    """
    ranges.counts(num_classes=num_classes)
    ranges.rates(drop_path=drop_path)
    ranges.within("[0, 1000]", layer_scale=layer_scale)
    if variant not in CONVNEXTS:
        raise ArgumentError(
            f"no ConvNeXt {variant!r}", where="variant", hint=nearest(variant, CONVNEXTS)
        )
    if version not in (1, 2):
        raise ArgumentError(f"version is {version!r}", where="version", hint="1 or 2")
    widths = tuple(widths) or CONVNEXTS[variant][0]
    repeats = tuple(repeats) or CONVNEXTS[variant][1]
    ranges.sizes(widths=widths, repeats=repeats)
    for name, values in {"widths": widths, "repeats": repeats}.items():
        if len(values) != 4:
            raise ArgumentError(f"{name} has {len(values)} numbers", where=name, hint="four stages")
    gain = layer_scale if version == 1 else None
    return from_linen(ConvNeXt(num_classes, widths, repeats, gain, drop_path))
