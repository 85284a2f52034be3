"""Folders of `transformers` and GGUF files: which transformer they hold, and the way back.

`read` gives arguments of `models.transformer.make` and tensors by the names of a table of
`families.language`; `config_of` gives the `config.json` of a network of ours. Only JSON and weights
are read, and nothing of a folder is run.
"""

import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from distill_jax.core.errors import UserError, nearest
from distill_jax.weights import common, configs, formats, safetensors
from distill_jax.weights.common import Entry, File, Weights, WeightsError, shown
from distill_jax.weights.configs import Config
from distill_jax.weights.families import language
from distill_jax.weights.mapping import Family, Specs

CONFIG, SINGLE, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


class Language(NamedTuple):
    """A transformer over tokens as it is stored.

    Attributes:
      family: the table of its names.
      arguments: of `models.transformer.make`.
      weights: its tensors, without the prefix of the base model.
      config: `config.json`, or the metadata of a GGUF file.
    """

    family: Family
    arguments: Mapping[str, Any]
    weights: Weights
    config: Mapping[str, Any]


class _Type(NamedTuple):
    """How a `model_type` is read: table, prefixes of base models, arguments, their vocabulary."""

    family: Family
    prefixes: tuple[str, ...]
    arguments: Callable[[Config, Specs], dict[str, Any]]


_TYPES: Mapping[str, _Type] = {
    "gpt2": _Type(language.GPT2, ("transformer.",), configs.gpt2),
    "llama": _Type(language.LLAMA, ("model.",), configs.llama),
    "qwen2": _Type(language.LLAMA, ("model.",), configs.llama),
    "bert": _Type(language.BERT, ("bert.",), configs.bert),
    "distilbert": _Type(language.DISTILBERT, ("distilbert.",), configs.distilbert),
    "clip_text_model": _Type(language.CLIP_TEXT, ("text_model.",), configs.clip),
    "clip": _Type(language.CLIP_TEXT, ("text_model.",), configs.clip),
}


def is_language(config: Mapping[str, Any], named: str = "") -> bool:
    """Returns whether a config is of a network that `read` reads.

    CLIP has two towers; its text tower is meant only where the family `named` is that of texts.
    """
    kind = str(config.get("model_type"))
    return kind in _TYPES and (kind != "clip" or named == language.CLIP_TEXT.name)


def family_of(config: Mapping[str, Any]) -> Family:
    """Returns the table of the names that a model of a config has, without their prefix."""
    return _TYPES[config["model_type"]].family


def arguments_of(
    config: Mapping[str, Any], specs: Specs | None = None, where: str = CONFIG
) -> dict[str, Any]:
    """Returns arguments of `models.transformer.make`.

    Args:
      config: a `config.json`.
      specs: of the tensors, by names without the prefix of the base model, which tell heads and
        poolers. None takes those that the class in `architectures` has.
      where: path of the config.

    Raises:
      WeightsError: a network that is not supported, or tensors of another one.
    """
    kind = str(config.get("model_type"))
    if kind not in _TYPES:
        what = f"model_type is {shown(kind)}, which is not supported"
        raise WeightsError(what, where=where, hint=nearest(kind, _TYPES))
    inner = (config.get("text_config") or {}) if kind == "clip" else config
    values = Config(inner, where)
    if specs is None:
        arguments = _TYPES[kind].arguments(values, _implied(config))
        return {**arguments, "vocabulary": values.get("vocab_size", int)}
    arguments = _TYPES[kind].arguments(values, specs)
    return {**arguments, "vocabulary": _vocabulary(specs, family_of(config), where)}


def _implied(config: Mapping[str, Any]) -> Specs:
    """Returns the tensors that show which parts a class in `architectures` has besides blocks."""
    known = [str(name) for name in config.get("architectures") or ()]
    kind = known[0] if known else ""
    shapes: dict[str, tuple[int, ...]] = {}
    if kind.endswith(("CausalLM", "LMHeadModel")):
        shapes["lm_head.weight"] = (0, 0)
    elif kind.endswith("ForMaskedLM"):
        shapes |= {"cls.predictions.bias": (0,), "vocab_projector.bias": (0,)}
    elif kind.endswith("ForSequenceClassification"):
        classes = len(config.get("id2label") or (0, 1))
        shapes |= {"pooler.dense.weight": (0, 0), "pre_classifier.weight": (0, 0)}
        shapes["classifier.weight"] = (classes, 0)
    elif kind == "BertModel":
        shapes["pooler.dense.weight"] = (0, 0)
    elif kind.endswith("WithProjection") or config.get("model_type") == "clip":
        projection = config.get("projection_dim") or 512
        shapes["text_projection.weight"] = (projection, 0)
    return {name: common.Spec(shape, np.dtype(np.float32)) for name, shape in shapes.items()}


def _vocabulary(specs: Specs, family: Family, where: str) -> int:
    missing = [name for name in family.signature if name not in specs]
    if missing or len(specs[family.signature[0]].shape) != 2:
        raise WeightsError(
            f"belongs to weights without the tensor {shown((missing or family.signature)[0])}",
            where=where,
            hint=f"weights of the family {family.name}",
        )
    return specs[family.signature[0]].shape[0]


_OUTSIDE = ("lm_head.", "cls.", "classifier.", "vocab_", "pre_classifier.", "text_projection.")
"""Beginnings of names that do not get the prefix of the base model."""


def named(config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns tensors by the names that a model of a config has: with prefix, without copies.

    Args:
      config: from `configs.config_of`.
      weights: tensors by the names of the table.
    """
    chosen = _TYPES[config["model_type"]]
    base = config["architectures"][0] in ("BertModel", "DistilBertModel")
    prefix = "" if base else chosen.prefixes[0]
    copies = chosen.family.tied if config.get("tie_word_embeddings", True) else {}
    return {
        name if name.startswith(_OUTSIDE) else f"{prefix}{name}": array
        for name, array in weights.items()
        if name not in copies
    }


def write(
    folder: str | pathlib.Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    """Writes `config.json` and `model.safetensors` into a folder, which is made where it is absent.

    Raises:
      WeightsError: the folder has weights already, or cannot be written.
    """
    folder = pathlib.Path(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = [path.name for path in folder.iterdir() if path.name in (CONFIG, SINGLE)]
        if there:
            raise WeightsError(
                f"has {there[0]} already", where=common.place(folder), hint="an empty folder"
            )
        safetensors.write(folder / SINGLE, tensors, {"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        what = f"cannot be written: {error.strerror or error}"
        raise WeightsError(what, where=common.place(folder)) from error


def read_json(path: pathlib.Path) -> Mapping[str, Any]:
    """Returns the object of a JSON file.

    Raises:
      WeightsError: it is absent, no JSON, too large, or holds something else.
    """
    file = File(path)
    if file.size > 1 << 24:
        raise file.error("is too large for a config")
    values = safetensors.parse_json(file, file.bytes(0, file.size), path.name)
    if not isinstance(values, dict):
        raise file.error("is JSON, but no object", "a config.json")
    return values


def read(path: str | pathlib.Path, *, sha256: str | Mapping[str, str] = "") -> Language:
    """Reads a folder of `transformers` or a GGUF file.

    Folders have `config.json` and safetensors (one file, or shards with an index) or
    `pytorch_model.bin`. Of a folder of sentence-transformers the pooling is read too. Types: GPT-2,
    Llama (SmolLM too), Qwen2, BERT, DistilBERT, and the text tower of CLIP; of GGUF Llama.

    Args:
      path: the folder or file.
      sha256: see `formats.read`.

    Raises:
      WeightsError: files are absent or damaged, or of a network that is not supported.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_dir():
        return _read_gguf(formats.read(path, sha256=sha256))
    config = read_json(path / CONFIG)
    file = path / "pytorch_model.bin"
    single = file.exists() and not list(path.glob("*.safetensors"))
    weights = formats.read(file if single else path, sha256=sha256)
    where = common.place(path / CONFIG)
    chosen = _TYPES.get(str(config.get("model_type")))
    weights = _without_prefix(weights, chosen.prefixes if chosen else ())
    arguments = arguments_of(config, weights.specs, where)
    return Language(family_of(config), arguments | _pooling(path), weights, config)


def _without_prefix(weights: Weights, prefixes: tuple[str, ...]) -> Weights:
    """Returns weights whose names lack the base model's; names of old norms are the new ones."""
    entries: dict[str, Entry] = {}
    for name, entry in weights.entries.items():
        short = next((name.removeprefix(p) for p in prefixes if name.startswith(p)), name)
        short = re.sub(r"(LayerNorm\.)gamma$", r"\1weight", short)
        short = re.sub(r"(LayerNorm\.)beta$", r"\1bias", short)
        if short in entries:
            raise WeightsError(
                f"tensor {shown(name)} and another one are both {shown(short)}",
                where=common.place(weights.path),
            )
        entries[short] = entry
    return Weights(weights.path, weights.format, entries, weights.metadata)


def _pooling(folder: pathlib.Path) -> dict[str, Any]:
    """Returns how sentence-transformers pools, where its files are beside the config."""
    file = folder / "1_Pooling" / CONFIG
    if not file.exists():
        return {}
    pooling = Config(read_json(file), common.place(file))
    modes = [name for name, on in pooling.values.items() if name.startswith("pooling_mode") and on]
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in known:
        raise pooling.error(f"pools by {shown(modes)}", f"one of {', '.join(known)}")
    listed = folder / "modules.json"
    normal = listed.exists() and b"models.Normalize" in listed.read_bytes()[: 1 << 16]
    return {"pool": known[modes[0]], "pooler": "", "normalize": normal}


def _read_gguf(weights: Weights) -> Language:
    if weights.format != "gguf":
        raise WeightsError(
            f"is {weights.format} without a config",
            where=common.place(weights.path),
            hint="the folder with config.json, or a GGUF file",
        )
    kind = weights.metadata.get("general.architecture")
    where = common.place(weights.path)
    if kind != "llama":
        raise WeightsError(
            f"general.architecture is {shown(kind)}, which is not supported",
            where=where,
            hint="llama",
        )
    config = Config(weights.metadata, where)
    config.refuse("llama.rope.scaling.type", "none")
    heads = config.get("llama.attention.head_count", int)
    width = config.get("llama.embedding_length", int)
    arguments = {
        "layout": "llama",
        "vocabulary": _vocabulary(weights.specs, language.LLAMA_GGUF, where),
        "width": width,
        "depth": config.get("llama.block_count", int),
        "heads": heads,
        "groups": config.get("llama.attention.head_count_kv", int, heads),
        "head_width": config.get("llama.rope.dimension_count", int, width // max(heads, 1)),
        "mlp_width": config.get("llama.feed_forward_length", int),
        "max_length": config.get("llama.context_length", int),
        "epsilon": config.get("llama.attention.layer_norm_rms_epsilon", float),
        "rope_theta": config.get("llama.rope.freq_base", float, 10_000.0),
        "head": "untied" if "output.weight" in weights else "tied",
    }
    return Language(language.LLAMA_GGUF, arguments, weights, weights.metadata)


def tokenizer(path: str | pathlib.Path) -> Any:
    """Returns the tokenizer of a folder (`tokenizer.json`) or a GGUF file of SmolLM, for `encode`.

    Raises:
      UserError: the package `tokenizers` is not installed.
      WeightsError: there is none, or one of another kind.
    """
    try:
        import tokenizers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "tokenizers are not read without their package", hint="pip install tokenizers"
        ) from error
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        File(path / TOKENIZER)  # a clear error if it is missing
        try:
            return tokenizers.Tokenizer.from_file(str(path / TOKENIZER))
        except Exception as error:  # of its own, without a common class
            what = f"is no tokenizer: {shown(str(error))[1:-1]}"
            raise WeightsError(what, where=common.place(path / TOKENIZER)) from error
    weights = formats.read(path)
    metadata = weights.metadata
    model, before = (metadata.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if (model, before) != ("gpt2", "smollm"):
        raise WeightsError(
            f"has a tokenizer {shown(model)} of kind {shown(before)}, which is not read",
            where=common.place(weights.path),
            hint="the tokenizer.json of the model, in a folder",
        )
    ids = {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(pair.split(" ", 1)) for pair in metadata["tokenizer.ggml.merges"]]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    control = np.flatnonzero(np.asarray(metadata["tokenizer.ggml.token_type"]) == 3)
    texts = list(ids)
    made.add_special_tokens([texts[i] for i in control])
    return made
