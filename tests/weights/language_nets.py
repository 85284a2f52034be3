"""Tiny transformers whose weights two libraries draw alike, and what is kept of their outputs.

NumPy only: `benchmarks/parity_language.py` imports this where `transformers` is installed.
"""

import json
import pathlib
import zlib

import numpy as np

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "language.json"
VOCABULARY, NUMBERS = 96, 16

_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
_BERT = {
    **{key: _LLAMA[key] for key in ("vocab_size", "hidden_size", "intermediate_size")},
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 32,
}
_DISTIL = {
    "vocab_size": VOCABULARY,
    "dim": 48,
    "hidden_dim": 80,
    "n_layers": 2,
    "n_heads": 6,
    "max_position_embeddings": 32,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def _theta(theta):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


NETS = {
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_inner": 80}
        | {"n_positions": 32},
    ),
    "llama": ("LlamaForCausalLM", _LLAMA | _theta(500.0) | {"rms_norm_eps": 1e-5}),
    "llama3": (
        "LlamaForCausalLM",
        _LLAMA | {"rope_parameters": _LLAMA3, "attention_bias": True, "mlp_bias": True},
    ),
    "smollm": ("LlamaForCausalLM", _LLAMA | _theta(1e5) | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", _LLAMA | _theta(1e6)),
    "bert": ("BertModel", _BERT),
    "bert_masked": ("BertForMaskedLM", _BERT),
    "bert_classes": ("BertForSequenceClassification", _BERT | {"num_labels": 5}),
    "distilbert": ("DistilBertModel", _DISTIL),
    "distilbert_masked": ("DistilBertForMaskedLM", _DISTIL),
    "distilbert_classes": ("DistilBertForSequenceClassification", _DISTIL | {"num_labels": 5}),
    "clip_text": (
        "CLIPTextModelWithProjection",
        _BERT | {"projection_dim": 24, "eos_token_id": VOCABULARY - 1, "bos_token_id": 0},
    ),
}
"""Class and config of `transformers`."""


def seed(*names):
    return np.random.default_rng(zlib.crc32("/".join(names).encode()))


def drawn(net, shapes):
    """Returns every tensor of a network: gains in [.5, 1.5], shifts of .3, kernels that keep size.

    Args:
      net: its name.
      shapes: by the name of the tensor.
    """
    tensors = {}
    for name, shape in shapes.items():
        random, lower = seed(net, name), name.lower()
        if lower.endswith("weight") and ("norm" in lower or ".ln_" in lower):
            x = random.uniform(0.5, 1.5, shape)
        elif len(shape) == 1 or any(part in lower for part in ("embed", ".wte", ".wpe")):
            x = 0.3 * random.normal(size=shape)
        else:
            x = 1.5 * random.normal(size=shape) / min(shape) ** 0.5
        tensors[name] = x.astype(np.float32)
    return tensors


def inputs(net):
    """Returns ids, a mask of rows padded on the right, and for BERT token types, `[3, 20]`."""
    random = seed(net)
    tokens = random.integers(2, VOCABULARY - 1, (3, 20))
    mask = np.ones(tokens.shape, np.float32)
    for row, length in enumerate((20, 13, 3)):
        tokens[row, length - 1] = VOCABULARY - 1
        tokens[row, length:], mask[row, length:] = 1, 0
    given = {"tokens": tokens.astype(np.int32), "mask": mask}
    if net.startswith("bert"):
        given["types"] = random.integers(0, 2, tokens.shape).astype(np.int32)
    return given


def seen(net, x):
    """Returns what of an output `[b, t, ...]` stands at tokens that are no padding, in float64."""
    x = np.asarray(x, np.float64)
    return x[inputs(net)["mask"] > 0] if x.ndim == 3 else x


def digest(net, stage, x, std):
    """Returns sums of an output under random signs, of deviation 1: each has all of its errors."""
    x = seen(net, x).reshape(-1)
    signs = seed(net, stage).choice([-1.0, 1.0], (NUMBERS, x.size))
    return signs @ x / (x.size**0.5 * std)


def stored():
    return json.loads(FIXTURE.read_text())
