"""Durations: a number of steps, or a number with a unit, such as "20 epochs".

`500`, `"500 steps"`, `"20 epochs"`, `"100000 examples"`, and `"10 %"` of training.
"""

import math
import re

from distill_jax.core.errors import ArgumentError, ArgumentTypeError, nearest

UNITS = ("steps", "epochs", "examples", "percent")

_NAMES = {"": "steps", "%": "percent", **{u: u for u in UNITS}, **{u[:-1]: u for u in UNITS[:3]}}
_TEXT = re.compile(r"\s*([-+]?(?:[\d_.]+(?:e[-+]?\d+)?|nan|inf))\s*([^\W\d_]*|%)\s*", re.IGNORECASE)


def parse(value: int | float | str, name: str = "duration") -> tuple[float, str]:
    """Returns the number and the unit of a duration, one of `UNITS`.

    Args:
      value: a number of steps, or a text; without a unit it counts steps.
      name: the argument to name in errors.

    Raises:
      ArgumentError: the string is not a duration, or the number is negative or not finite.
      ArgumentTypeError: the value is neither a number nor a string.
    """
    hint = "a number of steps, or '20 epochs', '500 steps', '100000 examples', '10 %'"
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ArgumentTypeError(f"{value!r} is not a duration", where=name, hint=hint)
    if isinstance(value, str):
        number, unit = _read(value, name, hint)
    else:
        number, unit = value, "steps"
    if not 0 <= number < math.inf:
        raise ArgumentError(f"{value!r} is not positive", where=name, hint=hint)
    if unit == "percent" and number > 100:
        raise ArgumentError(f"{value!r} is more than 100 %", where=name)
    return number, unit


def _read(text: str, name: str, hint: str) -> tuple[float, str]:
    match = _TEXT.fullmatch(text)
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        match, number = None, math.nan
    if match is None:
        raise ArgumentError(f"{text!r} is not a duration", where=name, hint=hint)
    unit = _NAMES.get(match[2].lower())
    if unit is None:
        unknown = f"{text!r} has an unknown unit {match[2]!r}"
        raise ArgumentError(unknown, where=name, hint=nearest(match[2], UNITS))
    return int(number) if number.is_integer() else number, unit


def spell(number: float, unit: str = "steps") -> str:
    """Returns a duration as one value: `"20 epochs"`, `"1 step"`, `"10 %"`."""
    text = str(number) if isinstance(number, int) else f"{number:.17g}"
    if isinstance(number, float) and float(f"{number:.15g}") == number:
        text = f"{number:.15g}"
    if unit == "percent":
        return f"{text} %"
    return f"{text} {unit[:-1] if text == '1' else unit}"


def steps(
    value: int | float | str,
    name: str = "duration",
    *,
    steps_per_epoch: float | None = None,
    total_steps: int | None = None,
    batch_size: int | None = None,
) -> float:
    """Returns a duration in steps, not rounded.

    Args:
      value: a number of steps, or a text.
      name: the argument to name in errors.
      steps_per_epoch: length of an epoch; durations in epochs need it.
      total_steps: length of training; durations in percent need it.
      batch_size: examples of a step; durations in examples need it.

    Raises:
      ArgumentError: as in `parse`, or the unit needs an argument that is not given.
    """
    number, unit = parse(value, name)
    if unit == "steps":
        return number
    argument, scale = {
        "epochs": ("steps_per_epoch", steps_per_epoch),
        "percent": ("total_steps", None if total_steps is None else total_steps / 100),
        "examples": ("batch_size", None if batch_size is None else 1 / batch_size),
    }[unit]
    if scale is None:
        hint = f"give {argument}, or a number of steps"
        raise ArgumentError(f"{value!r} needs {argument}", where=name, hint=hint)
    return number * scale
