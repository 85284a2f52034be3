"""Tables of names: every module here has `FAMILIES`, a tuple of `mapping.Family`.

`recognise` finds the table of a file by its names and shapes.
"""

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from distill_jax.core.errors import nearest
from distill_jax.weights import common
from distill_jax.weights.common import Weights
from distill_jax.weights.mapping import Family, MappingError, Specs, listed, matches, specs_of


@functools.cache
def families() -> Mapping[str, Family]:
    """Returns all tables by name."""
    modules = (
        importlib.import_module(f"{__name__}.{module.name}")
        for module in pkgutil.iter_modules(__path__)
        if not module.name.startswith("_")
    )
    return {family.name: family for module in modules for family in module.FAMILIES}


def family(name: str) -> Family:
    """Returns a table.

    Raises:
      MappingError: there is none of this name.
    """
    known = families()
    if name not in known:
        raise MappingError(f"no family {name!r}", hint=nearest(name, known))
    return known[name]


class Recognised(NamedTuple):
    """What a file is.

    Attributes:
      family: its table.
      kwargs: arguments of the network, as the shapes tell them.
      prefix: what the names of the network begin with in the file.
    """

    family: Family
    kwargs: Mapping[str, Any]
    prefix: str


def recognise(weights: Mapping[str, np.ndarray]) -> Recognised:
    """Finds the family and the size of the network that a file holds.

    Raises:
      MappingError: no table knows its names, or several networks are in it.
    """
    specs = specs_of(weights)
    candidates: list[tuple[int, Recognised]] = []
    for known in families().values():
        for prefix in _prefixes(specs, known.signature):
            inside = {
                name.removeprefix(prefix): spec
                for name, spec in specs.items()
                if name.startswith(prefix)
            }
            try:
                kwargs = known.describe(inside)
                score = _covered(known, kwargs, inside)
            except (KeyError, ValueError, IndexError):
                continue
            candidates.append((score, Recognised(known, kwargs, prefix)))
    where = common.place(weights.path) if isinstance(weights, Weights) else ""
    if not candidates:
        raise MappingError(
            f"holds no network that is known here; its tensors are named {listed([*specs], 3)}",
            where=where,
            hint=f"families: {', '.join(sorted(families()))}",
        )
    best = max(score for score, _ in candidates)
    chosen = {}  # by where they begin: several tables may know one network, of which one is enough
    for score, one in sorted(candidates, key=lambda pair: len(pair[1].prefix)):
        if score == best:
            chosen.setdefault(one.prefix + one.family.signature[0], one)
    if len(chosen) > 1:
        names = [f"{one.family.name} at {one.prefix!r}" for one in chosen.values()]
        raise MappingError(
            f"may be {' or '.join(names)}", where=where, hint="the family and the prefix, named"
        )
    return next(iter(chosen.values()))


def _prefixes(specs: Specs, signature: tuple[str, ...]) -> list[str]:
    """Returns what stands before the names of a signature wherever all of them are there."""
    first = signature[0]
    candidates = [
        name.removesuffix(first)
        for name in specs
        if name == first or name.endswith((f".{first}", f"/{first}"))
    ]
    return [p for p in candidates if all(f"{p}{name}" in specs for name in signature)]


def _covered(known: Family, kwargs: Mapping[str, Any], inside: Specs) -> int:
    """Returns how many names have a place in the table, less those that have none."""
    rules = known.tensors(kwargs)
    placed = 0
    for name in inside:
        ruled = any(s.match(name) is not None for rule in rules for s in rule.sources)
        placed += ruled or name in known.tied or matches(name, known.ignored)
    return 2 * placed - len(inside)
