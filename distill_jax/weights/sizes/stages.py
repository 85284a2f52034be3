"""Sizes of the networks of stages that are published: ResNet, RegNet, ConvNeXt and Swin.

ResNet: He et al. 2016, arXiv:1512.03385, table 1. RegNet: Radosavovic et al. 2020,
arXiv:2003.13678. ConvNeXt: Liu et al. 2022, arXiv:2201.03545, and Woo et al. 2023,
arXiv:2301.00808. Swin: Liu et al. 2021, arXiv:2103.14030.
"""

import itertools
from typing import NamedTuple

import numpy as np

from distill_jax.weights.sizes.inverted import divisible

RESNETS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
"""Blocks of each stage."""

CONVNEXTS = {
    "atto": ((40, 80, 160, 320), (2, 2, 6, 2)),
    "femto": ((48, 96, 192, 384), (2, 2, 6, 2)),
    "pico": ((64, 128, 256, 512), (2, 2, 6, 2)),
    "nano": ((80, 160, 320, 640), (2, 2, 8, 2)),
    "tiny": ((96, 192, 384, 768), (3, 3, 9, 3)),
    "small": ((96, 192, 384, 768), (3, 3, 27, 3)),
    "base": ((128, 256, 512, 1024), (3, 3, 27, 3)),
    "large": ((192, 384, 768, 1536), (3, 3, 27, 3)),
    "xlarge": ((256, 512, 1024, 2048), (3, 3, 27, 3)),
    "huge": ((352, 704, 1408, 2816), (3, 3, 27, 3)),
}
"""Widths and blocks of each stage."""


class SwinSize(NamedTuple):
    """Width of the first stage, and blocks and attention heads of each."""

    width: int
    repeats: tuple[int, ...]
    heads: tuple[int, ...]


SWINS = {
    "tiny": SwinSize(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": SwinSize(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": SwinSize(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": SwinSize(192, (2, 2, 18, 2), (6, 12, 24, 48)),
}


class RegNetLine(NamedTuple):
    """Initial width, slope, ratio of the widths of stages, channels of a group, blocks.

    `up` is set where torchvision rounds widths to whole groups in another way than the authors.
    """

    initial: int
    slope: float
    ratio: float
    group: int
    depth: int
    up: bool = False


REGNETS = {
    "x_002": RegNetLine(24, 36.44, 2.49, 8, 13),
    "x_004": RegNetLine(24, 24.48, 2.54, 16, 22),
    "x_006": RegNetLine(48, 36.97, 2.24, 24, 16),
    "x_008": RegNetLine(56, 35.73, 2.28, 16, 16),
    "x_016": RegNetLine(80, 34.01, 2.25, 24, 18),
    "x_032": RegNetLine(88, 26.31, 2.25, 48, 25),
    "x_040": RegNetLine(96, 38.65, 2.43, 40, 23),
    "x_064": RegNetLine(184, 60.83, 2.07, 56, 17),
    "x_080": RegNetLine(80, 49.56, 2.88, 120, 23),
    "x_120": RegNetLine(168, 73.36, 2.37, 112, 19),
    "x_160": RegNetLine(216, 55.59, 2.1, 128, 22),
    "x_320": RegNetLine(320, 69.86, 2.0, 168, 23),
    "y_002": RegNetLine(24, 36.44, 2.49, 8, 13),
    "y_004": RegNetLine(48, 27.89, 2.09, 8, 16),
    "y_006": RegNetLine(48, 32.54, 2.32, 16, 15),
    "y_008": RegNetLine(56, 38.84, 2.4, 16, 14),
    "y_016": RegNetLine(48, 20.71, 2.65, 24, 27),
    "y_032": RegNetLine(80, 42.63, 2.66, 24, 21),
    "y_040": RegNetLine(96, 31.41, 2.24, 64, 22),
    "y_064": RegNetLine(112, 33.22, 2.27, 72, 25),
    "y_080": RegNetLine(192, 76.82, 2.19, 56, 17),
    "y_120": RegNetLine(168, 73.36, 2.37, 112, 19),
    "y_160": RegNetLine(200, 106.23, 2.48, 112, 18),
    "y_320": RegNetLine(232, 115.89, 2.53, 232, 20),
    "x_400mf": RegNetLine(24, 24.48, 2.54, 16, 22, up=True),
    "y_800mf": RegNetLine(56, 38.84, 2.4, 16, 14, up=True),
    "y_8gf": RegNetLine(192, 76.82, 2.19, 56, 17, up=True),
}
"""Table 7 of the paper's appendix, by flops in units of 1e8 ("002" has 2e8); the last three as in
torchvision."""


def regnet(line: RegNetLine) -> tuple[tuple[int, int, int], ...]:
    """Returns width, channels of a group and number of blocks of each stage."""
    widths = line.initial + line.slope * np.arange(line.depth)
    powers = np.round(np.log(widths / line.initial) / np.log(line.ratio))
    widths = np.round(line.initial * line.ratio**powers / 8).astype(int) * 8
    stages = []
    for width, blocks in itertools.groupby(widths.tolist()):
        group = min(line.group, width)
        whole = divisible(width, group) if line.up else max(group, round(width / group) * group)
        stages.append((whole, group, len([*blocks])))
    return tuple(stages)
