"""Sizes of the networks of inverted residual blocks that are published, as tables of blocks.

EfficientNet: Tan & Le 2019, arXiv:1905.11946, table 1. MobileNetV2: Sandler et al. 2018,
arXiv:1801.04381, table 2. MobileNetV3: Howard et al. 2019, arXiv:1905.02244, tables 1 and 2.
"""

import math
from typing import NamedTuple

from distill_jax.core.errors import ConfigError, nearest


class BlockSpec(NamedTuple):
    """A block.

    Attributes:
      inner: channels of the depthwise convolution.
      features: output channels.
      kernel_size: of the depthwise convolution.
      stride: of the depthwise convolution.
      squeezed: channels of the gate's hidden layer, 0 for no gate.
      activation: of the expansion and the depthwise convolution.
      expands: whether there is a 1x1 expansion.
    """

    inner: int
    features: int
    kernel_size: int
    stride: int
    squeezed: int
    activation: str
    expands: bool


class Spec(NamedTuple):
    """A network.

    Attributes:
      stem: channels of the first convolution, 3x3 with stride 2.
      stages: blocks of each stage.
      head: channels of the last 1x1 convolution.
      activation: of the stem and the last convolution.
      gate: activations of the gates, hidden and output.
      hidden: units of a dense layer after pooling, 0 for none.
    """

    stem: int
    stages: tuple[tuple[BlockSpec, ...], ...]
    head: int
    activation: str
    gate: tuple[str, str] = ("silu", "sigmoid")
    hidden: int = 0


def divisible(width: float, divisor: int = 8) -> int:
    """Returns the nearest multiple of `divisor`, never less than 90 % of `width`."""
    rounded = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * width else rounded


EFFICIENTNET = (
    # expansion, channels, repeats, stride, kernel
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
STEM, HEAD = 32, 1280

EFFICIENTNETS = {
    # width, depth, side of the images
    "b0": (1.0, 1.0, 224),
    "b1": (1.0, 1.1, 240),
    "b2": (1.1, 1.2, 260),
    "b3": (1.2, 1.4, 300),
    "b4": (1.4, 1.8, 380),
    "b5": (1.6, 2.2, 456),
    "b6": (1.8, 2.6, 528),
    "b7": (2.0, 3.1, 600),
    "lite0": (1.0, 1.0, 224),
    "lite1": (1.0, 1.1, 240),
    "lite2": (1.1, 1.2, 260),
    "lite3": (1.2, 1.4, 280),
    "lite4": (1.4, 1.8, 300),
}


def efficientnet(variant: str, width: float = 0.0, depth: float = 0.0) -> Spec:
    """Returns a variant's table; `width` and `depth` are in place of its multipliers, 0 keeps them.

    Raises:
      ConfigError: the variant does not exist.
    """
    if variant not in EFFICIENTNETS:
        raise ConfigError(
            f"no EfficientNet {variant!r}", where="variant", hint=nearest(variant, EFFICIENTNETS)
        )
    lite = variant.startswith("lite")
    width, depth = width or EFFICIENTNETS[variant][0], depth or EFFICIENTNETS[variant][1]
    activation = "relu6" if lite else "silu"
    scaled = (lambda c: c) if lite and width >= 1 else (lambda c: divisible(width * c))
    before = stem = scaled(STEM)
    stages = []
    for index, (expansion, channels, repeats, stride, kernel) in enumerate(EFFICIENTNET):
        fixed = lite and index in (0, len(EFFICIENTNET) - 1)
        features, blocks = divisible(width * channels), []
        for block in range(repeats if fixed else math.ceil(depth * repeats)):
            blocks.append(
                BlockSpec(
                    inner=before * expansion,
                    features=features,
                    kernel_size=kernel,
                    stride=stride if block == 0 else 1,
                    squeezed=0 if lite else max(1, int(before * 0.25)),
                    activation=activation,
                    expands=expansion > 1,
                )
            )
            before = features
        stages.append(tuple(blocks))
    return Spec(stem, tuple(stages), scaled(HEAD), activation)


MOBILENET_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels, repeats and stride of each stage."""

_RE, _HS = "relu", "hard_swish"
MOBILENET_V3 = {
    # kernel, expanded channels, channels, gate, activation, stride
    "v3_large": (
        ((3, 16, 16, False, _RE, 1),),
        ((3, 64, 24, False, _RE, 2), (3, 72, 24, False, _RE, 1)),
        ((5, 72, 40, True, _RE, 2), (5, 120, 40, True, _RE, 1), (5, 120, 40, True, _RE, 1)),
        (
            (3, 240, 80, False, _HS, 2),
            (3, 200, 80, False, _HS, 1),
            (3, 184, 80, False, _HS, 1),
            (3, 184, 80, False, _HS, 1),
        ),
        ((3, 480, 112, True, _HS, 1), (3, 672, 112, True, _HS, 1)),
        ((5, 672, 160, True, _HS, 2), (5, 960, 160, True, _HS, 1), (5, 960, 160, True, _HS, 1)),
    ),
    "v3_small": (
        ((3, 16, 16, True, _RE, 2),),
        ((3, 72, 24, False, _RE, 2), (3, 88, 24, False, _RE, 1)),
        ((5, 96, 40, True, _HS, 2), (5, 240, 40, True, _HS, 1), (5, 240, 40, True, _HS, 1)),
        ((5, 120, 48, True, _HS, 1), (5, 144, 48, True, _HS, 1)),
        ((5, 288, 96, True, _HS, 2), (5, 576, 96, True, _HS, 1), (5, 576, 96, True, _HS, 1)),
    ),
}
V3_HEADS = {"v3_large": (960, 1280), "v3_small": (576, 1024)}
"""Channels of the last convolution, and units of the layer behind the pooling."""

MOBILENETS = ("v2", *MOBILENET_V3)


def mobilenet(variant: str, width: float = 1.0, depth: int = 0) -> Spec:
    """Returns a variant's table.

    Args:
      variant: one of `MOBILENETS`.
      width: multiplier of all widths.
      depth: most blocks of a stage, 0 for all.

    Raises:
      ConfigError: the variant does not exist.
    """
    if variant not in MOBILENETS:
        raise ConfigError(
            f"no MobileNet {variant!r}", where="variant", hint=nearest(variant, MOBILENETS)
        )
    stages = []
    if variant == "v2":
        before = stem = divisible(32 * width)
        for expansion, channels, repeats, stride in MOBILENET_V2:
            blocks, features = [], divisible(channels * width)
            for index in range(min(repeats, depth or repeats)):
                each = stride if index == 0 else 1
                spec = BlockSpec(expansion * before, features, 3, each, 0, "relu6", expansion > 1)
                blocks.append(spec)
                before = features
            stages.append(tuple(blocks))
        return Spec(stem, tuple(stages), divisible(1280 * max(1.0, width)), "relu6")
    stem = divisible(16 * width)
    for rows in MOBILENET_V3[variant]:
        blocks = []
        for kernel, expanded, channels, gate, activation, stride in rows[: depth or None]:
            inner, features = divisible(expanded * width), divisible(channels * width)
            squeezed = divisible(inner * 0.25) if gate else 0
            expands = bool(stages)  # the first block has no expansion
            blocks.append(BlockSpec(inner, features, kernel, stride, squeezed, activation, expands))
        stages.append(tuple(blocks))
    last, hidden = V3_HEADS[variant]
    gate = ("relu", "hard_sigmoid")
    return Spec(stem, tuple(stages), divisible(last * width), "hard_swish", gate, hidden)
