"""Transforms by name, and the range of image values that each one expects."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.core.api import Transform
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.data import moments

TAKES: Mapping[str, str] = {
    "scale": "pixels",
    "downscale": "pixels",
    "columns": "pixels",
    "normalize": "pixels",
    "prepare": "pixels",
    "color_jitter": "unit",
    "solarize": "unit",
}
"""What transforms presuppose of the values of an image: "pixels", uint8 or floats that are meant as
they are; "unit", floats in [0, 1]."""

NORMALIZING = ("normalize", "prepare")

CARD = "card:"
"""Before the name of a role: the transform `prepare` with the arguments of the role's card."""


def builders() -> dict[str, Callable[..., Transform]]:
    """Returns the builders of all transforms by name."""
    # Views are made of transforms by name.
    from distill_jax.data import masks
    from distill_jax.data.transforms import (
        colour,
        denoising,
        geometry,
        mixing,
        prepare,
        rankings,
        refinement,
        tokens,
        values,
        views,
    )

    texts = (tokens, denoising, refinement)
    return {
        key.removeprefix("make_"): value
        for module in (values, geometry, prepare, colour, mixing, rankings, *texts, views, masks)
        for key, value in vars(module).items()
        if key.startswith("make_")
    }


def resolve(name: str, *, where: str = "batch") -> Callable[..., Transform]:
    """Returns the builder `make_<name>`.

    Raises:
      ArgumentError: there is none; the hint names the nearest.
    """
    known = builders()
    if name not in known:
        raise ArgumentError(f"no transform {name!r}", where=where, hint=nearest(name, known))
    return known[name]


def check_values(
    names: Sequence[Any],
    kwargs: Mapping[str, Any],
    values: moments.Values,
    *,
    where: str = "batch",
    kind: str = "",
) -> str:
    """Tracks the range of an image's values through transforms.

    Args:
      names: transforms in order: names, or pairs of a name and its keyword arguments.
      kwargs: keyword arguments by name, of names without.
      values: of the training part.
      where: the config path of the list.
      kind: of the values before the first transform; by default that of the data.

    Returns:
      The kind of the values after the last one: see `moments.Values.kind`; "normalized"; or ""
      after a user's own transform.

    Raises:
      ArgumentError: values reach a transform in units that it does not take. The hint names the
        nearest order that is right.
    """
    kind = kind or values.kind
    plain = [name if isinstance(name, str) else name[0] for name in names]
    plain = ["prepare" if name.startswith(CARD) else name for name in plain]
    for i, name in enumerate(plain):
        if ":" in name:
            return ""
        own = dict(kwargs.get(name, {}) if isinstance(names[i], str) else names[i][1])
        if name in ("views", "local_views"):
            for part in ("transforms", "second"):
                nested = own.get(part) or ()
                at = f"{name}.{part}"
                check_values(nested, {}, values, where=at, kind=kind)
        takes = TAKES.get(name)
        if takes == "pixels" and kind == "grey" and values.is_image and name != "columns":
            mean = own.get("mean")
            fits = name == "normalize" and (mean is None or np.max(mean) > 1.5)
            if not fits:
                raise ArgumentError(
                    f"{name} leaves floats in their units, and these are {values.interval}",
                    where=where,
                    hint="store images as uint8, divide them by their largest value, or take "
                    "normalize without mean and std, which then are those of the training part",
                )
        if takes == "unit" and kind not in ("unit", "bytes"):
            raise _not_unit(name, plain, values, kind, where)
        if takes == "pixels":
            binary = kind == "bytes" and values.high <= 1 and values.low < values.high
            if binary and (name != "normalize" or own.get("mean") is not None):
                raise ArgumentError(
                    f"{name} divides uint8 by 255, and these pixels are only 0 and 1",
                    where=where,
                    hint="store them as floats, multiply them by 255, or take normalize without "
                    "mean and std, which then are those of the training part",
                )
            if name in NORMALIZING:
                kind = "normalized"
            elif kind == "bytes":
                kind = "unit"
    return kind


def _not_unit(
    name: str, names: Sequence[str], values: moments.Values, kind: str, where: str
) -> ArgumentError:
    if kind == "normalized":
        by = next((other for other in names if other in NORMALIZING), "normalize")
        order = [other for other in names if other != by]
        last = max(i for i, other in enumerate(order) if TAKES.get(other) == "unit")
        order.insert(last + 1, by)
        before = ["scale"] if values.kind == "bytes" and "scale" not in order else []
        return ArgumentError(
            f"{name} takes values in [0, 1], and {by} comes before it",
            where=where,
            hint=f"the order {', '.join([*before, *order])}",
        )
    return ArgumentError(
        f"{name} takes values in [0, 1], and these are {values.interval}: "
        f"{100 * values.outside:.1f} % are outside",
        where=where,
        hint="store images as uint8 and put scale first, or divide them by their largest value",
    )
