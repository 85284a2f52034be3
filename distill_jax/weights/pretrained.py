"""A pretrained network by one string: a file, a folder of Hugging Face, or an installed package."""

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from distill_jax.weights import cards, common, hugging_face, packages
from distill_jax.weights.common import Weights, WeightsError
from distill_jax.weights.families import family, recognise
from distill_jax.weights.formats import read
from distill_jax.weights.mapping import Family, Mapped, apply_map

_CONFIG = 1 << 20
"""Bytes that a config may have."""


class Pretrained(NamedTuple):
    """Weights, and what they are.

    Attributes:
      weights: the tensors, unread.
      family: the table of their names.
      kwargs: arguments of `family.model`, as file and config tell them.
      prefix: what their names begin with in the file.
      card: what images must look like; None where nobody says.
      provenance: `source`, `sha256`, and of packages `licence` and `origin`.
    """

    weights: Weights
    family: Family
    kwargs: Mapping[str, Any]
    prefix: str
    card: cards.Preprocessing | None
    provenance: Mapping[str, str]

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


def is_pretrained(source: str) -> bool:
    """Returns whether a string names weights of others, rather than a run or checkpoint of ours."""
    return source.startswith(("hf:", "package:")) or source.endswith(
        (".safetensors", ".pth", ".pt", ".bin", ".npz", ".gguf", ".safetensors.index.json")
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
    kind, _, place = (
        source.rpartition(":") if source.startswith(("hf:", "package:")) else ("", "", source)
    )
    card, provenance, config = None, {"source": source}, {}
    if kind == "package":
        entry = packages.package(place)
        weights = read(packages.locate(place), sha256=entry.sha256)
        card = entry.card
        provenance |= {"sha256": entry.sha256, "licence": entry.licence, "origin": entry.origin}
    else:
        path = pathlib.Path(place).expanduser()
        folder = path if path.is_dir() else path.parent
        if kind == "hf":
            config = _json(folder / "config.json", required=True)
            card = _card(folder, config)
        if path.suffix == ".gguf" or hugging_face.is_language(config, named):
            layout = hugging_face.read(path if path.is_file() else folder)
            if path.is_file():
                provenance["sha256"] = sha256_of(path)
            return Pretrained(layout.weights, layout.family, layout.arguments, "", None, provenance)
        weights = read(path)
        if path.is_file():
            provenance["sha256"] = sha256_of(path)
    recognised = recognise(weights)
    known = family(named) if named else recognised.family
    kwargs = {**recognised.kwargs, **_from_config(known, config)}
    return Pretrained(weights, known, kwargs, recognised.prefix, card, provenance)


def sha256_of(path: pathlib.Path) -> str:
    """Returns the checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(path: pathlib.Path, *, required: bool = False) -> dict[str, Any]:
    if not path.is_file():
        if required:
            raise WeightsError(
                "has no config.json",
                where=common.place(path.parent),
                hint="a downloaded model folder",
            )
        return {}
    try:
        if path.stat().st_size > _CONFIG:
            raise ValueError("it is too large")
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"cannot be read: {error}", where=common.place(path)) from error
    if not isinstance(content, dict):
        raise WeightsError("is not a JSON object", where=common.place(path))
    return content


def _card(folder: pathlib.Path, config: Mapping[str, Any]) -> cards.Preprocessing | None:
    if isinstance(config.get("pretrained_cfg"), dict):
        return cards.from_timm(config)
    processor = _json(folder / "preprocessor_config.json")
    return cards.from_transformers(processor) if processor else None


def _from_config(known: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arguments that shapes do not tell, from the config of timm or transformers."""
    arguments: dict[str, Any] = {}
    if known.model in ("efficientnet", "mobilenet"):
        if str(config.get("architecture", "")).startswith("tf_"):
            arguments |= {"padding": "same", "epsilon": 1e-3}
    elif known.model == "vit" and known.name.endswith("/transformers"):
        if isinstance(config.get("num_attention_heads"), int):
            arguments["heads"] = config["num_attention_heads"]
        if isinstance(config.get("layer_norm_eps"), float):
            arguments["epsilon"] = config["layer_norm_eps"]
    return arguments
