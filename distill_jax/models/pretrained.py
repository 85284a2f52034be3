"""Transformers over tokens with published weights."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core.api import Model, Params
from distill_jax.core.errors import ArgumentError
from distill_jax.models import _layouts, transformer
from distill_jax.weights import configs, hugging_face, mapping


class LanguageModel(NamedTuple):
    """A network with its weights.

    Attributes:
      model: the network; it has no state.
      params: its parameters, NumPy arrays in float32.
      arguments: those of `transformer.make`.
      config: `config.json`, or the metadata of a GGUF file.
      report: used and ignored tensors, and their types.
    """

    model: Model
    params: Params
    arguments: Mapping[str, Any]
    config: Mapping[str, Any]
    report: mapping.Report


def language_model(
    path: str | pathlib.Path,
    *,
    sha256: str | Mapping[str, str] = "",
    head: str = "keep",
    **changes: Any,
) -> LanguageModel:
    """Reads a folder of `transformers` or a GGUF file; see `weights.hugging_face.read`.

    Args:
      path: the folder or file.
      sha256: checksums that the files must have.
      head: "keep", or "replace": a classifier, or CLIP's projection, keeps its random initial
        values from the key 0, for other classes or another width.
      **changes: arguments of `transformer.make` in place of the file's, such as `dropout`,
        `attention`, `pool` or `num_classes`.

    Raises:
      WeightsError: files are absent or damaged, of a network that is not supported, or do not fit
        the changes.
      ArgumentError: arguments that do not fit each other.
    """
    found = hugging_face.read(path, sha256=sha256)
    arguments = {**found.arguments, **changes}
    model = transformer.make(**arguments)
    like = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    if head == "replace":
        params, _ = model.init(jax.random.key(0), jnp.zeros(like.shape, like.dtype))
        params = jax.tree.map(np.asarray, params)
    else:
        params, _ = jax.eval_shape(model.init, jax.random.key(0), like)
    # Also where JAX makes parameters in 64 bits.
    params = jax.tree.map(_narrow, params)
    mapped = mapping.apply_map(found.weights, found.family, params, sizes=arguments, head=head)
    return LanguageModel(model, mapped.params, arguments, found.config, mapped.report)


def _narrow(x: Any) -> Any:
    shape = isinstance(x, jax.ShapeDtypeStruct)
    return jax.ShapeDtypeStruct(x.shape, np.float32) if shape else np.asarray(x, np.float32)


_RUNTIME_ONLY = ("attention", "remat", "dropout", "top", "pool", "normalize")
"""Arguments that a `config.json` does not tell, or that do not matter there."""


def to_hugging_face(
    params: Params, arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns `config.json` and tensors of a transformer by the names that `transformers` gives.

    Args:
      params: parameters of the network; they are written in their types.
      arguments: of `transformer.make`.

    Raises:
      ArgumentError: a network of no class of `transformers`, with the argument that it lacks.
    """
    layout = arguments.get("layout", "llama")
    given = {k: v for k, v in arguments.items() if k != "layout" and v is not None}
    arch = _layouts.architecture(layout, given)
    whole = {**arch._asdict(), "rope_scaling": dict(arch.rope_scaling), "layout": layout}
    config = configs.config_of(whole)
    family = hugging_face.family_of(config)
    tensors = mapping.invert_map(params, None, family, sizes=whole)
    again = hugging_face.arguments_of(config, mapping.specs_of(tensors))
    read = _layouts.architecture(again.pop("layout"), again)
    for name, value in arch._asdict().items():
        if name not in _RUNTIME_ONLY and getattr(read, name) != value:
            raise ArgumentError(
                f"transformers knows no {config['model_type']} with {name}={value!r}",
                where=name,
                hint=f"{name}={getattr(read, name)!r}",
            )
    return config, hugging_face.named(config, tensors)


def save_hugging_face(
    folder: str | pathlib.Path, params: Params, arguments: Mapping[str, Any]
) -> None:
    """Writes a folder that `transformers` reads; see `to_hugging_face`.

    A tokenizer is not part of it: copy its files beside.

    Raises:
      ArgumentError: as `to_hugging_face`.
      WeightsError: the folder has weights already, or cannot be written.
    """
    hugging_face.write(folder, *to_hugging_face(params, arguments))
