"""MobileNetV2 for small images (Sandler et al. 2018, arXiv:1801.04381).

Inverted residual blocks with linear bottlenecks, table 2 of the paper. For 32x32 the second stage
keeps its resolution, so that the last one is 2x2; the half-width network is "MobileNetV2" of the
distillation literature (Tian et al. 2020, arXiv:1910.10699, appendix): its first block has a 1x1
convolution in place of an expansion, too, and its activations are ReLU in place of ReLU6.
"""

import flax.linen as nn
import jax

from distill_jax.core import ranges
from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ArgumentError
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import BatchNorm, Conv, Dense

BLOCKS = (
    # expansion applies, channels, repeats, stride, endpoint
    (False, 16, 1, 1, ""),
    (True, 24, 2, 1, "stage1"),
    (True, 32, 3, 2, "stage2"),
    (True, 64, 4, 2, ""),
    (True, 96, 3, 1, "stage3"),
    (True, 160, 3, 2, ""),
    (True, 320, 1, 1, "stage4"),
)
STEM, HEAD = 32, 1280


class Block(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1; a shortcut where the shape stays."""

    features: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        inner = self.expansion * x.shape[-1]
        y = jax.nn.relu(BatchNorm()(Conv(inner, kernel_size=1)(x), train=train))
        y = Conv(inner, stride=self.stride, groups=inner)(y)
        y = jax.nn.relu(BatchNorm()(y, train=train))
        y = BatchNorm()(Conv(self.features, kernel_size=1)(y), train=train)
        return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
    """The network of `make`."""

    num_classes: int
    width_multiplier: float
    expansion: int

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Outputs:
        outputs = {}
        x = Conv(int(STEM * self.width_multiplier), stride=2)(x)
        outputs["stem"] = x = jax.nn.relu(BatchNorm()(x, train=train))
        for expands, channels, repeats, stride, endpoint in BLOCKS:
            for index in range(repeats):
                x = Block(
                    int(channels * self.width_multiplier),
                    stride if index == 0 else 1,
                    self.expansion if expands else 1,
                )(x, train=train)
            if endpoint:
                outputs[endpoint] = outputs[f"{endpoint}_pre"] = x
        x = Conv(int(HEAD * max(1.0, self.width_multiplier)), kernel_size=1)(x)
        x = jax.nn.relu(BatchNorm()(x, train=train))
        x = outputs["embedding"] = x.mean((1, 2))
        outputs["logits"] = Dense(self.num_classes)(x)
        return outputs


def make(*, num_classes: int, width_multiplier: float = 0.5, expansion: int = 6) -> Model:
    """Returns a MobileNetV2 for images `[b, h, w, c]` of any size.

    Endpoints: `stem`, `stage1` to `stage4` (the last block of each resolution behind the stem),
    `embedding` and `logits`. Blocks end without an activation: `_pre` of a stage is the stage.

    Args:
      num_classes: k.
      width_multiplier: multiplies all widths, rounded down; the last has at least 1280 channels.
      expansion: of the blocks behind the first.

    Raises:
      ArgumentError: no channel is left, or the expansion is below 1.
    """
    ranges.counts(num_classes=num_classes)
    ranges.within("(0, 1000]", width_multiplier=width_multiplier)
    ranges.sizes(expansion=expansion)
    if width_multiplier * BLOCKS[0][1] < 1:
        raise ArgumentError(
            f"leaves no channel: {width_multiplier}", where="width_multiplier", hint="such as 0.5"
        )
    return from_linen(MobileNetV2(num_classes, width_multiplier, expansion))
