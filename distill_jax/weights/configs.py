"""`config.json` of `transformers` and arguments of `models.transformer.make`, both ways."""

import math
from collections.abc import Mapping
from typing import Any

from distill_jax.core.errors import nearest
from distill_jax.weights.common import WeightsError, shown
from distill_jax.weights.mapping import Specs

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}


class Config:
    """A `config.json` whose values are looked up with their type."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where

    def error(self, what: str, hint: str = "") -> WeightsError:
        return WeightsError(what, where=self.where, hint=hint)

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise self.error(f"has no {name}", "the config.json that belongs to the weights")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (kind is float and not math.isfinite(value)):
            raise self.error(f"{name} is {shown(value)}", f"a value of type {kind.__name__}")
        return value

    def refuse(self, name: str, *wanted: Any) -> None:
        if name in self.values and self.values[name] not in wanted:
            raise self.error(
                f"{name} is {shown(self.values[name])}, which is not supported",
                f"one of {wanted}",
            )

    def activation(self, name: str, default: str) -> str:
        value = self.get(name, str, default)
        if value not in _ACTIVATIONS:
            raise self.error(f"{name} is {shown(value)}", nearest(value, _ACTIVATIONS))
        return _ACTIVATIONS[value]


def _head(config: Config, specs: Specs, default: bool) -> str:
    if config.get("tie_word_embeddings", bool, default):
        return "tied"
    return "untied" if "lm_head.weight" in specs else "none"


def gpt2(config: Config, specs: Specs) -> dict[str, Any]:
    for name, *wanted in (
        ("add_cross_attention", False, None),
        ("scale_attn_by_inverse_layer_idx", False, None),
        ("scale_attn_weights", True, None),
    ):
        config.refuse(name, *wanted)
    width = config.get("n_embd", int)
    return {
        "layout": "gpt2",
        "width": width,
        "depth": config.get("n_layer", int),
        "heads": config.get("n_head", int),
        "mlp_width": config.get("n_inner", int, 4 * width),
        "max_length": config.get("n_positions", int, 1024),
        "epsilon": config.get("layer_norm_epsilon", float, 1e-5),
        "activation": config.activation("activation_function", "gelu_new"),
        "head": _head(config, specs, True),
    }


def _rope(config: Config) -> dict[str, Any]:
    """Returns theta and scaling, which moved to `rope_parameters` in transformers 5."""
    rope = config.values.get("rope_parameters") or config.values.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise config.error(f"rope_parameters are {shown(rope)}", "an object")
    inside = Config(rope, config.where)
    theta = inside.get("rope_theta", float, config.get("rope_theta", float, 10_000.0))
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "type")}
    kind = scaling.setdefault("rope_type", rope.get("type", "default"))
    return {"rope_theta": theta, "rope_scaling": {} if kind == "default" else scaling}


def llama(config: Config, specs: Specs) -> dict[str, Any]:
    heads = config.get("num_attention_heads", int)
    width = config.get("hidden_size", int)
    qwen = config.values.get("model_type") == "qwen2"
    config.refuse("use_sliding_window", False, None)
    if not qwen:
        config.refuse("sliding_window", None)
    bias = config.get("attention_bias", bool, qwen)
    return {
        "layout": "qwen2" if qwen else "llama",
        "width": width,
        "depth": config.get("num_hidden_layers", int),
        "heads": heads,
        "groups": config.get("num_key_value_heads", int, heads),
        "head_width": config.get("head_dim", int, width // max(heads, 1)),
        "mlp_width": config.get("intermediate_size", int),
        "max_length": config.get("max_position_embeddings", int, 2048),
        "epsilon": config.get("rms_norm_eps", float, 1e-6),
        "activation": config.activation("hidden_act", "silu"),
        "qkv_bias": bias,
        "out_bias": bias and not qwen,
        "mlp_bias": config.get("mlp_bias", bool, False),
        "head": _head(config, specs, False),
        **_rope(config),
    }


def _classes(specs: Specs, config: Config, pooler: str) -> dict[str, Any]:
    if "classifier.weight" not in specs:
        return {}
    if pooler not in specs:
        raise config.error(
            "classifies single tokens or pairs, which is not supported",
            f"a classifier of texts, with {pooler}",
        )
    return {"num_classes": specs["classifier.weight"].shape[0]}


def bert(config: Config, specs: Specs) -> dict[str, Any]:
    config.refuse("position_embedding_type", "absolute", None)
    config.refuse("is_decoder", False, None)
    config.refuse("add_cross_attention", False, None)
    pooler = "pooler.dense.weight"
    return {
        "layout": "bert",
        "width": config.get("hidden_size", int),
        "depth": config.get("num_hidden_layers", int),
        "heads": config.get("num_attention_heads", int),
        "mlp_width": config.get("intermediate_size", int),
        "max_length": config.get("max_position_embeddings", int, 512),
        "epsilon": config.get("layer_norm_eps", float, 1e-12),
        "activation": config.activation("hidden_act", "gelu"),
        "token_types": config.get("type_vocab_size", int, 2),
        "pooler": "tanh" if pooler in specs else "",
        "head": "masked" if "cls.predictions.bias" in specs else "none",
        **_classes(specs, config, pooler),
    }


def distilbert(config: Config, specs: Specs) -> dict[str, Any]:
    pooler = "pre_classifier.weight"
    return {
        "layout": "distilbert",
        "width": config.get("dim", int),
        "depth": config.get("n_layers", int),
        "heads": config.get("n_heads", int),
        "mlp_width": config.get("hidden_dim", int),
        "max_length": config.get("max_position_embeddings", int, 512),
        "activation": config.activation("activation", "gelu"),
        "pooler": "relu" if pooler in specs else "",
        "head": "masked" if "vocab_projector.bias" in specs else "none",
        **_classes(specs, config, pooler),
    }


def clip(config: Config, specs: Specs) -> dict[str, Any]:
    end = config.get("eos_token_id", int, 49_407)
    projection = specs.get("text_projection.weight")
    return {
        "layout": "clip_text",
        "width": config.get("hidden_size", int, 512),
        "depth": config.get("num_hidden_layers", int, 12),
        "heads": config.get("num_attention_heads", int, 8),
        "mlp_width": config.get("intermediate_size", int, 2048),
        "max_length": config.get("max_position_embeddings", int, 77),
        "epsilon": config.get("layer_norm_eps", float, 1e-5),
        "activation": config.activation("hidden_act", "quick_gelu"),
        # Configs from before transformers 4.31 say 2, and mean the largest id.
        "end": -1 if end == 2 else end,
        "projection": projection.shape[0] if projection else 0,
    }


def _gpt2_config(a: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": a["width"],
        "n_layer": a["depth"],
        "n_head": a["heads"],
        "n_inner": a["mlp_width"],
        "n_positions": a["max_length"],
        "layer_norm_epsilon": a["epsilon"],
        "activation_function": _THEIRS[a["activation"]],
        "tie_word_embeddings": a["head"] == "tied",
    }


def _llama_config(a: Mapping[str, Any]) -> dict[str, Any]:
    qwen = a["qkv_bias"] and not a["out_bias"]
    scaling = dict(a["rope_scaling"] or {})
    rope = {"rope_type": "default", **scaling, "rope_theta": a["rope_theta"]}
    biases = {} if qwen else {"attention_bias": a["qkv_bias"], "mlp_bias": a["mlp_bias"]}
    return {
        "architectures": ["Qwen2ForCausalLM" if qwen else "LlamaForCausalLM"],
        "model_type": "qwen2" if qwen else "llama",
        "hidden_size": a["width"],
        "num_hidden_layers": a["depth"],
        "num_attention_heads": a["heads"],
        "num_key_value_heads": a["groups"],
        "head_dim": a["head_width"],
        "intermediate_size": a["mlp_width"],
        "max_position_embeddings": a["max_length"],
        "rms_norm_eps": a["epsilon"],
        "hidden_act": _THEIRS[a["activation"]],
        "tie_word_embeddings": a["head"] == "tied",
        # before and since transformers 5
        "rope_theta": a["rope_theta"],
        "rope_scaling": scaling or None,
        "rope_parameters": rope,
        **biases,
    }


def _labels(n: int) -> dict[str, Any]:
    names = {str(i): f"LABEL_{i}" for i in range(n)}
    return {"id2label": names, "label2id": {v: int(k) for k, v in names.items()}} if n else {}


def _kind(a: Mapping[str, Any], name: str) -> list[str]:
    if a["num_classes"]:
        return [f"{name}ForSequenceClassification"]
    return [f"{name}ForMaskedLM" if a["head"] == "masked" else f"{name}Model"]


def _bert_config(a: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": _kind(a, "Bert"),
        "model_type": "bert",
        "hidden_size": a["width"],
        "num_hidden_layers": a["depth"],
        "num_attention_heads": a["heads"],
        "intermediate_size": a["mlp_width"],
        "max_position_embeddings": a["max_length"],
        "layer_norm_eps": a["epsilon"],
        "hidden_act": _THEIRS[a["activation"]],
        "type_vocab_size": a["token_types"],
        "position_embedding_type": "absolute",
        **_labels(a["num_classes"]),
    }


def _distilbert_config(a: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": _kind(a, "DistilBert"),
        "model_type": "distilbert",
        "dim": a["width"],
        "n_layers": a["depth"],
        "n_heads": a["heads"],
        "hidden_dim": a["mlp_width"],
        "max_position_embeddings": a["max_length"],
        "activation": _THEIRS[a["activation"]],
        **_labels(a["num_classes"]),
    }


def _clip_config(a: Mapping[str, Any]) -> dict[str, Any]:
    end = 2 if a["end"] < 0 else a["end"]
    return {
        "architectures": ["CLIPTextModelWithProjection" if a["projection"] else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": a["width"],
        "num_hidden_layers": a["depth"],
        "num_attention_heads": a["heads"],
        "intermediate_size": a["mlp_width"],
        "max_position_embeddings": a["max_length"],
        "layer_norm_eps": a["epsilon"],
        "hidden_act": _THEIRS[a["activation"]],
        "eos_token_id": end,
        "projection_dim": a["projection"] or a["width"],
    }


_THEIRS = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
_WRITERS = {
    "gpt2": _gpt2_config,
    "llama": _llama_config,
    "qwen2": _llama_config,
    "smollm": _llama_config,
    "bert": _bert_config,
    "minilm": _bert_config,
    "distilbert": _distilbert_config,
    "clip_text": _clip_config,
}


def config_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `config.json` of a network.

    Args:
      arguments: all arguments of `models.transformer.make`, none left to the layout.

    Raises:
      WeightsError: a layout that `transformers` has no name for here.
    """
    layout = arguments["layout"]
    if layout not in _WRITERS:
        raise WeightsError(f"no config of the layout {layout!r}", hint=nearest(layout, _WRITERS))
    return {"vocab_size": arguments["vocabulary"], **_WRITERS[layout](arguments)}
