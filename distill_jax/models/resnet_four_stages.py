"""ResNets of four stages (He et al. 2016, arXiv:1512.03385, table 1) with a stem for small images.

"resnet18" and "resnet34" of basic blocks, "resnet50" and deeper of bottlenecks, of widths 64 to
512. The stem is one 3x3 convolution without pooling, so that 32x32 ends in 4x4, as "ResNet50" of
the distillation literature (Tian et al. 2020, arXiv:1910.10699, appendix). A bottleneck has its
stride in the 3x3 convolution. `resnet.py` has the networks of three stages and depth 6n + 2.
"""

import flax.linen as nn
import jax

from distill_jax.core import ranges
from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ConfigError, nearest
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import BatchNorm, Conv, Dense
from distill_jax.models.resnet import Block

REPEATS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
"""Blocks of each stage."""


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 of four times the width, and a shortcut; before and after the activation."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> tuple[Array, Array]:
        y = jax.nn.relu(BatchNorm()(Conv(self.features, kernel_size=1)(x), train=train))
        y = jax.nn.relu(BatchNorm()(Conv(self.features, stride=self.stride)(y), train=train))
        y = BatchNorm()(Conv(4 * self.features, kernel_size=1)(y), train=train)
        if x.shape != y.shape:
            x = Conv(4 * self.features, kernel_size=1, stride=self.stride)(x)
            x = BatchNorm()(x, train=train)
        y += x
        return y, jax.nn.relu(y)


class ResNet(nn.Module):
    """The network of `make`."""

    num_classes: int
    repeats: tuple[int, ...]
    bottleneck: bool
    width: int

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Outputs:
        outputs = {}
        pre = x = outputs["stem"] = jax.nn.relu(BatchNorm()(Conv(self.width)(x), train=train))
        make_block = Bottleneck if self.bottleneck else Block
        for stage, repeats in enumerate(self.repeats):
            for index in range(repeats):
                stride = 2 if stage > 0 and index == 0 else 1
                pre, x = make_block(self.width * 2**stage, stride)(x, train=train)
            outputs[f"stage{stage + 1}_pre"], outputs[f"stage{stage + 1}"] = pre, x
        x = outputs["embedding"] = x.mean((1, 2))
        outputs["logits"] = Dense(self.num_classes)(x)
        return outputs


def make(*, num_classes: int, variant: str = "resnet50", width: int = 64) -> Model:
    """Returns a ResNet of four stages for images `[b, h, w, c]` of any size.

    Endpoints: `stem`, `stage1` to `stage4` with their `_pre` (before the last activation),
    `embedding` and `logits`.

    Args:
      num_classes: k.
      variant: "resnet18", "resnet34", "resnet50", "resnet101" or "resnet152".
      width: channels of the stem and of the first stage's 3x3 convolutions.

    Raises:
      ConfigError: the variant does not exist, or the width is below 1.
    """
    ranges.counts(num_classes=num_classes)
    ranges.sizes(width=width)
    if variant not in REPEATS:
        raise ConfigError(f"no ResNet {variant!r}", where="variant", hint=nearest(variant, REPEATS))
    deep = variant not in ("resnet18", "resnet34")
    return from_linen(ResNet(num_classes, REPEATS[variant], deep, width))
