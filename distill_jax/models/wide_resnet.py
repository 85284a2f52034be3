"""Wide residual networks, WRN-d-k (Zagoruyko & Komodakis 2016): pre-activation, depth 6n + 4."""

import re

import flax.linen as nn
import jax

from distill_jax.core import ranges
from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import BatchNorm, Conv, Dense

VARIANTS = ("wrn-16-1", "wrn-16-2", "wrn-16-4", "wrn-28-10", "wrn-40-1", "wrn-40-2", "wrn-40-4")


class WideResNet(nn.Module):
    """The network of `make`."""

    num_classes: int
    blocks: int
    width_multiplier: int
    dropout: float

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Outputs:
        outputs = {}
        x = outputs["stem_raw"] = Conv(16)(x)
        for stage, width in enumerate((16, 32, 64)):
            width *= self.width_multiplier
            for index in range(self.blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                pre = BatchNorm()(x, train=train)
                y = jax.nn.relu(pre)
                if index == 0:
                    # The first norm and activation of a stage belong to the features before it.
                    name = f"stage{stage}" if stage else "stem"
                    outputs[f"{name}_pre"], outputs[name] = pre, y
                # A block that changes the width shares its pre-activation with the shortcut.
                if x.shape[-1] != width or stride > 1:
                    x = Conv(width, kernel_size=1, stride=stride)(y)
                y = jax.nn.relu(BatchNorm()(Conv(width, stride=stride)(y), train=train))
                if self.dropout:
                    y = nn.Dropout(self.dropout)(y, deterministic=not train)
                x += Conv(width)(y)
            outputs[f"stage{stage + 1}_raw"] = x
        outputs["stage3_pre"] = BatchNorm()(x, train=train)
        outputs["stage3"] = jax.nn.relu(outputs["stage3_pre"])
        outputs["embedding"] = outputs["stage3"].mean((1, 2))
        outputs["logits"] = Dense(self.num_classes)(outputs["embedding"])
        return outputs


def make(
    *,
    num_classes: int,
    depth: int = 16,
    width_multiplier: int = 2,
    dropout: float = 0.0,
    variant: str = "",
) -> Model:
    """Returns a wide ResNet for images `[b, h, w, c]` of any size.

    Endpoints: `stem` and `stage1` to `stage3`, each after the norm and activation of the next
    layer, their `_pre` (before that activation) and `_raw` (before that norm: the stem's
    convolution, and the sums of the last blocks, which the distillation literature takes for
    features of these networks), `embedding` and `logits`.

    Args:
      num_classes: k.
      depth: 6n + 4.
      width_multiplier: multiplies the stage widths 16, 32, 64 behind a stem of 16.
      dropout: rate between the two convolutions of a block.
      variant: a published name such as "wrn-40-2", in place of depth and multiplier.

    Raises:
      ArgumentError: depth is not 6n + 4, or the variant or the multiplier does not exist.
    """
    ranges.counts(num_classes=num_classes)
    ranges.sizes(width_multiplier=width_multiplier)
    ranges.rates(dropout=dropout)
    ranges.depths(depth=depth)
    if variant:
        match = re.fullmatch(r"wrn-(\d+)-(\d+)", variant)
        if match is None:
            raise ArgumentError(
                f"no wide ResNet {variant!r}", where="variant", hint=nearest(variant, VARIANTS)
            )
        depth, width_multiplier = int(match[1]), int(match[2])
    if depth < 10 or (depth - 4) % 6:
        near = 6 * max(1, round((depth - 4) / 6)) + 4
        raise ArgumentError(
            f"a wide ResNet has depth 6n + 4, not {depth}",
            where="variant" if variant else "depth",
            hint=f"nearest: {near}",
        )
    return from_linen(WideResNet(num_classes, (depth - 4) // 6, width_multiplier, dropout))
