"""ResNets of four stages (He et al. 2016, arXiv:1512.03385, table 1).

"resnet18" and "resnet34" of basic blocks, "resnet50" and deeper of bottlenecks, of widths 64 to
512. By default the stem is one 3x3 convolution without pooling, so that 32x32 ends in 4x4, as
"ResNet50" of the distillation literature (Tian et al. 2020, arXiv:1910.10699, appendix); for
ImageNet it is a 7x7 convolution with stride 2 and pooling, or, in ResNet-D (He et al. 2019,
arXiv:1812.01187, figure 2), three 3x3 convolutions and pooling. A bottleneck has its stride in the
3x3 convolution. `resnet.py` has the networks of three stages and depth 6n + 2.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from distill_jax.core import ranges
from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import BatchNorm, Conv, Dense
from distill_jax.models.resnet import Block, averaged
from distill_jax.weights.sizes.stages import RESNETS as REPEATS

STEMS = {
    "small": ((1, 3, 1),),
    "imagenet": ((1, 7, 2),),
    "deep": ((0.5, 3, 2), (0.5, 3, 1), (1, 3, 1)),
}
"""Width, relative to the first stage's, kernel and stride of the stem's convolutions."""


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 of four times the width, and a shortcut; before and after the activation."""

    features: int
    stride: int
    averages: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool) -> tuple[Array, Array]:
        y = jax.nn.relu(BatchNorm()(Conv(self.features, kernel_size=1)(x), train=train))
        y = jax.nn.relu(BatchNorm()(Conv(self.features, stride=self.stride)(y), train=train))
        y = BatchNorm()(Conv(4 * self.features, kernel_size=1)(y), train=train)
        if x.shape != y.shape:
            x, stride = averaged(x, self.stride) if self.averages else (x, self.stride)
            x = Conv(4 * self.features, kernel_size=1, stride=stride)(x)
            x = BatchNorm()(x, train=train)
        y += x
        return y, jax.nn.relu(y)


class ResNet(nn.Module):
    """The network of `make`."""

    num_classes: int
    repeats: tuple[int, ...]
    bottleneck: bool
    width: int
    stem: str
    averages: bool
    remat: bool

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Outputs:
        outputs = {}
        for features, kernel, stride in STEMS[self.stem]:
            conv = Conv(int(features * self.width), kernel_size=kernel, stride=stride)
            x = jax.nn.relu(BatchNorm()(conv(x), train=train))
        pre = outputs["stem"] = x
        if self.stem != "small":
            # zeros are no larger than the outputs of a ReLU
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            x = nn.max_pool(x, (3, 3), (2, 2))
        kind = Bottleneck if self.bottleneck else Block
        make_block = nn.remat(kind, static_argnums=(2,)) if self.remat else kind
        for stage, repeats in enumerate(self.repeats):
            for index in range(repeats):
                stride = 2 if stage > 0 and index == 0 else 1
                name = f"{kind.__name__}_{sum(self.repeats[:stage]) + index}"
                block = make_block(self.width * 2**stage, stride, self.averages, name=name)
                pre, x = block(x, train)
            outputs[f"stage{stage + 1}_pre"], outputs[f"stage{stage + 1}"] = pre, x
        x = outputs["embedding"] = x.mean((1, 2))
        if self.num_classes:
            outputs["logits"] = Dense(self.num_classes)(x)
        return outputs


def make(
    *,
    num_classes: int,
    variant: str = "resnet50",
    width: int = 64,
    stem: str = "small",
    shortcut: str = "conv",
    max_depth: int = 0,
    remat: bool = False,
) -> Model:
    """Returns a ResNet of four stages for images `[b, h, w, c]` of any size.

    Endpoints: `stem` (before a pooling), `stage1` to `stage4` with their `_pre` (before the last
    activation), `embedding` and `logits`.

    Args:
      num_classes: k; 0 leaves the last layer and `logits` out.
      variant: "resnet18", "resnet34", "resnet50", "resnet101" or "resnet152".
      width: channels of the stem and of the first stage's 3x3 convolutions.
      stem: "small", "imagenet" or "deep".
      shortcut: "conv" for a convolution with the block's stride, or "average" before one without.
        ResNet-D is "deep" with "average".
      max_depth: most blocks of a stage; 0 for all of them.
      remat: whether blocks are computed again in the backward pass, to save memory.

    Raises:
      ArgumentError: the variant, stem or shortcut does not exist, or a number is out of its range.
    """
    ranges.counts(num_classes=num_classes, max_depth=max_depth)
    ranges.sizes(width=width)
    if variant not in REPEATS:
        raise ArgumentError(
            f"no ResNet {variant!r}", where="variant", hint=nearest(variant, REPEATS)
        )
    if stem not in STEMS:
        raise ArgumentError(f"no stem {stem!r}", where="stem", hint=nearest(stem, STEMS))
    if shortcut not in (known := ("conv", "average")):
        raise ArgumentError(
            f"no shortcut {shortcut!r}", where="shortcut", hint=nearest(shortcut, known)
        )
    deep = variant not in ("resnet18", "resnet34")
    repeats = tuple(min(n, max_depth or n) for n in REPEATS[variant])
    averages = shortcut == "average"
    return from_linen(ResNet(num_classes, repeats, deep, width, stem, averages, remat))
