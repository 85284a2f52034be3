"""Checks of the ranges of numbers in a config, made where the numbers are used."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from distill_jax.core.errors import ArgumentError

DEEPEST = 2000
"""Maximum number of layers, blocks or rounds of a network or a method, each traced separately."""

MOST = 10**6
"""Maximum number of items that a method keeps for each example, or a measure for each split."""

_INTERVAL = re.compile(r"([\[(])\s*(\S+)\s*,\s*(\S+?)\s*([\])])")


def within(interval: str, *, where: str = "", whole: bool = False, **values: Any) -> None:
    """Checks that numbers are in an interval; NaN is outside every interval.

    Args:
      interval: such as "[0, 1)"; an end may be "inf".
      where: config path of the group that has the values; empty if the caller adds it.
      whole: whether only integers are valid.
      **values: values by name; the items of a tuple are checked, None is skipped.

    Raises:
      ArgumentError: a value is out of range; the message names the first one and the valid range.
    """
    match = _INTERVAL.fullmatch(interval)
    assert match, interval
    low, high = float(match[2]), float(match[3])
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    for name, value in values.items():
        items: Any = (
            value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
        )
        for item in () if value is None else items:
            number = isinstance(item, kinds) and not isinstance(item, bool)
            above = number and (item > low or (match[1] == "[" and item == low))
            below = number and (item < high or (match[4] == "]" and item == high))
            if not (above and below and math.isfinite(item)):
                path = f"{where}.{name}" if where else name
                raise ArgumentError(f"{name} is {value!r}", where=path, hint=_spell(match, whole))


def _spell(match: re.Match, whole: bool) -> str:
    _, low, high, _ = match.groups()
    start = f"{low} or more" if match[1] == "[" else f"above {low}"
    end = f"at most {high}" if match[4] == "]" else f"below {high}"
    ends = start if high == "inf" else end if low == "-inf" else f"{start} and {end}"
    return ("a whole number, " if whole else "a number, ") + ends


def sizes(*, where: str = "", **values: Any) -> None:
    """Checks that values are integers of at least 1: widths, lengths, counts."""
    within("[1, inf)", where=where, whole=True, **values)


def counts(*, where: str = "", **values: Any) -> None:
    """Checks that values are integers of at least 0."""
    within("[0, inf)", where=where, whole=True, **values)


def depths(*, where: str = "", **values: Any) -> None:
    """Checks that values are integers from 1 to `DEEPEST`: counts of parts built one by one."""
    within(f"[1, {DEEPEST}]", where=where, whole=True, **values)


def rates(*, where: str = "", **values: Any) -> None:
    """Checks that values are dropout rates: from 0 to below 1."""
    within("[0, 1)", where=where, **values)
