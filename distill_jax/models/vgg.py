"""VGG networks with batch norm for small images (Simonyan & Zisserman 2015, arXiv:1409.1556).

Five stages of 3x3 convolutions, global pooling, one linear layer, as "vgg8" and "vgg13" of the
distillation literature (Tian et al. 2020, arXiv:1910.10699, appendix). The first three stages end
in a 2x2 maximum pooling: the last two share one resolution, 4x4 of 32x32. Convolutions have no
bias, which the batch norm behind them would cancel.
"""

import flax.linen as nn
import jax

from distill_jax.core import ranges
from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import BatchNorm, Conv, Dense

WIDTHS = (64, 128, 256, 512, 512)
DEPTHS = {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
"""Convolutions of each stage by published name."""


class VGG(nn.Module):
    """The network of `make`."""

    num_classes: int
    depths: tuple[int, ...]
    width_multiplier: float

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Outputs:
        outputs = {}
        pre = x
        for stage, (depth, width) in enumerate(zip(self.depths, WIDTHS, strict=True), 1):
            if 2 <= stage <= 4 and min(x.shape[1:3]) > 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for _ in range(depth):
                pre = Conv(round(width * self.width_multiplier))(x)
                pre = BatchNorm()(pre, train=train)
                x = jax.nn.relu(pre)
            outputs[f"stage{stage}_pre"], outputs[f"stage{stage}"] = pre, x
        x = outputs["embedding"] = x.mean((1, 2))
        outputs["logits"] = Dense(self.num_classes)(x)
        return outputs


def make(*, num_classes: int, variant: str = "vgg8", width_multiplier: float = 1.0) -> Model:
    """Returns a VGG network for images `[b, h, w, c]` of any size.

    Endpoints: `stage1` to `stage5`, each before the pooling that follows, their `_pre` (before the
    last activation), `embedding` and `logits`.

    Args:
      num_classes: k.
      variant: "vgg8", "vgg11", "vgg13", "vgg16" or "vgg19".
      width_multiplier: multiplies the stage widths 64, 128, 256, 512, 512.

    Raises:
      ArgumentError: the variant does not exist, or the multiplier leaves no channel.
    """
    ranges.counts(num_classes=num_classes)
    ranges.within("(0, 1000]", width_multiplier=width_multiplier)
    if variant not in DEPTHS:
        raise ArgumentError(f"no VGG {variant!r}", where="variant", hint=nearest(variant, DEPTHS))
    if WIDTHS[0] * width_multiplier < 1:
        raise ArgumentError(
            f"leaves no channel: {width_multiplier}", where="width_multiplier", hint="such as 0.5"
        )
    return from_linen(VGG(num_classes, DEPTHS[variant], width_multiplier))
