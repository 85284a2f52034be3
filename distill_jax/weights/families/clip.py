"""The image tower of CLIP (Radford et al. 2021, arXiv:2103.00020) by the names of transformers."""

from collections.abc import Mapping
from typing import Any

from distill_jax.weights.families.convnets import count
from distill_jax.weights.mapping import Family, Rule, Specs


def _tower(name: str, front: str) -> Family:
    """Returns the table of a tower whose names begin with `front`."""
    layer, block = f"{front}encoder.layers.{{i}}", "Block_{i}"
    table = f"{front}embeddings.position_embedding.weight"
    patches = f"{front}embeddings.patch_embedding"
    rules = (
        Rule(f"{front}embeddings.class_embedding", "cls", "vector"),
        Rule(table, "positions", "position_table"),
        Rule(patches, "patches", "patches"),
        # spelled so in the published files
        Rule(f"{front}pre_layrnorm", "pre_norm", "norm"),
        Rule(f"{layer}.layer_norm{{n+1}}", f"{block}/LayerNorm_{{n}}", "norm"),
        Rule(
            tuple(f"{layer}.self_attn.{part}_proj" for part in "qkv"),
            f"{block}/Attention_0/Dense_0",
            "qkv",
        ),
        Rule(f"{layer}.self_attn.out_proj", f"{block}/Attention_0/Dense_1", "linear"),
        Rule(f"{layer}.mlp.fc{{n+1}}", f"{block}/Dense_{{n}}", "linear"),
        Rule(f"{front}post_layernorm", "LayerNorm_0", "norm"),
        Rule("visual_projection", "projection", "linear"),
    )

    def describe(specs: Specs) -> Mapping[str, Any]:
        width = specs[f"{front}embeddings.class_embedding"].shape[0]
        hidden = specs[f"{front}encoder.layers.0.mlp.fc1.weight"].shape[0]
        projection = specs.get("visual_projection.weight")
        return {
            "variant": "base",
            "width": width,
            "depth": count(specs, f"{front}encoder.layers."),
            "heads": max(1, width // 64),
            "mlp_ratio": hidden // width,
            "patch_size": specs[f"{patches}.weight"].shape[-1],
            "gelu": "quick",
            "epsilon": 1e-5,
            "patch_bias": False,
            "pre_norm": True,
            "projection": projection.shape[0] if projection is not None else 0,
            "num_classes": 0,
        }

    return Family(
        name=f"{name}/transformers",
        model="vit",
        rules=rules,
        signature=(
            f"{front}embeddings.class_embedding",
            f"{patches}.weight",
            f"{front}pre_layrnorm.weight",
        ),
        describe=describe,
        head=("Dense_0",),
        first=f"{patches}.weight",
        ignored=(
            rf"{front}embeddings\.position_ids",
            *((r"text_(model|projection)\..*", "logit_scale") if front else ()),
        ),
    )


FAMILIES = (_tower("clip_image", "vision_model."), _tower("clip_image-headless", ""))
