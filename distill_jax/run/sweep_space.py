"""The trials of a sweep: a grid of values by config path, or random draws from it."""

import ast
import itertools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distill_jax.core.errors import UserError
from distill_jax.run import config_files, paths

MOST = 100_000
"""Trials of a sweep."""


class SweepError(UserError):
    """A sweep that cannot be run as written."""


def read_space(spec: str) -> dict[str, Any]:
    """Returns what `sweep()` of a config file returns, its values as lists and ranges.

    Raises:
      UserError: there is no such file or function, it raises, or it returns something else.
    """
    paths.make_importable()
    path = config_files.find(spec.partition(":")[0])
    space = config_files.run(path).get("sweep")
    if not callable(space):
        raise SweepError(f"{path} has no function sweep()")
    with config_files.explained(path):
        found = space()
    if not isinstance(found, Mapping) or not found:
        raise SweepError(f"sweep() of {path} returned no dict of values by config path")
    return {name: _checked(name, values) for name, values in found.items()}


def _checked(path: Any, values: Any) -> Any:
    """Returns the values of a config path as a list, or a range as it is.

    Raises:
      SweepError: neither, or a value that a command line cannot hold.
    """
    where = f"sweep() at {path!r}"
    if not isinstance(path, str) or not path:
        raise SweepError("is no config path", where=where, hint="such as 'optim.lr'")
    if _is_range(values):
        kind, low, high = values
        numbers = all(isinstance(x, (int, float)) and math.isfinite(x) for x in (low, high))
        if not numbers or not low < high or (kind == "log_uniform" and low <= 0):
            hint = f"({kind!r}, low, high), low < high"
            hint += ", both above 0" if kind == "log_uniform" else ""
            raise SweepError(f"{values!r} is no range", where=where, hint=hint)
        return values
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        hint = f"[{values!r}] for this one value"
        raise SweepError(f"{values!r} is no list of values", where=where, hint=hint)
    listed = [_plain(value, where) for value in itertools.islice(values, MOST + 1)]
    if not listed:
        raise SweepError("has no values", where=where, hint="list one or more")
    kinds = [isinstance(value, (int, float)) for value in listed[1:]]
    if isinstance(values, tuple) and isinstance(listed[0], str) and any(kinds):
        hint = " or ".join(f"({kind!r}, low, high)" for kind in _DRAWS)
        raise SweepError(f"{values!r} is no range", where=where, hint=hint)
    return listed


def _plain(value: Any, where: str) -> Any:
    """Returns a value of Python's own types, such as a number of NumPy's as Python's."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, (tuple, list)):
        return tuple(_plain(item, where) for item in value)
    finite = not isinstance(value, float) or math.isfinite(value)
    if not finite or not (value is None or isinstance(value, (bool, int, float, str))):
        what = f"{value!r} cannot stand on a command line"
        raise SweepError(what, where=where, hint="numbers, strings, None and tuples of them")
    return value


def _is_range(values: Any) -> bool:
    return isinstance(values, tuple) and len(values) == 3 and _draws(values[0])


def _draws(kind: Any) -> bool:
    return isinstance(kind, str) and kind in _DRAWS


_DRAWS = {
    "uniform": lambda generator, low, high: generator.uniform(low, high),
    "log_uniform": lambda generator, low, high: math.exp(
        generator.uniform(math.log(low), math.log(high))
    ),
}


def read_grid(given: Sequence[str]) -> dict[str, Any]:
    """Returns the values by config path of `--grid=KEY=VALUE,VALUE` flags.

    Raises:
      SweepError: a flag is no key and values, or a key is given twice.
    """
    space: dict[str, Any] = {}
    for text in given:
        path, mark, values = text.partition("=")
        path = path.strip().removeprefix("config.")
        if not mark or not path or not values:
            raise SweepError(f"{text!r} is no grid", where="--grid", hint="optim.lr=0.03,0.1,0.3")
        if path in space:
            raise SweepError("the key is given twice", where=f"--grid={path}", hint="keep one")
        space[path] = _checked(path, [_value(part) for part in _split(values)])
    return space


def _split(text: str) -> list[str]:
    """Splits at commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        depth += (letter in "([{") - (letter in ")]}") if not quote else 0
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _value(text: str) -> Any:
    constants = {"true": True, "false": False, "none": None}
    if text.lower() in constants:
        return constants[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def grid(space: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns every combination; the last path varies fastest.

    Raises:
      SweepError: a path has a range in place of values.
    """
    for path, values in space.items():
        if _is_range(values) or not values:
            raise SweepError(f"{path} has no list of values: give --random=N, or list them")
    n = math.prod(len(values) for values in space.values())
    if n > MOST:
        raise SweepError(f"{n:,} combinations, at most {MOST:,}", hint="--random=N draws some")
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def draw(space: Mapping[str, Any], *, n: int, seed: int) -> list[dict[str, Any]]:
    """Returns n independent draws; the first m of n are those of m."""
    generator = random.Random(seed)

    def one(values: Any) -> Any:
        if _is_range(values):
            kind, low, high = values
            return float(f"{_DRAWS[kind](generator, low, high):.6g}")
        return generator.choice(list(values))

    return [{path: one(values) for path, values in space.items()} for _ in range(n)]
