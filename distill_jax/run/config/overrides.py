"""Other values for the keys of a config: the command line and the arms of a study."""

import ast
import contextlib
import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags

from distill_jax.core.errors import ConfigError, nearest
from distill_jax.run.config import durations, settings
from distill_jax.run.config.checks import check_structure, check_values
from distill_jax.run.config.schema import (
    DURATIONS,
    ENTRIES,
    OPEN,
    TRANSFORMS,
    ConfigDict,
    base,
    lock,
    role,
    template,
)
from distill_jax.run.config.tree import (
    flatten,
    is_a,
    is_empty,
    lookup,
    mistyped,
    place,
    tuples,
)

# A name and the keyword arguments that belong to it: another name drops them.
OWNED = {"name": "kwargs", "model": "kwargs", "schedule": "schedule_kwargs"}


def override(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """Returns a locked copy of `config` with other values; field references follow.

    The command line and the arms of a study both use this function. A string is read as the type of
    the field that it replaces: `"3e-4"` for a float, `"crop,flip"` or `"('crop', 'flip')"` for a
    tuple, `"none"` for an optional field. Inside an open group it is any literal, a tuple if it has
    commas outside quotes, and otherwise a string. A new name drops the keyword arguments of the old
    one, and new transforms drop those of the transforms that are removed, unless `values` sets them
    too. A role is added by its model, init or ema_of. An empty group empties an open group other
    than roles. None deletes a role, an evaluator, the arguments of a transform or an arm. Other
    values for the same group are applied afterwards.

    Args:
      config: the config, left as it is.
      values: new values by dotted path. A dict goes into a group key by key.

    Raises:
      ConfigError: for a path that does not exist or a value of another type.
    """
    check_values(config)
    check_structure(config, template(config))
    config = lock(copy.deepcopy(config))
    values = dict(_spread(values))
    durations.refuse_old_keys(values)
    for path in values:  # a role that names its network, its weights or its source is a new one
        match = re.fullmatch(r"roles\.(\w+)\.(model|init|ema_of)", path)
        if match and match[1] not in config.roles:
            config.roles[match[1]] = role()
    known = template(config)

    def first(path: str) -> int:
        if is_empty(values[path]) or _deletes(path, values[path]):
            return path.count(".") - 100  # the outer group before what is in it
        return 0 if path.rpartition(".")[2] in OWNED else 1

    for path in sorted(values, key=first):
        _set(config, known, path, values)
    if not {f"data.{key}" for key in TRANSFORMS}.isdisjoint(values):
        used = [name for key in TRANSFORMS for name in config.data[key]]
        for name in list(config.data.transform_kwargs):
            where = f"data.transform_kwargs.{name}"
            if name not in used and not any(f"{p}.".startswith(f"{where}.") for p in values):
                del config.data.transform_kwargs[name]
    return config


def _spread(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for path, value in values.items():
        if isinstance(value, str) and value.lstrip().startswith("{"):
            with contextlib.suppress(ValueError, SyntaxError):  # a string such as "{seed}"
                value = tuples(ast.literal_eval(value.strip()))
        if isinstance(value, (Mapping, ConfigDict)) and len(value):
            yield from flatten(value, f"{path}.").items()
        else:
            yield path, value


def _set(config: ConfigDict, known: ConfigDict, path: str, values: Mapping[str, Any]) -> None:
    if _deletes(path, values[path]):
        parent, _, key = path.rpartition(".")
        if key not in (group := lookup(config, parent)):
            raise ConfigError(f"there is no {key!r}", where=path, hint=nearest(key, group))
        with group.unlocked():
            del group[key]
        return
    node, key, is_open = place(config, path)
    old, value = node.get(key), values[path]
    if is_empty(value):
        _empty(node, key, path, is_open=is_open)
        return
    if isinstance(old, ConfigDict):
        raise ConfigError(
            "a group cannot be replaced by a value",
            where=path,
            hint=f"set one of its keys: {', '.join(f'{path}.{k}' for k in old) or f'{path}.KEY'}"
            + (f"; {path}={{}} empties it" if OPEN.fullmatch(path) else ""),
        )
    if is_open:
        if isinstance(value, str):
            value = _open_value(value, old, path=path)
        with node.ignore_type():
            node[key] = float(value) if isinstance(old, float) and type(value) is int else value
        return
    parent = path.rpartition(".")[0]
    optional = lookup(known, path) is None
    kind = lookup(known, parent).get_type(key)
    if path in DURATIONS:
        kind, value = str, value if _is_none(value) else durations.spelled(value, path)
    value = _coerce(value, kind, optional=optional, path=path)
    if (owned := OWNED.get(key)) and owned in node and old not in (value, ""):
        for name in list(node[owned]):
            del node[owned][name]
    node[key] = value


def _deletes(path: str, value: Any) -> bool:
    """Whether a value deletes an entry of a group of groups."""
    return _is_none(value) and path.rpartition(".")[0] in ENTRIES


def _is_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() == "none")


def _empty(node: ConfigDict, key: str, path: str, *, is_open: bool) -> None:
    """Empties an open group, or adds an empty group to an open one."""
    old = node.get(key)
    if old is None and is_open:
        node[key] = ConfigDict()
    elif isinstance(old, ConfigDict) and path != "roles" and (is_open or OPEN.fullmatch(path)):
        for name in list(old):
            del old[name]
    else:
        what = "a group of fixed keys" if isinstance(old, ConfigDict) else "a value, not a group,"
        what = "a run needs a role: roles" if path == "roles" else what
        hint = "roles.NAME=none deletes one" if path == "roles" else "leave it out, or set its keys"
        hint = f"{path}=none unsets it" if path in DURATIONS else hint
        raise ConfigError(f"{what} cannot be emptied", where=path, hint=hint)


def _open_value(text: str, old: Any, *, path: str) -> Any:
    """Reads the text of a value in an open group; a string that is there stays a string."""
    bare = text.strip()
    quoted = len(bare) > 1 and bare[0] in "'\"" and bare[0] == bare[-1]
    if isinstance(old, str) and not quoted:
        return text
    value = _literal(text)
    if not isinstance(value, str) or quoted:
        return value
    if bare[:1] in ("(", "[", "{"):
        raise ConfigError(
            f"{text!r} is not a literal",
            where=path,
            hint="quote its strings, or all of it where it is one string: \"'...'\"",
        )
    return _tuple(text) if "," in text else value


def _coerce(value: Any, kind: type, *, optional: bool, path: str) -> Any:
    if optional and _is_none(value):
        return None
    if isinstance(value, str) and kind is not str:
        parse = {bool: flags.BooleanParser().parse, tuple: _tuple}.get(kind, kind)
        try:
            return parse(value)
        except (ValueError, SyntaxError):
            raise mistyped(value, kind, path) from None
    if kind is float and type(value) is int:
        return float(value)
    if kind is tuple and isinstance(value, list):
        return tuples(value)
    if not is_a(value, kind):
        raise mistyped(value, kind, path)
    return value


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false", "none"):
        text = text.capitalize()
    try:
        return tuples(ast.literal_eval(text))
    except (ValueError, SyntaxError):
        return text


def _tuple(text: str) -> tuple[Any, ...]:
    """Reads `1,2`, `(1, 2)`, `a,b`, `('a', 'b')` and the empty string."""
    try:
        value = ast.literal_eval(text.strip() or "()")
    except (ValueError, SyntaxError):
        if text.lstrip()[0] in "([{":
            raise
        parts = re.findall(r"""(?:'[^']*'|"[^"]*"|[^,])+""", text)
        value = tuple(_literal(part.strip()) for part in parts if part.strip())
    return tuples(value) if isinstance(value, (tuple, list)) else (value,)


def data_follow_seed(config: ConfigDict) -> bool:
    """Returns whether runs that differ only in `seed` have different data: faults or parts."""
    return "run" in (config.data.corrupt.get("seed"), config.data.kwargs.get("split_seed"))


def data_arguments(config: ConfigDict) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arguments of the data and of their faults, with the seed of the run for "run"."""
    kwargs, faults = config.data.kwargs.to_dict(), config.data.corrupt.to_dict()
    for group, key in ((kwargs, "split_seed"), (faults, "seed")):
        if group.get(key) == "run":
            group[key] = config.seed
    return kwargs, faults


def arms(config: ConfigDict, chosen: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Returns what each arm of the study overrides: `{arm: {dotted path: value}}`.

    A value `"setting:NAME#PATH"` is that of another arm, or of the arm that `study.tuned` chooses
    under that name; see `settings`.

    Args:
      config: of the study.
      chosen: the arm that each name of `study.tuned` stands for; by default its first candidate.
    """
    raw = {name: dict(flatten(changes)) for name, changes in config.study.arms.items()}
    return settings.resolved(config, raw, chosen or {})


def without_study(config: ConfigDict) -> ConfigDict:
    """Returns a copy of a config as that of one run, which is cheaper to override."""
    single = override(config, {})
    single.study = base().study
    return single
