"""Configs as files."""

import json
import re
from collections.abc import Mapping
from typing import Any

from distill_jax.core.errors import ConfigError
from distill_jax.run import old_configs
from distill_jax.run.config.schema import ConfigDict, base, role
from distill_jax.run.config.tree import flatten, is_empty, place
from distill_jax.trainer.io.files import DamagedFile, parse_json


def to_json(config: ConfigDict) -> str:
    """Returns the resolved config as indented JSON."""
    return json.dumps(config.copy_and_resolve_references().to_dict(), indent=2, default=_refuse)


def _refuse(value: Any) -> Any:
    raise ConfigError(
        f"{value!r} cannot be stored",
        where="config",
        hint="use numbers, strings, booleans, tuples and dicts",
    )


def from_json(text: str, *, where: str = "config.json") -> ConfigDict:
    """Returns the config that `to_json` wrote, locked and typed as `base()`.

    Args:
      text: JSON.
      where: the file to name in errors.

    Raises:
      ConfigError: for text that is no config of this version or of one in `old_configs`.
    """
    try:
        stored = parse_json(text.encode("utf-8", "replace"), where, optional={"roles": Mapping})
    except DamagedFile as error:
        raise ConfigError(error.what, where=where) from None
    stored = old_configs.convert(stored, where=where)
    config = base()
    for name in stored.get("roles", {}):
        if not re.fullmatch(r"\w+", str(name)):
            raise ConfigError(f"{name!r} is no name of a role", where=f"{where}: roles")
        config.roles[name] = role()
    for path, value in flatten(stored).items():
        node, key, is_open = place(config, path)
        if value is None and isinstance(node.get(key), ConfigDict):
            raise ConfigError("is null, not a group", where=f"{where}: {path}")
        try:
            if not is_empty(value):
                node[key] = value
            elif is_open:
                node[key] = ConfigDict()
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(str(error), where=f"{where}: {path}") from None
    return config
