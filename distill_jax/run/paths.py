"""Paths of configs, made absolute in one place.

A path is relative to the current folder, `~` is the home folder. The command line makes all of them
absolute before anything reads them (`of_config`), so a run stores where its files are and continues
from any folder. Needs neither JAX nor data.
"""

import copy
import os
import re
import sys
from typing import Any

from distill_jax.core.errors import UserError
from distill_jax.run.config import ConfigDict
from distill_jax.trainer.io.paths import NetworkRef, absolute

_PATH = re.compile(
    r"roles\.\w+\.(init|classes)|cache\.dir|cache\.teacher|data\.kwargs\.(.+[._])?(path|root|dir|folder|file)s?"
)
"""The config paths that hold paths; of a data set's arguments those that are called so."""

FOLDER, PACKAGE = "hf:", "package:"
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".npz", ".gguf", ".safetensors.index.json")


def is_foreign(init: str | None) -> bool:
    """Returns whether `roles.*.init` names weights of another library, see `foreign`."""
    return bool(init) and (init.startswith((FOLDER, PACKAGE)) or init.endswith(_WEIGHTS))


def make_importable() -> None:
    """Lets modules of the current folder be imported, as `python -m` does, unless `-P` forbids it.

    Raises:
      UserError: the current folder is gone.
    """
    try:
        here = os.getcwd()
    except OSError as error:
        raise UserError(
            f"it is gone: {error.strerror}", where="current folder", hint="start from another one"
        ) from None
    if not sys.flags.safe_path and here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)


def of_config(config: ConfigDict) -> ConfigDict:
    """Returns a copy in which every path is absolute, also those in the arms of a study.

    Networks of other arms (`arm:NAME`) and addresses (`scheme://...`) stay as they are.

    Raises:
      UserError: as `absolute`.
    """
    config = copy.deepcopy(config)
    _make_absolute(config, "", "")
    for arm, changes in config.study.arms.items():
        if isinstance(changes, ConfigDict):
            _make_absolute(changes, "", f"study.arms.{arm}.")
    return config


def _make_absolute(node: ConfigDict, prefix: str, outside: str) -> None:
    for key, value in node.items():
        path = f"{prefix}{key}"
        if isinstance(value, ConfigDict):
            if path != "study":
                _make_absolute(value, f"{path}.", outside)
        elif _PATH.fullmatch(path):
            absolute = _absolute(value, where=outside + path)
            if absolute != value:
                node[key] = absolute


def _absolute(value: Any, *, where: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_absolute(item, where=where) for item in value)
    if not isinstance(value, str) or not value or value.startswith("arm:") or "://" in value:
        return value
    if where.endswith("cache.teacher") and not value.endswith(".onnx"):
        return value  # names a function or a package
    if where.endswith(".init") and is_foreign(value):
        front = next((f for f in (FOLDER, PACKAGE) if value.startswith(f)), "")
        place = value.removeprefix(front)
        return f"{front}{place if front == PACKAGE else absolute(place, where=where)}"
    if where.endswith(".init"):
        path, mark, network = NetworkRef.split(value)
        return f"{absolute(path, where=where)}{mark}{network}"
    return str(absolute(value, where=where))
