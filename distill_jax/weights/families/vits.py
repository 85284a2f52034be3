"""Vision transformers: ViT, DeiT and DINOv2 of timm and of transformers, and Swin."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from distill_jax.weights.families.convnets import classes, count
from distill_jax.weights.mapping import Family, Rule, Rules, Specs
from distill_jax.weights.sizes.stages import SWINS

_VIT = (
    Rule("cls_token", "cls"),
    Rule("dist_token", "distilled"),
    Rule("reg_token", "registers"),
    Rule("pos_embed", "positions", "positions"),
    Rule("patch_embed.proj", "patches", "patches"),
    Rule("blocks.{i}.norm{n+1}", "Block_{i}/LayerNorm_{n}", "norm"),
    Rule("blocks.{i}.attn.qkv", "Block_{i}/Attention_0/Dense_0", "qkv"),
    Rule("blocks.{i}.attn.proj", "Block_{i}/Attention_0/Dense_1", "linear"),
    Rule("blocks.{i}.ls{n}.gamma", "Block_{i}/gain{n}"),
    Rule("blocks.{i}.mlp.fc{n+1}", "Block_{i}/Dense_{n}", "linear"),
    Rule("norm", "LayerNorm_0", "norm"),
    Rule("head", "Dense_0", "linear"),
    Rule("head_dist", "head_distilled", "linear"),
)


def vit_kwargs(
    specs: Specs, *, cls: str, positions: str, patches: str, hidden: str, depth: int, head: str
) -> dict[str, Any]:
    """Returns what all kinds of files tell; heads are 64 wide, as in all published networks."""
    width = specs[cls].shape[-1]
    return {
        "variant": "base",
        "width": width,
        "depth": depth,
        "heads": max(1, width // 64),
        "mlp_ratio": specs[hidden].shape[0] // width,
        "patch_size": specs[patches].shape[-1],
        "gelu": "exact",
        **_positions(specs[positions].shape[1]),
        **classes(specs, head),
    }


def _positions(number: int) -> dict[str, Any]:
    """Returns whether a square of positions has one for the class tokens before it."""
    square = math.isqrt(number) ** 2 == number
    return {"class_position": not square}


def _describe_vit(specs: Specs) -> Mapping[str, Any]:
    kwargs = vit_kwargs(
        specs,
        cls="cls_token",
        positions="pos_embed",
        patches="patch_embed.proj.weight",
        hidden="blocks.0.mlp.fc1.weight",
        depth=count(specs, "blocks."),
        head="head.weight",
    )
    if "dist_token" in specs:
        kwargs |= {"distilled": True, "class_position": True}
    if "reg_token" in specs:
        kwargs |= {"registers": specs["reg_token"].shape[1]}
    if "blocks.0.ls1.gamma" in specs:
        kwargs |= {"layer_scale": 1e-5}
    return kwargs


def _parts(name: str, parts: tuple[str, ...] = ("query", "key", "value")) -> tuple[str, ...]:
    return tuple(f"{name}.{part}" for part in parts)


def _transformers(name: str, kind: str, front: str) -> Family:
    """Returns the table of a kind of network whose names begin with `front`."""
    layer, block = f"{front}encoder.layer.{{i}}", "Block_{i}"
    dino = kind == "dinov2"
    inner = (
        (
            Rule(f"{layer}.norm{{n+1}}", f"{block}/LayerNorm_{{n}}", "norm"),
            Rule(f"{layer}.layer_scale{{n}}.lambda1", f"{block}/gain{{n}}"),
            Rule(f"{layer}.mlp.fc{{n+1}}", f"{block}/Dense_{{n}}", "linear"),
        )
        if dino
        else (
            Rule(f"{layer}.layernorm_before", f"{block}/LayerNorm_0", "norm"),
            Rule(f"{layer}.layernorm_after", f"{block}/LayerNorm_1", "norm"),
            Rule(f"{layer}.intermediate.dense", f"{block}/Dense_0", "linear"),
            Rule(f"{layer}.output.dense", f"{block}/Dense_1", "linear"),
        )
    )
    rules = (
        Rule(f"{front}embeddings.cls_token", "cls"),
        Rule(f"{front}embeddings.distillation_token", "distilled"),
        Rule(f"{front}embeddings.register_tokens", "registers"),
        Rule(f"{front}embeddings.position_embeddings", "positions", "positions"),
        Rule(f"{front}embeddings.patch_embeddings.projection", "patches", "patches"),
        *inner,
        Rule(_parts(f"{layer}.attention.attention"), f"{block}/Attention_0/Dense_0", "qkv"),
        Rule(f"{layer}.attention.output.dense", f"{block}/Attention_0/Dense_1", "linear"),
        Rule(f"{front}layernorm", "LayerNorm_0", "norm"),
        Rule("cls_classifier" if kind == "deit" else "classifier", "Dense_0", "linear"),
        Rule("distillation_classifier", "head_distilled", "linear"),
    )
    hidden = "mlp.fc1" if dino else "intermediate.dense"

    def describe(specs: Specs) -> Mapping[str, Any]:
        kwargs = vit_kwargs(
            specs,
            cls=f"{front}embeddings.cls_token",
            positions=f"{front}embeddings.position_embeddings",
            patches=f"{front}embeddings.patch_embeddings.projection.weight",
            hidden=f"{front}encoder.layer.0.{hidden}.weight",
            depth=count(specs, f"{front}encoder.layer."),
            head="cls_classifier.weight" if kind == "deit" else "classifier.weight",
        )
        if f"{front}embeddings.distillation_token" in specs:
            kwargs |= {"distilled": True, "class_position": True}
        if f"{front}embeddings.register_tokens" in specs:
            kwargs |= {"registers": specs[f"{front}embeddings.register_tokens"].shape[1]}
        if dino:
            # a classifier of transformers also sees the mean of the patches, which is no part here
            return kwargs | {"layer_scale": 1.0, "num_classes": 0}
        return kwargs | {"epsilon": 1e-12}

    return Family(
        name=f"{name}/transformers",
        model="vit",
        rules=rules,
        signature=(
            f"{front}embeddings.cls_token",
            f"{front}embeddings.patch_embeddings.projection.weight",
            f"{front}encoder.layer.0.{hidden}.weight",
        ),
        describe=describe,
        head=("Dense_0", "head_distilled"),
        first=f"{front}embeddings.patch_embeddings.projection.weight",
        ignored=(
            rf"{front}embeddings\.mask_token",
            r"(.*\.)?pooler\.dense\.(weight|bias)",
            *((r"classifier\.(weight|bias)",) if dino else ()),
        ),
    )


def _describe_swin(specs: Specs) -> Mapping[str, Any]:
    stages = range(count(specs, "layers."))
    tables = "layers.{}.blocks.0.attn.relative_position_bias_table"
    repeats = tuple(count(specs, f"layers.{s}.blocks.") for s in stages)
    width = specs["patch_embed.proj.weight"].shape[0]
    shapes = [specs[tables.format(s)].shape for s in stages]
    return {**swin_sizes(width, repeats, shapes), **classes(specs, "head.fc.weight")}


def swin_sizes(
    width: int, repeats: tuple[int, ...], tables: Sequence[tuple[int, ...]]
) -> dict[str, Any]:
    """Returns the arguments of a Swin, from the shapes of its tables of relative positions."""
    heads = tuple(shape[1] for shape in tables)
    fitting = [v for v, size in SWINS.items() if size == (width, repeats, heads)]
    sizes = {"variant": fitting[0]} if fitting else {}
    if not fitting:
        sizes = {"variant": "tiny", "width": width, "repeats": repeats, "heads": heads}
    return {**sizes, "window": (math.isqrt(tables[0][0]) + 1) // 2}


def _swin(kwargs: Mapping[str, Any]) -> Rules:
    """Query, key and value are split by as many heads as the stage has."""
    known = SWINS[kwargs.get("variant", "tiny")]
    attention = [
        Rule(
            f"layers.{s}.blocks.{{b}}.attn.qkv",
            f"stage{s + 1}_block{{b}}/attention/qkv",
            "qkv",
            {"heads": n},
        )
        for s, n in enumerate(kwargs.get("heads") or known.heads)
    ]
    block, to = "layers.{s}.blocks.{b}", "stage{s+1}_block{b}"
    return (
        Rule("patch_embed.proj", "stem/patches", "patches", {"patch_size": 4}),
        Rule("patch_embed.norm", "stem_norm", "norm"),
        *attention,
        Rule(f"{block}.attn.relative_position_bias_table", f"{to}/attention/relative_positions"),
        Rule(f"{block}.attn.proj", f"{to}/attention/project", "linear"),
        Rule(f"{block}.norm{{n}}", f"{to}/norm{{n}}", "norm"),
        Rule(f"{block}.mlp.fc1", f"{to}/expand", "linear"),
        Rule(f"{block}.mlp.fc2", f"{to}/project", "linear"),
        Rule("layers.{s}.downsample.norm", "stage{s+1}_norm", "norm"),
        Rule("layers.{s}.downsample.reduction", "stage{s+1}_merge", "linear"),
        Rule("norm", "norm", "norm"),
        Rule("head.fc", "head", "linear"),
    )


FAMILIES = (
    Family(
        name="vit/timm",
        model="vit",
        rules=_VIT,
        signature=("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
        describe=_describe_vit,
        head=("Dense_0", "head_distilled"),
        first="patch_embed.proj.weight",
        ignored=("mask_token",),
    ),
    _transformers("vit", "vit", "vit."),
    _transformers("vit-headless", "vit", ""),
    _transformers("deit", "deit", "deit."),
    _transformers("dinov2", "dinov2", "dinov2."),
    _transformers("dinov2-registers", "dinov2", "dinov2_with_registers."),
    _transformers("dinov2-headless", "dinov2", ""),
    Family(
        name="swin/timm",
        model="swin",
        rules=_swin,
        signature=("patch_embed.proj.weight", "layers.0.blocks.0.attn.qkv.weight"),
        describe=_describe_swin,
        first="patch_embed.proj.weight",
        ignored=(r".*\.(attn_mask|relative_position_index)",),
    ),
)
