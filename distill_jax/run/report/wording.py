"""Numbers and configs as text."""

import json
import math
from collections.abc import Mapping
from typing import Any

NONE = "\u2013"


def is_finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def fmt(value: Any) -> str:
    """Returns four decimals, or four digits where those would hide the number."""
    if not is_finite(value):
        return NONE
    plain = value == 0 or 1e-3 <= abs(value) < 1e4
    return minus(f"{value:.4f}" if plain else f"{value:.4g}")


def minus(text: str) -> str:
    return text.replace("-", "\u2212")


def decimals(value: float) -> int:
    """Returns four, or as many as show three digits of a smaller value."""
    return max(4, 2 - math.floor(math.log10(abs(value)))) if value else 4


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def si(value: float | None) -> str:
    if value is None:
        return NONE
    for scale, suffix in (
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {suffix}"
    return f"{value:.4g}"


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
