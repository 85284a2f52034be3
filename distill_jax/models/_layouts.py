"""The architectures of `models.transformer` as data, and the arguments that may be changed."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from distill_jax.core import ranges
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.core.tokens import divisors
from distill_jax.models import _attention


class Architecture(NamedTuple):
    """The hyperparameters of a transformer; see `transformer.make`."""

    vocabulary: int
    width: int = 256
    depth: int = 4
    heads: int = 4
    groups: int = 0
    head_width: int = 0
    mlp_width: int = 0
    max_length: int = 1024
    causal: bool = True
    norm: str = "layer"
    norm_first: bool = True
    epsilon: float = 1e-5
    activation: str = "gelu_tanh"
    gated: bool = False
    positions: str = "learned"
    rope_theta: float = 10_000.0
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    token_types: int = 0
    embedding_norm: bool = False
    final_norm: bool = True
    head: str = "tied"
    pool: str = "mean"
    pooler: str = ""
    end: int = -1
    projection: int = 0
    normalize: bool = False
    num_classes: int = 0
    top: int = 0
    dropout: float = 0.0
    attention: str = "plain"
    remat: bool = False


_LLAMA: Mapping[str, Any] = {
    "norm": "rms",
    "activation": "silu",
    "gated": True,
    "positions": "rope",
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
    "head": "untied",
}
_BERT: Mapping[str, Any] = {
    "causal": False,
    "norm_first": False,
    "epsilon": 1e-12,
    "activation": "gelu",
    "max_length": 512,
    "embedding_norm": True,
    "final_norm": False,
    "head": "none",
}

LAYOUTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "gpt2": {},
        "llama": _LLAMA,
        "qwen2": {**_LLAMA, "qkv_bias": True, "epsilon": 1e-6, "rope_theta": 1e6},
        "smollm": {**_LLAMA, "head": "tied", "rope_theta": 1e5},
        "bert": {**_BERT, "token_types": 2, "pool": "cls", "pooler": "tanh"},
        "minilm": {**_BERT, "token_types": 2, "normalize": True},
        "distilbert": {**_BERT, "pool": "cls"},
        "clip_text": {
            "activation": "quick_gelu",
            "max_length": 77,
            "head": "none",
            "pool": "end",
            "projection": 512,
        },
    }
)
"""What each published family has beside its sizes, where that is not the default.

Sources: GPT-2 (Radford et al. 2019), Llama (Touvron et al. 2023, arXiv:2302.13971), Qwen2
(arXiv:2407.10671), SmolLM2 (arXiv:2502.02737), BERT (Devlin et al. 2019, arXiv:1810.04805), MiniLM
(Wang et al. 2020, arXiv:2002.10957) pooled as in Sentence-BERT (arXiv:1908.10084), DistilBERT (Sanh
et al. 2019, arXiv:1910.01108), CLIP (Radford et al. 2021, arXiv:2103.00020).
"""

CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "norm": ("layer", "rms"),
        "activation": ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu"),
        "positions": ("learned", "rope"),
        "head": ("tied", "untied", "masked", "none"),
        "pool": ("mean", "cls", "last", "end"),
        "pooler": ("", "tanh", "relu"),
        "attention": _attention.IMPLEMENTATIONS,
    }
)


def architecture(layout: str, changes: Mapping[str, Any]) -> Architecture:
    """Returns a layout with changes, its sizes filled in and checked.

    Raises:
      ArgumentError: an unknown layout or argument, or values that do not fit each other.
    """
    if layout not in LAYOUTS:
        raise ArgumentError(f"no layout {layout!r}", where="layout", hint=nearest(layout, LAYOUTS))
    for name in changes:
        if name not in Architecture._fields:
            hint = nearest(name, Architecture._fields)
            raise ArgumentError(f"a transformer has no argument {name!r}", where=name, hint=hint)
    if "vocabulary" not in changes:
        raise ArgumentError("the number of tokens is not given", where="vocabulary")
    values = {**LAYOUTS[layout], **changes}
    scaling = values.get("rope_scaling") or ()
    values["rope_scaling"] = tuple(sorted(dict(scaling).items()))
    arch = Architecture(**values)
    _check_numbers(arch)
    for name, options in CHOICES.items():
        value = getattr(arch, name)
        if value not in options:
            what = f"{name} is {value!r}"
            raise ArgumentError(what, where=name, hint=nearest(str(value), options))
    groups = arch.groups or arch.heads
    if arch.heads % groups:
        raise ArgumentError(
            f"{arch.heads} heads cannot share the keys of {groups}",
            where="groups",
            hint=f"divisors: {divisors(arch.heads)}",
        )
    if not arch.head_width and arch.width % arch.heads:
        raise ArgumentError(
            f"{arch.heads} heads do not divide a width of {arch.width}",
            where="heads",
            hint=f"divisors: {divisors(arch.width)}",
        )
    head_width = arch.head_width or arch.width // arch.heads
    if arch.positions == "rope" and head_width % 2:
        raise ArgumentError(
            f"rotary positions rotate pairs, and a head has {head_width} components", where="heads"
        )
    if arch.num_classes and arch.head != "none":
        raise ArgumentError(
            f"logits are of {arch.num_classes} classes or of tokens, and head is {arch.head!r}",
            where="num_classes",
            hint='head="none", or num_classes=0',
        )
    if arch.top and (arch.head == "none" or arch.top > arch.vocabulary):
        what = f"no {arch.top} most probable tokens of {arch.vocabulary}"
        hint = "at most the vocabulary, of a network with a head"
        raise ArgumentError(what, where="top", hint=hint)
    factor = 8 / 3 if arch.gated else 4
    mlp_width = arch.mlp_width or round(arch.width * factor / 8) * 8 or 8
    arch = arch._replace(groups=groups, head_width=head_width, mlp_width=mlp_width)
    if arch.positions == "rope":
        _attention.frequencies(head_width, arch.rope_theta, dict(arch.rope_scaling) or None)
    return arch


def _check_numbers(arch: Architecture) -> None:
    ranges.sizes(
        vocabulary=arch.vocabulary,
        width=arch.width,
        heads=arch.heads,
        max_length=arch.max_length,
    )
    ranges.counts(
        groups=arch.groups,
        head_width=arch.head_width,
        mlp_width=arch.mlp_width,
        token_types=arch.token_types,
        projection=arch.projection,
        num_classes=arch.num_classes,
        top=arch.top,
    )
    ranges.within(f"[0, {ranges.DEEPEST}]", whole=True, depth=arch.depth)
    ranges.within("(0, inf)", epsilon=arch.epsilon, rope_theta=arch.rope_theta)
    ranges.within(f"[-1, {arch.vocabulary})", whole=True, end=arch.end)
    ranges.rates(dropout=arch.dropout)
