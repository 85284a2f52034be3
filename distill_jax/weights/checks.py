"""Reports about weights: a table of them, and values that are not finite."""

from collections.abc import Mapping

import numpy as np

from distill_jax.weights import common
from distill_jax.weights.common import Weights, shown

_WIDTH = 120


def summary(weights: Weights) -> str:
    """Returns a table of names, shapes and dtypes under a line of totals.

    Tensors of several names are counted once. Names are escaped, so that none can act on a
    terminal.
    """
    again = {name for names in weights.tied for name in names[1:]}
    counted = [spec for name, spec in weights.specs.items() if name not in again]
    elements = sum(spec.size for spec in counted)
    nbytes = sum(spec.nbytes for spec in counted)
    tensors = f"{len(weights)} tensor{'s' if len(weights) != 1 else ''}"
    total = f"{weights.format}: {tensors}, {elements:,} elements, {common.size_of(nbytes)}"
    rows = [("name", "shape", "dtype")]
    for name, spec in weights.specs.items():
        shown_name = name if name.isprintable() and name else ascii(name)
        if len(shown_name) > _WIDTH:  # else one long name makes every row as long
            shown_name = f"{shown_name[: _WIDTH - 3]}..."
        shape = " x ".join(map(str, spec.shape)) or "scalar"
        rows.append((shown_name, shape, spec.dtype.name))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    rows.insert(1, ("-" * widths[0], "-" * widths[1], "-" * widths[2]))
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    for names in weights.tied:
        lines.append(f"one tensor: {', '.join(map(shown, names))}")
    return "\n".join(line.rstrip() for line in [total, "", *lines])


def check_finite(weights: Mapping[str, np.ndarray]) -> None:
    """Checks that no floating-point value is NaN or infinite.

    Raises:
      WeightsError: some are; the message has their tensors and counts.
    """
    damaged = []
    for name in weights:
        if count := _not_finite(weights[name]):
            damaged.append(f"{shown(name)} has {count} of {weights[name].size}")
    if damaged:
        more = f" and {len(damaged) - 5} more tensors" if len(damaged) > 5 else ""
        where = common.place(weights.path) if isinstance(weights, Weights) else ""
        raise common.WeightsError(
            f"has values that are not finite: {', '.join(damaged[:5])}{more}",
            where=where,
            hint="weights of a run that did not diverge",
        )


def _not_finite(array: np.ndarray) -> int:
    """Returns the number of values that are not finite, computed a part at a time."""
    if array.dtype.kind in "biu" or not array.size:
        return 0
    parts = np.nditer(
        array, flags=["external_loop", "buffered"], op_flags=["readonly"], buffersize=1 << 16
    )
    return sum(int(np.size(part) - np.isfinite(part).sum()) for part in parts)
