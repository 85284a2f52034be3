"""Networks of torchvision whose names differ from timm's.

Its layers are numbered members of `features`, so most rules are written out for each stage.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from distill_jax.weights.families.convnets import classes, count, regnet_variant
from distill_jax.weights.families.vits import swin_sizes, vit_kwargs
from distill_jax.weights.mapping import Family, Rule, Rules, Specs
from distill_jax.weights.sizes.inverted import (
    EFFICIENTNETS,
    BlockSpec,
    Spec,
    efficientnet,
    mobilenet,
)
from distill_jax.weights.sizes.stages import CONVNEXTS, SWINS


def _conv_norm(theirs: str, ours: str) -> Rules:
    return (
        Rule(f"{theirs}.0", ours, "conv"),
        Rule(f"{theirs}.1", f"{ours}_norm", "batch_norm"),
    )


def _spec(kwargs: Mapping[str, Any]) -> Spec:
    variant = kwargs["variant"]
    if variant in EFFICIENTNETS:
        return efficientnet(
            variant, kwargs.get("width_multiplier", 0), kwargs.get("depth_multiplier", 0)
        )
    return mobilenet(variant, kwargs.get("width_multiplier") or 1.0, kwargs.get("max_depth") or 0)


def _blocks(spec: Spec) -> Iterator[tuple[int, int, BlockSpec]]:
    for s, blocks in enumerate(spec.stages, 1):
        for b, block in enumerate(blocks):
            yield s, b, block


def _mobilenet_v2(kwargs: Mapping[str, Any]) -> Rules:
    spec = _spec(kwargs)
    blocks = list(_blocks(spec))
    rules = [*_conv_norm("features.0", "stem"), Rule("classifier.1", "head", "linear")]
    for i, (s, b, block) in enumerate(blocks, 1):
        theirs, ours, at = f"features.{i}.conv", f"stage{s}_block{b}", int(block.expands)
        if block.expands:
            rules += _conv_norm(f"{theirs}.0", f"{ours}/expand")
        rules += [
            *_conv_norm(f"{theirs}.{at}", f"{ours}/depthwise"),
            Rule(f"{theirs}.{at + 1}", f"{ours}/project", "conv"),
            Rule(f"{theirs}.{at + 2}", f"{ours}/project_norm", "batch_norm"),
        ]
    return [*rules, *_conv_norm(f"features.{len(blocks) + 1}", "last")]


def _inverted(theirs: str, ours: str, block: BlockSpec) -> Rules:
    """The parts of a block of MobileNetV3 and EfficientNet, in order; some are absent."""
    parts = ["expand"] * block.expands + ["depthwise"] + ["gate"] * (block.squeezed > 0)
    rules = []
    for i, part in enumerate([*parts, "project"]):
        if part == "gate":
            rules += [
                Rule(f"{theirs}.{i}.fc1", f"{ours}/gate/reduce", "pointwise"),
                Rule(f"{theirs}.{i}.fc2", f"{ours}/gate/expand", "pointwise"),
            ]
        else:
            rules += _conv_norm(f"{theirs}.{i}", f"{ours}/{part}")
    return rules


def _mobilenet_v3(kwargs: Mapping[str, Any]) -> Rules:
    blocks = list(_blocks(_spec(kwargs)))
    rules = [
        *_conv_norm("features.0", "stem"),
        Rule("classifier.0", "hidden", "linear"),
        Rule("classifier.3", "head", "linear"),
    ]
    for i, (s, b, block) in enumerate(blocks, 1):
        rules += _inverted(f"features.{i}.block", f"stage{s}_block{b}", block)
    return [*rules, *_conv_norm(f"features.{len(blocks) + 1}", "last")]


def _efficientnet(kwargs: Mapping[str, Any]) -> Rules:
    spec = _spec(kwargs)
    rules = [*_conv_norm("features.0", "stem"), Rule("classifier.1", "head", "linear")]
    for s, b, block in _blocks(spec):
        rules += _inverted(f"features.{s}.{b}.block", f"stage{s}_block{b}", block)
    return [*rules, *_conv_norm(f"features.{len(spec.stages) + 1}", "last")]


def _described(
    rules: Callable[[Mapping[str, Any]], Rules], variants: Sequence[str], head: str
) -> Callable[[Specs], Mapping[str, Any]]:
    """Returns a description: the variant whose blocks and last convolution have these widths."""

    def describe(specs: Specs) -> Mapping[str, Any]:
        for variant in variants:
            spec = _spec({"variant": variant})
            widths = {f"stage{s}_block{b}/project": x.features for s, b, x in _blocks(spec)}
            widths["last"] = spec.head
            names = {r.target: f"{r.source}.weight" for r in rules({"variant": variant})}
            if all(
                n in specs and specs[n].shape[0] == widths[t]
                for t, n in names.items()
                if t in widths
            ):
                wide = variant in ("b5", "b6", "b7") or variant.startswith("v3")
                return {
                    "variant": variant,
                    "padding": "symmetric",
                    "epsilon": 1e-3 if wide else 1e-5,
                    **classes(specs, head),
                }
        raise ValueError("no variant has these widths and depths")

    return describe


_TRUNK = "trunk_output.block{s}.block{s}-{b}"


def _describe_regnet(specs: Specs) -> Mapping[str, Any]:
    block = "trunk_output.block{s}.block{s}-"
    places = [block.format(s=s) for s in range(1, 5)]
    widths = [specs[f"{place}0.f.c.0.weight"].shape[0] for place in places]
    blocks = [count(specs, place) for place in places]
    front = "y_" if f"{places[0]}0.f.se.fc1.weight" in specs else "x_"
    return {"variant": regnet_variant(front, widths, blocks), **classes(specs, "fc.weight")}


def _convnext(kwargs: Mapping[str, Any]) -> Rules:
    rules = [
        Rule("features.0.0", "stem/patches", "patches", {"patch_size": 4}),
        Rule("features.0.1", "stem_norm", "norm"),
        Rule("classifier.0", "norm", "norm"),
        Rule("classifier.2", "head", "linear"),
    ]
    for s in range(1, 5):
        down, block, to = (
            f"features.{2 * s - 2}",
            f"features.{2 * s - 1}.{{b}}",
            f"stage{s}_block{{b}}",
        )
        if s > 1:
            rules += [
                Rule(f"{down}.0", f"stage{s}_norm", "norm"),
                Rule(f"{down}.1", f"stage{s}_down/patches", "patches", {"patch_size": 2}),
            ]
        rules += [
            Rule(f"{block}.block.0", f"{to}/depthwise", "conv"),
            Rule(f"{block}.block.2", f"{to}/norm", "norm"),
            Rule(f"{block}.block.3", f"{to}/expand", "linear"),
            Rule(f"{block}.block.5", f"{to}/project", "linear"),
            Rule(f"{block}.layer_scale", f"{to}/gain", "column"),
        ]
    return rules


def _describe_convnext(specs: Specs) -> Mapping[str, Any]:
    stages = [f"features.{2 * s + 1}." for s in range(4)]
    widths = tuple(specs[f"{stage}0.block.0.bias"].shape[0] for stage in stages)
    repeats = tuple(count(specs, stage) for stage in stages)
    for variant, shape in CONVNEXTS.items():
        if shape == (widths, repeats):
            return {"variant": variant, "version": 1, **classes(specs, "classifier.2.weight")}
    raise ValueError(f"no ConvNeXt has the widths {widths} and {repeats} blocks")


_LAYER, _BLOCK = "encoder.layers.encoder_layer_{i}", "Block_{i}"
_VIT = (
    Rule("class_token", "cls"),
    Rule("encoder.pos_embedding", "positions", "positions"),
    Rule("conv_proj", "patches", "patches"),
    Rule(f"{_LAYER}.ln_{{n+1}}", f"{_BLOCK}/LayerNorm_{{n}}", "norm"),
    *(
        Rule(
            f"{_LAYER}.self_attention.in_proj_{theirs}",
            f"{_BLOCK}/Attention_0/Dense_0/{ours}",
            f"qkv_{ours}",
        )
        for theirs, ours in (("weight", "kernel"), ("bias", "bias"))
    ),
    Rule(f"{_LAYER}.self_attention.out_proj", f"{_BLOCK}/Attention_0/Dense_1", "linear"),
    Rule(f"{_LAYER}.mlp.0", f"{_BLOCK}/Dense_0", "linear"),
    Rule(f"{_LAYER}.mlp.3", f"{_BLOCK}/Dense_1", "linear"),
    Rule(f"{_LAYER}.mlp.linear_{{n+1}}", f"{_BLOCK}/Dense_{{n}}", "linear"),  # of earlier files
    Rule("encoder.ln", "LayerNorm_0", "norm"),
    Rule("heads.head", "Dense_0", "linear"),
)


def _describe_vit(specs: Specs) -> Mapping[str, Any]:
    first = "encoder.layers.encoder_layer_0.mlp"
    hidden = "0" if f"{first}.0.weight" in specs else "linear_1"
    return vit_kwargs(
        specs,
        cls="class_token",
        positions="encoder.pos_embedding",
        patches="conv_proj.weight",
        hidden=f"{first}.{hidden}.weight",
        depth=count(specs, "encoder.layers.encoder_layer_"),
        head="heads.head.weight",
    )


def _swin(kwargs: Mapping[str, Any]) -> Rules:
    known = SWINS[kwargs.get("variant", "tiny")]
    rules = [
        Rule("features.0.0", "stem/patches", "patches", {"patch_size": 4}),
        Rule("features.0.2", "stem_norm", "norm"),
        Rule("norm", "norm", "norm"),
        Rule("head", "head", "linear"),
    ]
    for s, heads in enumerate(kwargs.get("heads") or known.heads, 1):
        merge, block, to = (
            f"features.{2 * s - 2}",
            f"features.{2 * s - 1}.{{b}}",
            f"stage{s}_block{{b}}",
        )
        if s > 1:
            rules += [
                Rule(f"{merge}.norm", f"stage{s}_norm", "norm"),
                Rule(f"{merge}.reduction", f"stage{s}_merge", "linear"),
            ]
        table = "relative_position_bias_table"
        rules += [
            Rule(f"{block}.attn.qkv", f"{to}/attention/qkv", "qkv", {"heads": heads}),
            Rule(f"{block}.attn.{table}", f"{to}/attention/relative_positions"),
            Rule(f"{block}.attn.proj", f"{to}/attention/project", "linear"),
            Rule(f"{block}.norm{{n}}", f"{to}/norm{{n}}", "norm"),
            Rule(f"{block}.mlp.0", f"{to}/expand", "linear"),
            Rule(f"{block}.mlp.3", f"{to}/project", "linear"),
        ]
    return rules


def _describe_swin(specs: Specs) -> Mapping[str, Any]:
    stages = range(sum(f"features.{2 * s + 1}.0.norm1.weight" in specs for s in range(4)))
    tables = [
        specs[f"features.{2 * s + 1}.0.attn.relative_position_bias_table"].shape for s in stages
    ]
    repeats = tuple(count(specs, f"features.{2 * s + 1}.") for s in stages)
    width = specs["features.0.0.weight"].shape[0]
    return {**swin_sizes(width, repeats, tables), **classes(specs, "head.weight")}


def _family(name: str, model: str, **parts: Any) -> Family:
    return Family(name=f"{name}/torchvision", model=model, first=parts["signature"][0], **parts)


_FIRST = "features.0.0.weight"

FAMILIES = (
    _family(
        "mobilenet-v2",
        "mobilenet",
        rules=_mobilenet_v2,
        signature=(_FIRST, "features.1.conv.0.0.weight"),
        describe=_described(_mobilenet_v2, ("v2",), "classifier.1.weight"),
    ),
    _family(
        "mobilenet-v3",
        "mobilenet",
        rules=_mobilenet_v3,
        signature=(_FIRST, "features.1.block.0.0.weight"),
        describe=_described(_mobilenet_v3, ("v3_large", "v3_small"), "classifier.3.weight"),
    ),
    _family(
        "efficientnet",
        "efficientnet",
        rules=_efficientnet,
        signature=(_FIRST, "features.1.0.block.0.0.weight"),
        describe=_described(_efficientnet, [f"b{i}" for i in range(8)], "classifier.1.weight"),
    ),
    _family(
        "regnet",
        "regnet",
        rules=(
            *_conv_norm("stem", "stem"),
            *(
                rule
                for c, part in enumerate("abc", 1)
                for rule in (
                    Rule(f"{_TRUNK}.f.{part}.0", f"stage{{s}}_block{{b}}/conv{c}", "conv"),
                    Rule(f"{_TRUNK}.f.{part}.1", f"stage{{s}}_block{{b}}/norm{c}", "batch_norm"),
                )
            ),
            Rule(f"{_TRUNK}.f.se.fc1", "stage{s}_block{b}/gate/reduce", "pointwise"),
            Rule(f"{_TRUNK}.f.se.fc2", "stage{s}_block{b}/gate/expand", "pointwise"),
            *_conv_norm(f"{_TRUNK}.proj", "stage{s}_block{b}/shortcut"),
            Rule("fc", "head", "linear"),
        ),
        signature=("stem.0.weight", "trunk_output.block1.block1-0.proj.0.weight"),
        describe=_describe_regnet,
    ),
    _family(
        "convnext",
        "convnext",
        rules=_convnext,
        signature=(_FIRST, "features.1.0.layer_scale"),
        describe=_describe_convnext,
    ),
    _family(
        "vit",
        "vit",
        rules=_VIT,
        signature=("conv_proj.weight", "class_token", "encoder.pos_embedding"),
        describe=_describe_vit,
        head=("Dense_0",),
    ),
    _family(
        "swin",
        "swin",
        rules=_swin,
        signature=(_FIRST, "features.1.0.attn.qkv.weight"),
        describe=_describe_swin,
        ignored=(r".*\.relative_position_index",),
    ),
)
