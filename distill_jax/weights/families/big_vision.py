"""ViT by the names of Flax: the `.npz` files of vision_transformer and of big_vision.

Newer files of big_vision keep all blocks in one array, `Transformer/encoderblock/...` `[l, ...]`;
`unstacked` gives each block its own names.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from distill_jax.weights.common import Entry, Spec, Weights
from distill_jax.weights.mapping import Family, Rule, Specs

_STACKED = re.compile(r"(.*Transformer/encoderblock)/(.*)")


def unstacked(weights: Weights) -> Weights:
    """Returns weights whose blocks have names of their own, `encoderblock_{i}/...`."""
    entries: dict[str, Entry] = {}
    for name, entry in weights.entries.items():
        match, shape = _STACKED.fullmatch(name), entry.spec.shape
        if match is None or len(shape) < 2:
            entries[name] = entry
            continue
        spec = Spec(shape[1:], entry.spec.dtype)
        for i in range(shape[0]):
            load = functools.partial(_row, entry, i)
            entries[f"{match[1]}_{i}/{match[2]}"] = Entry(spec, load)
    return Weights(weights.path, weights.format, entries, weights.metadata)


def _row(entry: Entry, i: int) -> np.ndarray:
    return entry.load()[i]


def _layer(source: str, target: str, ours: str, kind: str = "same") -> tuple[Rule, Rule]:
    """Returns the rules of a matrix or of gains, whose layout is `kind`, and of a vector."""
    first = "scale" if ours == "scale" else "kernel"
    return (
        Rule(f"{source}/{first}", f"{target}/{ours}", kind),
        Rule(f"{source}/bias", f"{target}/bias"),
    )


def _vit(name: str, positions: str, norm: str, attention: str, mlp: str) -> Family:
    """Returns a table; `norm` is the number of the second norm of a block."""
    block, to = "Transformer/encoderblock_{i}", "Block_{i}"
    parts = [f"{block}/{attention}/{part}" for part in ("query", "key", "value")]
    qkv = f"{to}/Attention_0/Dense_0"
    rules = (
        Rule("cls", "cls"),
        Rule(positions, "positions", "positions"),
        *_layer("embedding", "patches", "kernel", "patches_hwio"),
        *_layer(f"{block}/LayerNorm_0", f"{to}/LayerNorm_0", "scale"),
        *_layer(f"{block}/LayerNorm_{norm}", f"{to}/LayerNorm_1", "scale"),
        Rule(tuple(f"{part}/kernel" for part in parts), f"{qkv}/kernel", "qkv_flax"),
        Rule(tuple(f"{part}/bias" for part in parts), f"{qkv}/bias", "qkv_flax"),
        *_layer(f"{block}/{attention}/out", f"{to}/Attention_0/Dense_1", "kernel", "out_flax"),
        *_layer(f"{block}/{mlp}/Dense_{{n}}", f"{to}/Dense_{{n}}", "kernel"),
        *_layer("Transformer/encoder_norm", "LayerNorm_0", "scale"),
        *_layer("head", "Dense_0", "kernel"),
    )
    query = f"Transformer/encoderblock_0/{attention}/query/kernel"

    def describe(specs: Specs) -> Mapping[str, Any]:
        width, heads, _ = specs[query].shape
        blocks = [re.match(r"Transformer/encoderblock_(\d+)/", name) for name in specs]
        hidden = specs[f"Transformer/encoderblock_0/{mlp}/Dense_0/kernel"].shape[1]
        square = math.isqrt(specs[positions].shape[1]) ** 2 == specs[positions].shape[1]
        pooled = "cls" if "cls" in specs else "mean"
        return {
            "variant": "base",
            "width": width,
            "depth": 1 + max(int(match[1]) for match in blocks if match),
            "heads": heads,
            "mlp_ratio": hidden // width,
            "patch_size": specs["embedding/kernel"].shape[0],
            "pool": pooled,
            "class_position": not square,
            "gelu": "tanh",
            "epsilon": 1e-6,
            "num_classes": specs["head/kernel"].shape[1] if "head/kernel" in specs else 0,
        }

    return Family(
        name=f"vit/{name}",
        model="vit",
        rules=rules,
        signature=("embedding/kernel", positions, query),
        describe=describe,
        head=("Dense_0",),
        first="embedding/kernel",
    )


FAMILIES = (
    _vit(
        "vision_transformer",
        "Transformer/posembed_input/pos_embedding",
        "2",
        "MultiHeadDotProductAttention_1",
        "MlpBlock_3",
    ),
    _vit("big_vision", "pos_embedding", "1", "MultiHeadDotProductAttention_0", "MlpBlock_0"),
)
