"""ShuffleNet for small images (Zhang et al. 2018, arXiv:1707.01083).

Grouped 1x1 convolutions with a shuffle of channels between them. For 32x32 the stem is one 1x1
convolution without pooling; three groups are "ShuffleNetV1" of the distillation literature (Tian et
al. 2020, arXiv:1910.10699, appendix), whose blocks have an activation behind the depthwise
convolution, too, which those of the paper lack. The inner width of a block is a quarter of the
output channels of its convolutions, rounded up to a multiple of the groups; in a stage's first
block these are the channels beside the pooled input.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from distill_jax.core import ranges
from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import BatchNorm, Conv, Dense, shuffle_channels

WIDTHS = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}
"""Channels of the first stage by number of groups (table 1); each later stage has twice as many."""

REPEATS = (4, 8, 4)
STEM = 24


class Block(nn.Module):
    """Grouped 1x1, shuffle, 3x3 depthwise, grouped 1x1; returns before and after the activation."""

    features: int
    stride: int
    groups: int

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> tuple[Array, Array]:
        made = self.features - (x.shape[-1] if self.stride > 1 else 0)
        inner = -(-made // (4 * self.groups)) * self.groups
        # Few input channels: the first block does not group its first convolution (section 3.2).
        groups = 1 if x.shape[-1] == STEM else self.groups
        y = Conv(inner, kernel_size=1, groups=groups)(x)
        y = shuffle_channels(jax.nn.relu(BatchNorm()(y, train=train)), groups)
        y = Conv(inner, stride=self.stride, groups=inner)(y)
        y = jax.nn.relu(BatchNorm()(y, train=train))
        y = BatchNorm()(Conv(made, kernel_size=1, groups=self.groups)(y), train=train)
        if self.stride > 1:
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            x = nn.avg_pool(x, (3, 3), (2, 2))
            y = jnp.concatenate([y, x], -1)
        else:
            y += x
        return y, jax.nn.relu(y)


class ShuffleNet(nn.Module):
    """The network of `make`."""

    num_classes: int
    width: int
    groups: int

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Outputs:
        outputs = {}
        x = Conv(STEM, kernel_size=1)(x)
        pre = x = outputs["stem"] = jax.nn.relu(BatchNorm()(x, train=train))
        for stage, repeats in enumerate(REPEATS):
            for index in range(repeats):
                stride = 2 if index == 0 else 1
                pre, x = Block(self.width * 2**stage, stride, self.groups)(x, train=train)
            outputs[f"stage{stage + 1}_pre"], outputs[f"stage{stage + 1}"] = pre, x
        x = outputs["embedding"] = x.mean((1, 2))
        outputs["logits"] = Dense(self.num_classes)(x)
        return outputs


def make(*, num_classes: int, groups: int = 3) -> Model:
    """Returns a ShuffleNet for images `[b, h, w, c]` of any size.

    Endpoints: `stem`, `stage1` to `stage3` with their `_pre` (before the last activation),
    `embedding` and `logits`.

    Args:
      num_classes: k.
      groups: 1, 2, 3, 4 or 8; sets the widths as well.

    Raises:
      ArgumentError: the paper has no network of so many groups.
    """
    ranges.counts(num_classes=num_classes)
    if groups not in WIDTHS:
        raise ArgumentError(
            f"no ShuffleNet of {groups} groups",
            where="groups",
            hint=nearest(str(groups), map(str, WIDTHS)),
        )
    return from_linen(ShuffleNet(num_classes, WIDTHS[groups], groups))
