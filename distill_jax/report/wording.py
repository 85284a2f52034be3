"""Numbers and configs as text."""

import json
import re
from collections.abc import Mapping
from typing import Any

from distill_jax.evaluators._directions import direction
from distill_jax.report import tables
from distill_jax.report.tables import decimals, is_finite, number

__all__ = ["decimals", "is_finite"]

NONE = "\u2013"


def fmt(value: Any) -> str:
    """Formats a number as in the tables of the console."""
    return minus(number(value)) if is_finite(value) else NONE


def better(metric: str) -> str:
    """Returns " (lower is better)" or " (higher is better)"; "" where it is not known."""
    ends = {"min": " (lower is better)", "max": " (higher is better)", None: ""}
    return ends[direction(metric)]


def minus(text: str) -> str:
    """Gives negative numbers a minus sign; hyphens in words stay."""
    return re.sub(r"(?<![\w.])-(?=[\d.])|(?<=\de)-(?=\d)", "\u2212", text)


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def si(value: float | None) -> str:
    return NONE if value is None else tables.si(value)


def alarm_line(alarm: Mapping[str, Any]) -> str:
    return f"alarm ({alarm['rule']}) at step {alarm['step']}: {alarm['metric']} {alarm['message']}"


def cut(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns leaves as text by dotted path."""
    leaves: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= flat(value, f"{prefix}{name}.")
        else:
            plain = isinstance(value, str)
            leaves[f"{prefix}{name}"] = value if plain else json.dumps(value, default=str)
    return leaves


def joined(value: Any) -> str:
    """Returns the leaves of a tree on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {text}" for name, text in flat(value).items())
    return value if isinstance(value, str) else json.dumps(value, default=str)


def variants(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return cut(next(iter(counts)))
    total = sum(counts.values())
    shown = [f"{cut(value, 160)} ({n} of {total})" for value, n in list(counts.items())[:3]]
    more = len(counts) - len(shown)
    return "; ".join(shown) + (f"; {more} more" if more else "")
