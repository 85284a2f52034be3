"""Paths into a config: reading, flattening and comparing."""

import contextlib
import functools
from collections.abc import Iterable, Mapping
from typing import Any

from distill_jax.core import durations
from distill_jax.core.errors import ArgumentError, ConfigError, nearest
from distill_jax.run import old_configs
from distill_jax.run.config.schema import DURATIONS, OPEN, ConfigDict, base, role


def lookup(config: ConfigDict, path: str) -> Any:
    """Returns the value at a dotted path; refuses an unknown one with the nearest key."""
    node: Any = config
    parts = path.split(".") if path else []
    for i, part in enumerate(parts):
        if not isinstance(node, ConfigDict) or part not in node:
            raise unknown(".".join(parts[:i]), part, node)
        node = node[part]
    return node


def unknown(parent: str, key: str, node: Any) -> ConfigError:
    what, where = f"unknown config key {key!r}", f"{parent}.{key}".lstrip(".")
    if not isinstance(node, ConfigDict):
        return ConfigError(what, where=where, hint=f"{parent} is a value, not a group")
    if (new := old_configs.renamed(where)) != where:
        return ConfigError(what, where=where, hint=f"it is called {new}")
    hint = nearest(key, node)
    elsewhere = [p for p in flatten(base()) if p.rpartition(".")[2] == key]
    if elsewhere:
        hint = f"did you mean {min(elsewhere, key=len)!r}? {hint}"
    elif "kwargs" in node and not hint.startswith("did"):
        hint = f"keyword arguments go into {parent}.kwargs; {hint}"
    return ConfigError(what, where=where, hint=hint)


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Returns `{dotted path: leaf}`; an empty group is a leaf of its own, lists become tuples."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, (Mapping, ConfigDict)) and len(value):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = {} if isinstance(value, ConfigDict) else tuples(value)
    return flat


def default(path: str) -> Any:
    """Returns the default of a leaf, None where a path has none."""
    if path.startswith("roles."):
        return _defaults()[1].get(path.split(".", 2)[-1])
    return _defaults()[0].get(path)


@functools.cache
def _defaults() -> tuple[dict[str, Any], dict[str, Any]]:
    return flatten(base()), flatten(role())


def tuples(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(tuples(item) for item in value)
    if isinstance(value, dict):  # inside a tuple: arguments of the transforms of a view
        return {key: tuples(item) for key, item in value.items()}
    return value


def place(config: ConfigDict, path: str) -> tuple[ConfigDict, str, bool]:
    """Returns the group and the key that a path names, and whether the group takes new keys.

    Groups inside open groups are made where they are absent, roles excepted.
    """
    parent, _, key = path.rpartition(".")
    is_open = parent != "roles" and bool(OPEN.fullmatch(parent))
    node: Any = config
    walked: list[str] = []
    for part in parent.split(".") if parent else ():
        group = ".".join(walked)
        if not isinstance(node, ConfigDict) or part not in node:
            if not isinstance(node, ConfigDict) or group == "roles" or not OPEN.fullmatch(group):
                raise unknown(group, part, node)
            node[part] = ConfigDict()
        node = node[part]
        walked.append(part)
    if not isinstance(node, ConfigDict) or (key not in node and not is_open):
        raise unknown(parent, key, node)
    return node, key, is_open


def is_empty(value: Any) -> bool:
    return isinstance(value, (Mapping, ConfigDict)) and not len(value)


def is_a(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def mistyped(value: Any, kind: type, path: str) -> ConfigError:
    example = {int: "3", float: "0.1", bool: "true", str: "name", tuple: "a,b"}.get(kind, "")
    hint = f"example: {path}={example}" if example else ""
    return ConfigError(f"{value!r} is not of type {kind.__name__}", where=path, hint=hint)


_ABSENT = "(absent)"


def changed(
    a: ConfigDict | Mapping[str, Any],
    b: ConfigDict | Mapping[str, Any],
    *,
    ignore: Iterable[str] = (),
) -> dict[str, list[str]]:
    """Returns `{path: [old, new]}`, as text, for every leaf in which two configs differ.

    Args:
      a: the old config.
      b: the new config.
      ignore: paths of leaves or groups that do not count.
    """
    old, new = _spelled(flatten(a)), _spelled(flatten(b))
    ignore = tuple(ignore)

    def counts(path: str) -> bool:
        return not any(path == group or path.startswith(f"{group}.") for group in ignore)

    return {
        path: [_show(old, path), _show(new, path)]
        for path in sorted(old.keys() | new.keys())
        if old.get(path, _ABSENT) != new.get(path, _ABSENT) and counts(path)
    }


def differences(
    a: ConfigDict | Mapping[str, Any],
    b: ConfigDict | Mapping[str, Any],
    *,
    ignore: Iterable[str] = (),
) -> list[str]:
    """Returns `"path: old -> new"` for every leaf in which two configs differ, see `changed`."""
    found = changed(a, b, ignore=ignore)
    return [f"{path}: {old} -> {new}" for path, (old, new) in found.items()]


def _show(flat: Mapping[str, Any], path: str) -> str:
    return repr(flat[path]) if path in flat else _ABSENT


def _spelled(flat: dict[str, Any]) -> dict[str, Any]:
    """Gives durations one spelling, so that 500 and "500 steps" are equal."""
    for path in DURATIONS:
        with contextlib.suppress(ArgumentError):
            if flat.get(path) is not None:
                flat[path] = durations.spell(*durations.parse(flat[path], path))
    return flat
