"""Statistics of a data set: ranges, moments, and the sampling error of a metric measured on it."""

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from distill_jax.core.api import Source
from distill_jax.core.errors import ArgumentError

SCANNED_BYTES = 2**30
"""Floating-point parts up to this size are scanned in full when they are opened."""


SAMPLE = 1024
"""Examples of a part, evenly spaced, from which the statistics of its values are taken."""


CHUNK_BYTES = 2**24
"""About so many bytes are read at a time."""


LUCK = 0.07
"""A best accuracy that may be so much too good by chance is no reason to choose a state."""


class Values(NamedTuple):
    """Statistics of the values of one input array.

    Attributes:
      shape: of one example.
      dtype: of the array.
      low: the smallest value that was read.
      high: the largest.
      mean: by channel (the last axis), `[c]`.
      std: by channel, `[c]`.
      outside: share of the values that lie outside [0, 1].
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    low: float
    high: float
    mean: np.ndarray
    std: np.ndarray
    outside: float

    @property
    def kind(self) -> str:
        """ "bytes" (uint8), "unit" (floats in [0, 1]), "grey" (floats from 0 up), or "other"."""
        if self.dtype == np.uint8:
            return "bytes"
        if not np.issubdtype(self.dtype, np.floating):
            return "other"
        if self.outside <= 0.02:
            return "unit"
        return "grey" if self.low >= 0 and self.high > 4 else "other"

    @property
    def is_image(self) -> bool:
        return len(self.shape) == 3

    @property
    def interval(self) -> str:
        return f"{self.low:.4g} to {self.high:.4g}"


def spread(n: int, most: int) -> np.ndarray:
    """Returns at most `most` positions, evenly spaced over `n`."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(np.int64))


def example_array(source: Source, name: str, *, chunk: int = 4096) -> np.ndarray | None:
    """Returns an array of all examples `[n, ...]`, read in chunks; None where they have none."""
    if not len(source) or name not in source.read(np.zeros(1, np.int64)):
        return None
    starts = range(0, len(source), chunk)
    rows = (source.read(np.arange(i, min(i + chunk, len(source)))) for i in starts)
    return np.concatenate([row[name] for row in rows])


def limits_of(values: np.ndarray) -> tuple[float, float]:
    """Smallest and largest value; NaN where one is among them."""
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def values_of(sample: np.ndarray, limits: tuple[float, float]) -> Values:
    if not sample.size or sample.dtype.kind not in "iufb":
        nothing = np.zeros(1)
        return Values(sample.shape[1:], sample.dtype, 0.0, 0.0, nothing, nothing, 0.0)
    low, high = limits_of(sample)
    low, high = min(low, limits[0]), max(high, limits[1])
    flat = sample.reshape(-1, sample.shape[-1]) if sample.ndim > 1 else sample.reshape(-1, 1)
    numbers = flat.astype(np.float64)
    outside = float(((numbers < -1e-3) | (numbers > 1 + 1e-3)).mean())
    mean, std = numbers.mean(0), numbers.std(0)
    return Values(sample.shape[1:], sample.dtype, low, high, mean, std, outside)


def root(source: Any) -> Any:
    """Returns the source at the root of a chain of subsets."""
    while isinstance(getattr(source, "source", None), Source):
        source = source.source
    return source


_STATISTICS: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}


def statistics(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation by channel, `[c]` each, float64.

    Those of uint8 are on the scale [0, 1]. All examples count where they take at most
    `SCANNED_BYTES`, else as many as that, evenly spaced. A channel without variation has the
    deviation 1.

    Raises:
      ArgumentError: the input is not one array.
    """
    n = len(source)
    one = source.read(np.zeros(1, np.int64))["input"]
    if isinstance(one, Mapping):
        hint = "leave it out: the numeric columns of a table come scaled"
        raise ArgumentError("the input is a table, not images", where="normalize", hint=hint)
    channels = one.shape[-1]
    if getattr(root(source), "shapes_only", False):
        return np.zeros(channels), np.ones(channels)
    key = (source.provenance.sha256, n)
    if key[0] and key in _STATISTICS:
        return _STATISTICS[key]
    rows = spread(n, max(1, SCANNED_BYTES // max(one.nbytes, 1)))
    step = max(1, CHUNK_BYTES // max(one.nbytes, 1))
    unit = 1 / 255 if one.dtype == np.uint8 else 1.0
    count, mean, square = 0, np.zeros(channels), np.zeros(channels)
    for start in range(0, len(rows), step):  # Chan, Golub, LeVeque (1979): merging of moments
        x = source.read(rows[start : start + step])["input"].reshape(-1, channels)
        x = x.astype(np.float64) * unit
        here, centre = len(x), x.mean(0)
        delta, total = centre - mean, count + here
        square += ((x - centre) ** 2).sum(0) + delta**2 * count * here / total
        mean, count = mean + delta * here / total, total
    std = np.sqrt(square / max(count, 1))
    moments = mean, np.where(std > 1e-6 * np.abs(mean), std, 1.0)
    if key[0]:
        _STATISTICS.clear()
        _STATISTICS[key] = moments
    return moments


def odd_statistics(values: Values, mean: Any, std: Any) -> str:
    """Explains why `(x - mean) / std` does not normalize these data; empty where it may.

    A mean off by more than a quarter of a deviation, or a deviation off by a half, indicates other
    data. The map of [0, 1] onto [-1, 1] is a convention and passes.
    """
    unit = 1 / 255 if values.dtype == np.uint8 else 1.0
    own_mean, own_std = values.mean * unit, values.std * unit
    mean, std = (np.atleast_1d(np.asarray(x, np.float64)) for x in (mean, std))
    if not own_std.any() or (np.allclose(mean, 0.5) and np.allclose(std, 0.5)):
        return ""
    shift = np.abs(own_mean - mean).mean() / std.mean()
    ratio = float(np.sqrt((own_std**2).mean()) / std.mean())
    if shift <= 0.25 and 2 / 3 <= ratio <= 1.5:
        return ""
    spell = lambda x: "(" + ", ".join(f"{v:.3f}" for v in x) + ",)"  # noqa: E731
    return (
        f"mean {spell(mean)} and std {spell(std)} are not of these data, which have "
        f"{spell(own_mean)} and {spell(own_std)}"
    )


def standard_error(n: int, value: float = 0.5) -> float:
    """Returns the standard error of a share `value` that was measured on `n` examples."""
    return float(np.sqrt(max(value * (1 - value), 0.0) / n))


def small_part(n: int, metric: str, *, measurements: int) -> str:
    """Warns that `n` held-out examples are too few for selection; empty where they suffice.

    Of M measurements with independent normal errors the largest is expected to be
    `standard_error * q((M - 3/8) / (M + 1/4))` too high, with the normal quantile q (Blom 1958).

    Args:
      n: examples of the part that the metric is measured on.
      metric: metric used to choose the best state.
      measurements: M, number of states to choose from.
    """
    if not metric or n < 1 or measurements < 2:
        return ""
    error, share = standard_error(n), (measurements - 0.375) / (measurements + 0.25)
    if error * NormalDist().inv_cdf(share) <= LUCK:
        return ""
    return (
        f"{metric} on {n} examples chooses among {measurements} states: an accuracy on so few has "
        f"a standard error of up to {error:.3f}, so the best state is largely chosen by chance"
    )
