"""Plain-text tables and number formats, common to training, evaluation and studies."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

CONTROLS = ("_initial", "_raw")
"""Suffixes of metrics that do not describe the network itself, see `api.Evaluator`."""


def is_finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def number(value: Any) -> str:
    """Returns the number with four decimals, or four digits if the decimals would hide it."""
    if not is_finite(value):
        return "-"
    plain = value == 0 or 1e-3 <= abs(value) < 1e4
    return f"{value:.4f}" if plain else f"{value:.4g}"


def decimals(value: float) -> int:
    """Returns 4, or as many decimals as show three digits of a smaller value."""
    return max(4, 2 - math.floor(math.log10(abs(value)))) if value else 4


_PREFIXES = {1e18: "E", 1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k"}


def si(value: float) -> str:
    """Returns three digits and the SI prefix of the following unit."""
    for scale, prefix in _PREFIXES.items():
        if abs(value) >= scale:
            return f"{value / scale:.3g} {prefix}"
    return f"{value:.4g}"


def flop(value: float) -> str:
    """Returns a number of floating-point operations with its unit."""
    text = si(value)
    return f"{text}FLOP" if text[-1].isalpha() else f"{text} FLOP"


def plain(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Returns a table whose cells are flush left under a ruled header."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * w for w in widths], *rows]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in lines
    )


def metrics(states: Mapping[str, Mapping[str, Any]], *, chosen_by: str = "") -> str:
    """Returns a table of measurements: one row for each metric, one column for each state.

    The rows start with the metric that selects the best state, on every split, and the accuracy,
    followed by the others by name and their controls. A state without values has no column.

    Args:
      states: `{state: {"step": step, "<split>/<metric>": value}}`, in the order of the columns.
      chosen_by: `"<split>/<metric>"` of the config, or nothing.
    """
    states = {title: values for title, values in states.items() if values}
    names = sorted({name for values in states.values() for name in values} - {"step"})
    head = [chosen_by.rpartition("/")[2], "accuracy"]
    first = [n for h in dict.fromkeys(head) if h for n in names if n.rpartition("/")[2] == h]
    rest = sorted((n for n in names if n not in first), key=lambda n: (n.endswith(CONTROLS), n))
    width = max(28, *(len(name) + 2 for name in names), 0)

    def row(name: str, cells: Sequence[str]) -> str:
        return f"{name:{width}}" + "".join(f"{cell:>12}" for cell in cells)

    def rows(group: Sequence[str]) -> list[str]:
        return [row(n, [number(values.get(n)) for values in states.values()]) for n in group]

    steps = [str(values.get("step", "-")) for values in states.values()]
    lines = [row("", list(states)), row("step", steps), *rows(first)]
    return "\n".join([*lines, *([""] if first and rest else []), *rows(rest)])
