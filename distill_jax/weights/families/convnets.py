"""ResNet (and ResNet-D), RegNet and ConvNeXt."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distill_jax.weights.mapping import Family, Rule, Rules, Specs
from distill_jax.weights.sizes.stages import CONVNEXTS, REGNETS, RESNETS, regnet


def classes(specs: Specs, name: str) -> dict[str, int]:
    """Returns the number of classes of a last layer, 0 where it was left out."""
    return {"num_classes": specs[name].shape[0] if name in specs else 0}


def count(specs: Iterable[str], before: str) -> int:
    """Returns how many numbers follow a part of a name, such as blocks that follow `blocks.`."""
    indices = {n.removeprefix(before).split(".")[0] for n in specs if n.startswith(before)}
    return 1 + max((int(number) for number in indices if number.isdigit()), default=-1)


def _resnet(kwargs: Mapping[str, Any]) -> Rules:
    """Blocks are numbered through here, and by stages there."""
    basic = kwargs["variant"] in ("resnet18", "resnet34")
    repeats = RESNETS[kwargs["variant"]]
    depth = kwargs.get("max_depth") or max(repeats)
    class_name, last = ("Block", 2) if basic else ("Bottleneck", 3)
    # behind an average, the shortcut's convolution is the second of its parts
    conv = 1 if kwargs.get("shortcut") == "average" else 0
    rules = [Rule("fc", "Dense_0", "linear"), Rule("bn1", "BatchNorm_0", "batch_norm")]
    if kwargs.get("stem") == "deep":
        rules = [
            Rule("fc", "Dense_0", "linear"),
            Rule("conv1.0", "Conv_0", "conv"),
            Rule("conv1.1", "BatchNorm_0", "batch_norm"),
            Rule("conv1.3", "Conv_1", "conv"),
            Rule("conv1.4", "BatchNorm_1", "batch_norm"),
            Rule("conv1.6", "Conv_2", "conv"),
            Rule("bn1", "BatchNorm_2", "batch_norm"),
        ]
    else:
        rules += [Rule("conv1", "Conv_0", "conv")]
    index = 0
    for stage, blocks in enumerate(repeats, 1):
        for block in range(min(blocks, depth)):
            theirs, ours = f"layer{stage}.{block}", f"{class_name}_{index}"
            rules += [
                Rule(f"{theirs}.downsample.{conv}", f"{ours}/Conv_{last}", "conv"),
                Rule(f"{theirs}.downsample.{conv + 1}", f"{ours}/BatchNorm_{last}", "batch_norm"),
                Rule(f"{theirs}.conv{{c+1}}", f"{ours}/Conv_{{c}}", "conv"),
                Rule(f"{theirs}.bn{{c+1}}", f"{ours}/BatchNorm_{{c}}", "batch_norm"),
            ]
            index += 1
    return rules


def _describe_resnet(specs: Specs) -> Mapping[str, Any]:
    deep = "conv1.0.weight" in specs
    average = "layer2.0.downsample.2.weight" in specs
    repeats = tuple(count(specs, f"layer{stage}.") for stage in range(1, 5))
    basic = "layer1.0.conv3.weight" not in specs
    variants = RESNETS.items()
    fitting = [v for v, n in variants if n == repeats and basic == (v in ("resnet18", "resnet34"))]
    if not fitting:
        raise ValueError(f"no ResNet has {repeats} blocks")
    stem = specs["conv1.0.weight" if deep else "conv1.weight"]
    small = not deep and stem.shape[-1] == 3
    return {
        "variant": fitting[0],
        "width": specs["layer1.0.conv1.weight"].shape[0],
        "stem": "deep" if deep else "small" if small else "imagenet",
        "shortcut": "average" if average else "conv",
        **classes(specs, "fc.weight"),
    }


def _describe_regnet(specs: Specs) -> Mapping[str, Any]:
    widths = [specs[f"s{s}.b1.conv3.conv.weight"].shape[0] for s in range(1, 5)]
    # blocks are numbered from 1 there
    blocks = [count(specs, f"s{s}.b") - 1 for s in range(1, 5)]
    front = "y_" if "s1.b1.se.fc1.weight" in specs else "x_"
    return {"variant": regnet_variant(front, widths, blocks), **classes(specs, "head.fc.weight")}


def regnet_variant(front: str, widths: Sequence[int], blocks: Sequence[int]) -> str:
    """Returns the RegNet "x_" or "y_" with these widths and blocks."""
    for variant, line in REGNETS.items():
        stages = regnet(line)
        same = [w for w, _, _ in stages] == widths and [n for _, _, n in stages] == blocks
        if variant.startswith(front) and same:
            return variant
    raise ValueError(f"no RegNet has the widths {widths}")


_POINTWISE = ("atto", "femto", "pico", "nano")
"""Variants whose perceptrons are 1x1 convolutions in timm."""


def _convnext(kwargs: Mapping[str, Any]) -> Rules:
    dense = "pointwise" if kwargs["variant"] in _POINTWISE else "linear"
    block, to = "stages.{s}.blocks.{b}", "stage{s+1}_block{b}"
    return (
        Rule("stem.0", "stem/patches", "patches", {"patch_size": 4}),
        Rule("stem.1", "stem_norm", "norm"),
        Rule("stages.{s}.downsample.0", "stage{s+1}_norm", "norm"),
        Rule("stages.{s}.downsample.1", "stage{s+1}_down/patches", "patches", {"patch_size": 2}),
        Rule(f"{block}.conv_dw", f"{to}/depthwise", "conv"),
        Rule(f"{block}.norm", f"{to}/norm", "norm"),
        Rule(f"{block}.mlp.fc1", f"{to}/expand", dense),
        Rule(f"{block}.mlp.grn", f"{to}/response_norm", "norm"),
        Rule(f"{block}.mlp.fc2", f"{to}/project", dense),
        Rule(f"{block}.gamma", f"{to}/gain"),
        Rule("head.norm", "norm", "norm"),
        Rule("head.fc", "head", "linear"),
    )


def _describe_convnext(specs: Specs) -> Mapping[str, Any]:
    widths = tuple(specs[f"stages.{s}.blocks.0.conv_dw.bias"].shape[0] for s in range(4))
    repeats = tuple(count(specs, f"stages.{s}.blocks.") for s in range(4))
    for variant, shape in CONVNEXTS.items():
        pointwise = len(specs["stages.0.blocks.0.mlp.fc1.weight"].shape) == 4
        if shape == (widths, repeats) and pointwise == (variant in _POINTWISE):
            version = 2 if "stages.0.blocks.0.mlp.grn.weight" in specs else 1
            return {"variant": variant, "version": version, **classes(specs, "head.fc.weight")}
    raise ValueError(f"no ConvNeXt has the widths {widths} and {repeats} blocks")


FAMILIES = (
    Family(
        name="resnet/torchvision",
        model="resnet_four_stages",
        rules=_resnet,
        signature=("conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer4.0.conv2.weight"),
        describe=_describe_resnet,
        head=("Dense_0",),
        first="conv1.weight",
    ),
    Family(
        name="resnet-d/timm",
        model="resnet_four_stages",
        rules=_resnet,
        signature=("conv1.0.weight", "bn1.weight", "layer1.0.conv1.weight"),
        describe=_describe_resnet,
        head=("Dense_0",),
        first="conv1.0.weight",
    ),
    Family(
        name="regnet/timm",
        model="regnet",
        rules=(
            Rule("stem.conv", "stem", "conv"),
            Rule("stem.bn", "stem_norm", "batch_norm"),
            Rule("s{s}.b{b+1}.conv{c}.conv", "stage{s}_block{b}/conv{c}", "conv"),
            Rule("s{s}.b{b+1}.conv{c}.bn", "stage{s}_block{b}/norm{c}", "batch_norm"),
            Rule("s{s}.b{b+1}.se.fc1", "stage{s}_block{b}/gate/reduce", "pointwise"),
            Rule("s{s}.b{b+1}.se.fc2", "stage{s}_block{b}/gate/expand", "pointwise"),
            Rule("s{s}.b{b+1}.downsample.conv", "stage{s}_block{b}/shortcut", "conv"),
            Rule("s{s}.b{b+1}.downsample.bn", "stage{s}_block{b}/shortcut_norm", "batch_norm"),
            Rule("head.fc", "head", "linear"),
        ),
        signature=("stem.conv.weight", "s1.b1.conv1.conv.weight"),
        describe=_describe_regnet,
        first="stem.conv.weight",
    ),
    Family(
        name="convnext/timm",
        model="convnext",
        rules=_convnext,
        signature=("stem.0.weight", "stages.0.blocks.0.conv_dw.weight"),
        describe=_describe_convnext,
        first="stem.0.weight",
    ),
)
