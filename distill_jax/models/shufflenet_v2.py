"""ShuffleNetV2 for small images (Ma et al. 2018, arXiv:1807.11164).

A block passes half of the channels on, convolves the other half, and shuffles the two. For 32x32
the stem is one 1x1 convolution without pooling; width 1 is "ShuffleNetV2" of the distillation
literature (Tian et al. 2020, arXiv:1910.10699, appendix).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from distill_jax.core import ranges
from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import BatchNorm, Conv, Dense, shuffle_channels

WIDTHS = {
    "0.5x": (48, 96, 192, 1024),
    "1x": (116, 232, 464, 1024),
    "1.5x": (176, 352, 704, 1024),
    "2x": (244, 488, 976, 2048),
}
"""Channels of the three stages and of the last convolution (table 5)."""

REPEATS = (4, 8, 4)
STEM = 24


class Block(nn.Module):
    """1x1, 3x3 depthwise, 1x1 beside the other half, shuffled; before and after the activation."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> tuple[Array, Array]:
        half = self.features // 2
        if self.stride > 1:
            kept = Conv(x.shape[-1], stride=self.stride, groups=x.shape[-1])(x)
            kept = BatchNorm()(kept, train=train)
            kept = BatchNorm()(Conv(half, kernel_size=1)(kept), train=train)
        else:
            kept, x = jnp.split(x, 2, -1)
        y = jax.nn.relu(BatchNorm()(Conv(half, kernel_size=1)(x), train=train))
        y = BatchNorm()(Conv(half, stride=self.stride, groups=half)(y), train=train)
        y = BatchNorm()(Conv(half, kernel_size=1)(y), train=train)
        # The part that is passed on is not negative: the activation does not change it.
        y = shuffle_channels(jnp.concatenate([kept, y], -1), 2)
        return y, jax.nn.relu(y)


class ShuffleNetV2(nn.Module):
    """The network of `make`."""

    num_classes: int
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Outputs:
        outputs = {}
        x = Conv(STEM, kernel_size=1)(x)
        pre = x = outputs["stem"] = jax.nn.relu(BatchNorm()(x, train=train))
        for stage, (width, repeats) in enumerate(zip(self.widths, REPEATS, strict=False), 1):
            for index in range(repeats):
                pre, x = Block(width, 2 if index == 0 else 1)(x, train=train)
            outputs[f"stage{stage}_pre"], outputs[f"stage{stage}"] = pre, x
        x = Conv(self.widths[-1], kernel_size=1)(x)
        x = jax.nn.relu(BatchNorm()(x, train=train))
        x = outputs["embedding"] = x.mean((1, 2))
        outputs["logits"] = Dense(self.num_classes)(x)
        return outputs


def make(*, num_classes: int, variant: str = "1x") -> Model:
    """Returns a ShuffleNetV2 for images `[b, h, w, c]` of any size.

    Endpoints: `stem`, `stage1` to `stage3` with their `_pre` (before the last activation),
    `embedding` and `logits`.

    Args:
      num_classes: k.
      variant: width, "0.5x", "1x", "1.5x" or "2x".

    Raises:
      ArgumentError: the variant does not exist.
    """
    ranges.counts(num_classes=num_classes)
    if variant not in WIDTHS:
        raise ArgumentError(
            f"no ShuffleNetV2 {variant!r}", where="variant", hint=nearest(variant, WIDTHS)
        )
    return from_linen(ShuffleNetV2(num_classes, WIDTHS[variant]))
