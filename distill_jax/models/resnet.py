"""ResNets for small images (He et al. 2016, section 4.2), as in the distillation literature.

Depth is 6n + 2: a 3x3 stem, three stages of n basic blocks, global pooling, one linear layer. A
block that changes the shape has a projection shortcut (1x1 convolution and batch norm; "option
B"). The wide variants "resnet8x4" and "resnet32x4" have four times the width behind a stem of
twice the width (Tian et al. 2020, Contrastive Representation Distillation, appendix).
"""

import re

import flax.linen as nn
import jax

from distill_jax.core import ranges
from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import BatchNorm, Conv, Dense

VARIANTS = (
    *(f"resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 110)),
    *(f"resnet{depth}x4" for depth in (8, 14, 20, 32)),
)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; returns the sum before and after the activation.

    With `averages` the shortcut averages over its stride before it projects.
    """

    features: int
    stride: int
    averages: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool) -> tuple[Array, Array]:
        y = BatchNorm()(Conv(self.features, stride=self.stride)(x), train=train)
        y = BatchNorm()(Conv(self.features)(jax.nn.relu(y)), train=train)
        if x.shape != y.shape:
            x, stride = averaged(x, self.stride) if self.averages else (x, self.stride)
            x = Conv(self.features, kernel_size=1, stride=stride)(x)
            x = BatchNorm()(x, train=train)
        y += x
        return y, jax.nn.relu(y)


def averaged(x: Array, stride: int) -> tuple[Array, int]:
    """Returns means over squares of `stride`, fewer pixels at the ends, and the stride left."""
    window = (stride, stride)
    return nn.avg_pool(x, window, window, "SAME", count_include_pad=False), 1


class ResNet(nn.Module):
    """The network of `make`."""

    num_classes: int
    blocks: int
    width_multiplier: int
    remat: bool

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Outputs:
        outputs = {}
        x = Conv(16 * min(self.width_multiplier, 2))(x)
        x = outputs["stem"] = jax.nn.relu(BatchNorm()(x, train=train))
        kind = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        for stage, width in enumerate((16, 32, 64)):
            for index in range(self.blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                name = f"Block_{stage * self.blocks + index}"
                pre, x = kind(self.width_multiplier * width, stride, name=name)(x, train)
            outputs[f"stage{stage + 1}_pre"], outputs[f"stage{stage + 1}"] = pre, x
        x = outputs["embedding"] = x.mean((1, 2))
        outputs["logits"] = Dense(self.num_classes)(x)
        return outputs


def make(
    *,
    num_classes: int,
    depth: int = 20,
    width_multiplier: int = 1,
    variant: str = "",
    remat: bool = False,
) -> Model:
    """Returns a ResNet for images `[b, h, w, c]` of any size.

    Endpoints: `stem`, `stage1` to `stage3` with their `_pre` (before the last activation),
    `embedding` and `logits`.

    Args:
      num_classes: k.
      depth: 6n + 2.
      width_multiplier: multiplies the stage widths 16, 32, 64; the stem has 16 channels, or 32
        where the multiplier exceeds 1.
      variant: a published name such as "resnet20" or "resnet8x4", in place of the two above.
      remat: whether blocks are computed again in the backward pass, to save memory.

    Raises:
      ArgumentError: depth is not 6n + 2, or the variant or the multiplier does not exist.
    """
    ranges.counts(num_classes=num_classes)
    ranges.sizes(width_multiplier=width_multiplier)
    ranges.depths(depth=depth)
    if variant:
        match = re.fullmatch(r"resnet(\d+)(?:x(\d+))?", variant)
        if match is None:
            raise ArgumentError(
                f"no ResNet {variant!r}", where="variant", hint=nearest(variant, VARIANTS)
            )
        depth, width_multiplier = int(match[1]), int(match[2] or 1)
    if depth < 8 or (depth - 2) % 6:
        near = 6 * max(1, round((depth - 2) / 6)) + 2
        raise ArgumentError(
            f"a ResNet for small images has depth 6n + 2, not {depth}",
            where="variant" if variant else "depth",
            hint=f"nearest: {near}",
        )
    return from_linen(ResNet(num_classes, (depth - 2) // 6, width_multiplier, remat))
