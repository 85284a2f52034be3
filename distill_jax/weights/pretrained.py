"""A pretrained network by one string: a file, a folder of Hugging Face, or an installed package."""

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from distill_jax.core.errors import ConfigError, nearest
from distill_jax.weights import cards, common, hugging_face, packages
from distill_jax.weights.common import Weights, WeightsError
from distill_jax.weights.families import big_vision, family, recognise
from distill_jax.weights.formats import read
from distill_jax.weights.mapping import Family, Mapped, apply_map


class Pretrained(NamedTuple):
    """Weights and their description.

    Attributes:
      weights: the tensors, unread.
      family: the table of their names.
      kwargs: arguments of `family.model`, as file and config tell them.
      prefix: prefix of their names in the file.
      card: required format of images; None if unknown.
      provenance: `source`, `sha256`, and of packages `licence` and `origin`.
      classes: names of the classes of `logits`; empty if unknown.
    """

    weights: Weights
    family: Family
    kwargs: Mapping[str, Any]
    prefix: str
    card: cards.Preprocessing | None
    provenance: Mapping[str, str]
    classes: tuple[str, ...] = ()

    def fill(self, params: Any, state: Any = None, *, head: str = "keep") -> Mapped:
        """Fills a network that `family.model` built, see `mapping.apply_map`."""
        return apply_map(
            self.weights,
            self.family,
            params,
            state,
            sizes=self.kwargs,
            prefix=self.prefix,
            head=head,
        )


def open_pretrained(source: str, *, named: str = "") -> Pretrained:
    """Opens weights and recognises the network that they are of.

    Args:
      source: the path of a file of weights (a GGUF file among them), `hf:<folder>` for a folder
        with `config.json` and weights, or `package:<name>` for one of `packages.PACKAGES`.
      named: the family, where the names of the tensors do not tell it.

    Raises:
      DataUnavailable: the package is not installed.
      WeightsError: the file is damaged, or of no known network.
    """
    kind, _, place = source.partition(":")
    if kind not in ("hf", "package"):
        kind, place = "", source
    card, provenance, config = None, {"source": source}, {}
    if kind == "package":
        entry = packages.package(place)
        weights = read(packages.locate(place), sha256=entry.sha256)
        card = entry.card
        provenance |= {"sha256": entry.sha256, "licence": entry.licence, "origin": entry.origin}
    else:
        path = pathlib.Path(place).expanduser()
        folder = path.parent if path.is_file() else path
        if kind == "hf":
            config = hugging_face.read_json(folder / hugging_face.CONFIG)
            card = _card(folder, config)
        if path.suffix == ".gguf" or hugging_face.is_language(config, named):
            layout = hugging_face.read(path)
            if path.is_file():
                provenance["sha256"] = sha256_of(path)
            return Pretrained(layout.weights, layout.family, layout.arguments, "", None, provenance)
        weights = read(path)
        if path.is_file():
            provenance["sha256"] = sha256_of(path)
    weights = big_vision.unstacked(weights) if weights.format == "npz" else weights
    recognised = recognise(weights)
    known = family(named) if named else recognised.family
    kwargs = {**recognised.kwargs, **_from_config(known, config)}
    names = config.get("id2label") or {}
    ordered = [names.get(str(i)) for i in range(len(names))] if isinstance(names, dict) else [None]
    classes = tuple(x for x in ordered if isinstance(x, str))
    classes = classes if len(classes) == len(ordered) else ()
    return Pretrained(weights, known, kwargs, recognised.prefix, card, provenance, classes)


def checksum(path: pathlib.Path) -> str:
    """Returns the checksum of a file, or one of all weights and configs in a folder."""
    if path.is_file():
        return sha256_of(path)
    parts = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".json"))
    listed = [f"{part.name} {sha256_of(part)}" for part in parts if part.is_file()]
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()


def sha256_of(path: pathlib.Path) -> str:
    """Returns the checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _card(folder: pathlib.Path, config: Mapping[str, Any]) -> cards.Preprocessing | None:
    processor = folder / "preprocessor_config.json"
    try:
        if isinstance(config.get("pretrained_cfg"), dict):
            return cards.from_timm(config)
        if processor.is_file():
            return cards.from_transformers(hugging_face.read_json(processor))
    except (TypeError, ValueError, IndexError, ZeroDivisionError, ConfigError) as error:
        raise WeightsError(
            f"says how images are prepared in a way that is not known: {error}",
            where=common.place(folder),
            hint="entries as timm or transformers write them",
        ) from error
    return None


_GELUS = {
    "gelu": "exact",
    "quick_gelu": "quick",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
}
"""Activations of transformers that vision transformers have here."""


def _from_config(known: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arguments that shapes do not tell, from the config of timm or transformers."""
    arguments: dict[str, Any] = {}
    if known.model in ("efficientnet", "mobilenet"):
        if str(config.get("architecture", "")).startswith("tf_"):
            arguments |= {"padding": "same", "epsilon": 1e-3}
    elif known.model == "vit" and known.name.endswith("/transformers"):
        config = config.get("vision_config") or config
        if isinstance(config.get("num_attention_heads"), int):
            arguments["heads"] = config["num_attention_heads"]
        if isinstance(config.get("layer_norm_eps"), float):
            arguments["epsilon"] = config["layer_norm_eps"]
        if (act := config.get("hidden_act")) is not None:
            if act not in _GELUS:
                raise WeightsError(f"hidden_act is {common.shown(act)}", hint=nearest(act, _GELUS))
            arguments["gelu"] = _GELUS[act]
    return arguments
