"""EfficientNet, MobileNetV2 and MobileNetV3: networks of inverted residual blocks."""

from collections.abc import Mapping
from typing import Any

from distill_jax.weights.families.convnets import classes
from distill_jax.weights.mapping import Family, Rule, Rules, Specs
from distill_jax.weights.sizes.inverted import (
    EFFICIENTNETS,
    MOBILENETS,
    Spec,
    efficientnet,
    mobilenet,
)


def _timm(kwargs: Mapping[str, Any]) -> Rules:
    block, first = "blocks.{s}.{b}", "blocks.0.{b}"
    to, to_first = "stage{s+1}_block{b}", "stage1_block{b}"
    return (
        Rule("conv_stem", "stem", "conv"),
        Rule("bn1", "stem_norm", "batch_norm"),
        # the first stage has no expansion, and its names are those of another class
        Rule(f"{first}.conv_dw", f"{to_first}/depthwise", "conv"),
        Rule(f"{first}.bn1", f"{to_first}/depthwise_norm", "batch_norm"),
        Rule(f"{first}.conv_pw", f"{to_first}/project", "conv"),
        Rule(f"{first}.bn2", f"{to_first}/project_norm", "batch_norm"),
        Rule(f"{block}.conv_pw", f"{to}/expand", "conv"),
        Rule(f"{block}.bn1", f"{to}/expand_norm", "batch_norm"),
        Rule(f"{block}.conv_dw", f"{to}/depthwise", "conv"),
        Rule(f"{block}.bn2", f"{to}/depthwise_norm", "batch_norm"),
        Rule(f"{block}.conv_pwl", f"{to}/project", "conv"),
        Rule(f"{block}.bn3", f"{to}/project_norm", "batch_norm"),
        Rule(f"{block}.se.conv_{{part=reduce|expand}}", f"{to}/gate/{{part}}", "pointwise"),
        # the last convolution of MobileNetV3 is a stage of its own, and its hidden layer is one
        *_last_of_timm(kwargs),
        Rule("classifier", "head", "linear"),
    )


def _last_of_timm(kwargs: Mapping[str, Any]) -> Rules:
    if not kwargs["variant"].startswith("v3"):
        return (Rule("conv_head", "last", "conv"), Rule("bn2", "last_norm", "batch_norm"))
    last = f"blocks.{len(_spec(kwargs).stages)}.0"
    return (
        Rule(f"{last}.conv", "last", "conv"),
        Rule(f"{last}.bn1", "last_norm", "batch_norm"),
        Rule("conv_head", "hidden", "pointwise"),
    )


def _spec(kwargs: Mapping[str, Any]) -> Spec:
    make = efficientnet if kwargs["variant"] in EFFICIENTNETS else mobilenet
    return make(kwargs["variant"], kwargs.get("width_multiplier") or 1.0)


def _flat(kwargs: Mapping[str, Any]) -> Rules:
    """Names of `efficientnet_pytorch`: blocks are numbered through."""
    spec = efficientnet(
        kwargs["variant"], kwargs.get("width_multiplier", 0), kwargs.get("depth_multiplier", 0)
    )
    places = [(s, b) for s, blocks in enumerate(spec.stages, 1) for b in range(len(blocks))]
    rules = [
        Rule("_conv_stem", "stem", "conv"),
        Rule("_bn0", "stem_norm", "batch_norm"),
        Rule("_conv_head", "last", "conv"),
        Rule("_bn1", "last_norm", "batch_norm"),
        Rule("_fc", "head", "linear"),
    ]
    for index, (s, b) in enumerate(places):
        theirs, ours = f"_blocks.{index}", f"stage{s}_block{b}"
        rules += [
            Rule(f"{theirs}._{{p=expand|depthwise|project}}_conv", f"{ours}/{{p}}", "conv"),
            Rule(f"{theirs}._bn0", f"{ours}/expand_norm", "batch_norm"),
            Rule(f"{theirs}._bn1", f"{ours}/depthwise_norm", "batch_norm"),
            Rule(f"{theirs}._bn2", f"{ours}/project_norm", "batch_norm"),
            Rule(f"{theirs}._se_{{p=reduce|expand}}", f"{ours}/gate/{{p}}", "pointwise"),
        ]
    return rules


def _shape(spec: Spec) -> tuple:
    return (
        spec.stem,
        [len(blocks) for blocks in spec.stages],
        [blocks[-1].features for blocks in spec.stages],
        bool(spec.stages[-2][0].squeezed),
    )


def _chosen(shape: tuple, make: Any) -> str:
    for variant in EFFICIENTNETS if make is efficientnet else MOBILENETS:
        if _shape(make(variant)) == shape:
            return variant
    raise ValueError(f"no variant has the widths and depths {shape}")


def _describe_flat(specs: Specs) -> Mapping[str, Any]:
    count = 1 + max(int(name.split(".")[1]) for name in specs if name.startswith("_blocks."))
    widths = [specs[f"_blocks.{i}._project_conv.weight"].shape[0] for i in range(count)]
    gates = any("._se_reduce." in name for name in specs)
    for variant in EFFICIENTNETS:
        spec = efficientnet(variant)
        blocks = [block for stage in spec.stages for block in stage]
        if [b.features for b in blocks] == widths and bool(blocks[0].squeezed) == gates:
            return {"variant": variant, **classes(specs, "_fc.weight")}
    raise ValueError(f"no variant has the widths {widths}")


def _describe_timm(make: Any):
    def describe(specs: Specs) -> Mapping[str, Any]:
        counts: dict[int, int] = {}
        for name in specs:
            if name.startswith("blocks."):
                stage, block = map(int, name.split(".")[1:3])
                counts[stage] = max(counts.get(stage, 0), block + 1)
        stages = sorted(counts)
        if f"blocks.{stages[-1]}.0.conv.weight" in specs:
            stages.pop()
        if stages != [*range(len(stages))]:
            raise ValueError(f"stages {stages}")
        widths = []
        for stage in stages:
            last = f"blocks.{stage}.{counts[stage] - 1}"
            project = "conv_pwl" if f"{last}.conv_pwl.weight" in specs else "conv_pw"
            widths.append(specs[f"{last}.{project}.weight"].shape[0])
        gate = f"blocks.{stages[-2]}.0.se.conv_reduce.weight" in specs
        stem = specs["conv_stem.weight"].shape[0]
        shape = (stem, [counts[stage] for stage in stages], widths, gate)
        kwargs = {"variant": _chosen(shape, make), **classes(specs, "classifier.weight")}
        # of networks that timm trained; those that it took from TensorFlow are told by their config
        return kwargs | {"padding": "symmetric", "epsilon": 1e-5}

    return describe


_TIMM: dict[str, Any] = {
    "rules": _timm,
    "signature": ("conv_stem.weight", "bn1.weight", "blocks.0.0.conv_dw.weight"),
    "first": "conv_stem.weight",
}

FAMILIES = (
    Family(
        name="efficientnet/timm",
        model="efficientnet",
        describe=_describe_timm(efficientnet),
        **_TIMM,
    ),
    Family(name="mobilenet/timm", model="mobilenet", describe=_describe_timm(mobilenet), **_TIMM),
    Family(
        name="efficientnet/efficientnet-pytorch",
        model="efficientnet",
        rules=_flat,
        signature=("_conv_stem.weight", "_bn0.weight", "_blocks.0._depthwise_conv.weight"),
        describe=_describe_flat,
        first="_conv_stem.weight",
    ),
)
