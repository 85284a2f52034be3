"""Checks that every data set passes when it is opened, whatever its source.

A network trains on almost anything without an error: a missing value, one part in other units than
another, a channel axis in the wrong place, labels that wrap around. Each check is a function of the
arrays alone. What cannot be right raises; what is unusual gives a warning.

Floating-point inputs are read once. Parts larger than `SCANNED_BYTES` are sampled, and the rest is
checked as it is read (`Guarded`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import numpy as np

from distill_jax.core.api import Dataset, Source
from distill_jax.core.errors import ArgumentError, DataUnavailable, nearest
from distill_jax.data import labels as labels_lib

PARTS = ("train", "held_out", "test")

SCANNED_BYTES = 2**30
"""Floating-point parts up to this size are scanned in full when they are opened."""

SAMPLE = 1024
"""Examples of a part, evenly spaced, from which the statistics of its values are taken."""

CHUNK_BYTES = 2**24
"""About so many bytes are read at a time."""

LOOKED_AT_BYTES = 2**28
"""Data up to this size are searched for examples that occur in two parts."""

COMPARED = 64
"""Examples of larger data that are compared at equal positions instead."""

MOST_CLASSES = 2**20
"""More classes than this are taken for identifiers, before anything of their number is made."""

CHANNELS = (1, 3, 4)
"""Numbers of channels of an image."""

SPREAD = 16.0
"""Parts whose standard deviations differ by more than this factor are in different units."""

LUCK = 0.07
"""A best accuracy that may be so much too good by chance is no reason to choose a state."""


class Values(NamedTuple):
    """What the values of one input array are like.

    Attributes:
      shape: of one example.
      dtype: of the array.
      low: the smallest value that was looked at.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What was found in a data set.

    Attributes:
      warnings: one line each, without a full stop.
      values: of the training part, where the input is one array; None where it is not, or where
        only shapes are known.
      scanned: whether all values were looked at.
    """

    warnings: tuple[str, ...] = ()
    values: Values | None = None
    scanned: bool = True


# Names of classes.


def class_names(classes: Any, *, where: str = "classes") -> tuple[str, ...]:
    """Returns names of classes; a string of several is split at its commas.

    Raises:
      ArgumentError: a single name, an empty one, or one that occurs twice.
    """
    if isinstance(classes, str):
        names = tuple(name.strip() for name in classes.split(",")) if classes else ()
        if len(names) == 1:
            raise ArgumentError(
                f"{classes!r} is one name", where=where, hint="names with commas between: cat,dog"
            )
    else:
        names = tuple(classes)
    for name in names:
        if name == "" or names.count(name) > 1:
            what = (
                f"the name {name!r} occurs {names.count(name)} times" if name else "a name is empty"
            )
            raise ArgumentError(what, where=where, hint="one name for each class, in label order")
    return names


def count_classes(parts: Mapping[str, np.ndarray], *, where: str = "data") -> int:
    """Returns the number of classes of data whose classes have no names.

    Args:
      parts: labels int32 `[n]` by part, of which "train" decides.
      where: path of the file or of the setting.

    Raises:
      DataUnavailable: labels that do not start from 0, that look like identifiers, or that occur
        outside the training part alone.
    """

    def refuse(what: str, hint: str) -> DataUnavailable:
        return DataUnavailable(what, where=where, hint=hint)

    trained = np.unique(parts["train"])
    if not len(trained):
        return 0
    low, high = int(trained[0]), int(trained[-1])
    if high >= MOST_CLASSES or high + 1 > max(2 * len(trained), len(trained) + 1):
        raise refuse(
            f"{len(trained)} different labels reach from {low} to {high}",
            "number them from 0: names, labels = np.unique(labels, return_inverse=True)",
        )
    if low != 0:
        raise refuse(
            f"labels are {low} to {high}: there is no class 0",
            f"subtract {low}, or name all {high + 1} classes with classes",
        )
    for name, labels in parts.items():
        new = np.setdiff1d(labels, trained)
        if len(new):
            raise refuse(
                f"labels of the {name} part that no training example has: {_some(new)}",
                "leave those examples out, or name all classes with classes",
            )
    return high + 1


def _some(values: Sequence[Any] | np.ndarray) -> str:
    shown = ", ".join(str(value) for value in values[:5])
    return shown if len(values) <= 5 else f"{shown} and {len(values) - 5} more"


# Layout.


def check_layout(shape: Sequence[int], dtype: Any, *, name: str, where: str) -> None:
    """Refuses arrays of images whose channels are not on the last axis.

    Args:
      shape: `[n, h, w, c]`; others are not images and pass.
      dtype: of the array; floating-point arrays are taken for images where two sides are equal.
      name: of the part.
      where: path of the file or of the setting.

    Raises:
      DataUnavailable: the hint has the transposition that would be right.
    """
    if len(shape) != 4 or shape[3] in CHANNELS:
        return
    is_bytes = np.dtype(dtype) == np.uint8
    for axis, order, rest in ((1, (0, 2, 3, 1), shape[2:4]), (2, (0, 1, 3, 2), shape[1:4:2])):
        square = rest[0] == rest[1] and rest[0] >= 8
        if shape[axis] in CHANNELS and (square or (is_bytes and shape[axis] != 4 and axis == 1)):
            right = [shape[i] for i in order]
            raise DataUnavailable(
                f"{name}: inputs {list(shape)} have their channels on axis {axis}, and would be "
                f"images of {shape[3]} channels",
                where=where,
                hint=f"np.transpose(x, {order}) makes them {right}"
                + ("; of files, layout=chw does" if axis == 1 else ""),
            )


# The door.


def open_dataset(dataset: Any, *, where: str = "data") -> tuple[Dataset, Report]:
    """Checks a data set that was just made.

    Args:
      dataset: what the function that the config names has returned.
      where: the config path of that function.

    Returns:
      The data set, whose parts check what they read where they were not scanned in full, and what
      was found.

    Raises:
      DataUnavailable: values that are not finite, or not in the type that they have on a device;
        arrays of another type than numbers; examples without a value or an axis; parts of
        different shapes, types or units; channels on another axis than the last; labels out of
        range.
      ArgumentError: not a data set.
    """
    dataset = _as_dataset(dataset, where=where)
    parts = {name: getattr(dataset, name) for name in PARTS}
    if any(getattr(root(part), "shapes_only", False) for part in parts.values()):
        return dataset, Report()
    warnings: list[str] = []
    task = dataset.task
    looked = {name: _look(name, part, task) for name, part in parts.items() if len(part)}
    _compare(looked, warnings)
    if task == "classification":
        _check_labels(dataset, looked, warnings)
    else:
        columns = {name: one.labels for name, one in looked.items()}
        warnings += labels_lib.check_parts(columns, dataset.classes, task=task)
    guarded = {name: Guarded(parts[name], name) for name, one in looked.items() if not one.scanned}
    for name, part in looked.items():
        for leaf, spec in part.leaves.items():
            at = parts[name].provenance.origin or where
            check_layout((len(parts[name]), *spec.shape), spec.dtype, name=name + leaf, where=at)
    train = looked["train"].leaves
    report = Report(
        warnings=tuple(warnings),
        values=train.get(""),
        scanned=not guarded,
    )
    return (dataset._replace(**guarded) if guarded else dataset), report


def _as_dataset(dataset: Any, *, where: str) -> Dataset:
    if not isinstance(dataset, Dataset):
        raise ArgumentError(
            f"returned a {type(dataset).__name__}",
            where=where,
            hint="a distill_jax.core.api.Dataset of train, held_out, test and classes",
        )
    for name in PARTS:
        part = getattr(dataset, name)
        if not isinstance(part, Source):
            raise ArgumentError(
                f"its {name} part is a {type(part).__name__}",
                where=where,
                hint="an object with read(indices), __len__ and provenance, such as ArraySource",
            )
    if not len(dataset.train):
        raise ArgumentError("the training part is empty", where=where)
    if isinstance(dataset.classes, str):
        raise ArgumentError(
            f"classes are the string {dataset.classes!r}", where=where, hint="a tuple of names"
        )
    labels_lib.check_task(dataset.task, where=where)
    return dataset._replace(classes=class_names(dataset.classes, where=where))


class _Looked(NamedTuple):
    leaves: Mapping[str, Values]
    labels: np.ndarray | None
    scanned: bool


def spread(n: int, most: int) -> np.ndarray:
    """Returns at most `most` positions, evenly spaced over `n`."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(np.int64))


def _leaves(inputs: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(inputs)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _look(name: str, part: Source, task: str) -> _Looked:
    n, where = len(part), part.provenance.origin or "data"
    one = part.read(np.zeros(1, np.int64))
    if not isinstance(one, Mapping) or "input" not in one:
        raise ArgumentError(
            f"read of the {name} part gives no 'input'",
            where=where,
            hint="{'input': [b, ...], 'label': [b]}",
        )
    leaves = _leaves(one["input"])
    _check_arrays(leaves, name=name, where=where)
    size = sum(leaf.nbytes for leaf in leaves.values())
    rows = part.read(spread(n, max(1, min(SAMPLE, 2**26 // max(size, 1)))))
    sample = _leaves(rows["input"])
    labels = getattr(part, "labels", None)
    if labels is None and "label" in rows:
        labels = labels_lib.read_labels(rows["label"], task=task, name=name, where=where)[0]
    limits = {key: (np.inf, -np.inf) for key in leaves}
    bounds = {key: bound for key, leaf in leaves.items() if (bound := _bounds(leaf.dtype))}
    scanned = not bounds or size * n <= SCANNED_BYTES
    if bounds and scanned:
        step = max(1, CHUNK_BYTES // max(size, 1))
        bad, first = 0, None
        for start in range(0, n, step):
            inputs = part.read(np.arange(start, min(start + step, n)))["input"]
            chunk = _leaves(inputs)
            fit = True
            for key, (least, most) in bounds.items():
                low, high = _limits(chunk[key])
                limits[key] = (min(limits[key][0], low), max(limits[key][1], high))
                fit = fit and low >= least and high <= most
            if not fit:
                rows_bad = np.flatnonzero(~_fitting_rows(inputs))
                bad, first = bad + len(rows_bad), start + rows_bad[0] if first is None else first
        if first is not None:
            raise _unfit(name, part, bad, n, int(first))
    elif bounds:
        fits = _fitting_rows(rows["input"])
        if not fits.all():
            at = spread(n, len(fits))[int(np.argmin(fits))]
            raise _unfit(name, part, int((~fits).sum()), len(fits), int(at))
    values = {key: _values(sample[key], limits[key]) for key in leaves}
    return _Looked(values, labels, scanned)


def _limits(values: np.ndarray) -> tuple[float, float]:
    """Smallest and largest value; NaN where one is among them."""
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def _check_arrays(leaves: Mapping[str, np.ndarray], *, name: str, where: str) -> None:
    """Refuses inputs that no device array can be made of, or that hold nothing.

    Args:
      leaves: input arrays of one example, `[1, ...]`, by path.
      name: of the part.
      where: path of the file or of the setting.

    Raises:
      DataUnavailable: see `open_dataset`.
    """
    for key, leaf in leaves.items():
        description = (
            f"{name}: input{key} is {leaf.dtype} [n{''.join(f', {d}' for d in leaf.shape[1:])}]"
        )
        is_number = jax.numpy.issubdtype(leaf.dtype, np.number)
        if not (is_number or leaf.dtype == np.bool_) or leaf.dtype.kind == "c":
            raise DataUnavailable(description, where=where, hint="real numbers are expected")
        if not leaf.dtype.isnative:
            what = f"{description}, in the byte order of other machines"
            raise DataUnavailable(what, where=where, hint='x.astype(x.dtype.newbyteorder("="))')
        if not leaf.size:
            raise DataUnavailable(f"{description}: examples without a value", where=where)
        if key == "" and leaf.ndim < 2:
            hint = "an axis of features is expected: x[:, None]"
            raise DataUnavailable(description, where=where, hint=hint)


def _bounds(dtype: np.dtype) -> tuple[float, float] | None:
    """Returns the least and greatest value that an array may hold, None where it may hold any.

    On a device 64-bit numbers become 32-bit ones, unless the precision is float64. Integers wrap
    around there, and floats become infinite.
    """
    narrow = jax.dtypes.canonicalize_dtype(dtype)
    if jax.numpy.issubdtype(dtype, np.floating):
        info = jax.numpy.finfo(narrow)
    elif jax.numpy.issubdtype(dtype, np.integer) and narrow != dtype:
        info = np.iinfo(narrow)
    else:
        return None
    return float(info.min), float(info.max)


def _fitting_rows(inputs: Any) -> np.ndarray:
    """Returns bool `[b]`: which examples, some of whose values may not fit, have none that do not.

    A value fits where it is finite and within `_bounds`.
    """
    fits: list[Any] = [np.ones(len(x), bool) for x in _leaves(inputs).values()]
    for x in _leaves(inputs).values():
        if bounds := _bounds(x.dtype):
            fits.append(((x >= bounds[0]) & (x <= bounds[1])).reshape(len(x), -1).all(1))
    return np.all(np.stack(fits), axis=0)


def _unfit(name: str, part: Any, bad: int, n: int, position: int) -> DataUnavailable:
    """Returns the error of examples that `_fitting_rows` finds, the first of them at a position."""
    ids = getattr(part, "ids", None)
    example = position if ids is None else int(ids[position])
    inputs = _leaves(part.read(np.array([position]))["input"]).values()
    if all(np.isfinite(x).all() for x in inputs if x.dtype.kind in "iuf"):
        unfit = next(x for x in inputs if not _fitting_rows(x).all())
        what = f"that {jax.dtypes.canonicalize_dtype(unfit.dtype)} does not hold"
        hint = "scale them, or number them anew; float64 keeps 64 bits"
    else:
        what = "that are NaN or infinite"
        hint = "leave those examples out or fill them in: np.isfinite(x) finds them"
    return DataUnavailable(
        f"{bad} of {n} examples of the {name} part have values {what}, the first "
        f"is example {example} of {part.provenance.name or 'its source'}",
        where=part.provenance.origin or "data",
        hint=hint,
    )


def _values(sample: np.ndarray, limits: tuple[float, float]) -> Values:
    if not sample.size or sample.dtype.kind not in "iufb":
        nothing = np.zeros(1)
        return Values(sample.shape[1:], sample.dtype, 0.0, 0.0, nothing, nothing, 0.0)
    low, high = _limits(sample)
    low, high = min(low, limits[0]), max(high, limits[1])
    flat = sample.reshape(-1, sample.shape[-1]) if sample.ndim > 1 else sample.reshape(-1, 1)
    numbers = flat.astype(np.float64)
    outside = float(((numbers < -1e-3) | (numbers > 1 + 1e-3)).mean())
    mean, std = numbers.mean(0), numbers.std(0)
    return Values(sample.shape[1:], sample.dtype, low, high, mean, std, outside)


def _compare(looked: Mapping[str, _Looked], warnings: list[str]) -> None:
    """Refuses parts that differ from the training part in shape, type or units."""
    train = looked["train"].leaves
    for name, part in looked.items():
        if set(part.leaves) != set(train):
            raise DataUnavailable(
                f"the {name} part has the inputs {', '.join(sorted(part.leaves))}, the training "
                f"part {', '.join(sorted(train))}",
                where="data",
            )
        for key, spec in part.leaves.items():
            like, at = train[key], f" (input{key})" if key else ""
            if spec.shape != like.shape:
                raise DataUnavailable(
                    f"examples of the {name} part are {list(spec.shape)}, those of the training "
                    f"part {list(like.shape)}{at}",
                    where="data",
                    hint="all parts have the same shape",
                )
            if spec.dtype != like.dtype:
                raise DataUnavailable(
                    f"the {name} part is {spec.dtype}, with values from {spec.interval}, and the "
                    f"training part {like.dtype}, from {like.interval}{at}",
                    where="data",
                    hint=f"all parts have the same type and units: {like.dtype} as in training",
                )
            if spec.dtype.kind not in "iuf":
                continue
            here, there = (float(np.sqrt((x.std**2).mean())) for x in (spec, like))
            ratio = max(here, there) / max(min(here, there), 1e-30)
            if max(here, there) > 0 and min(here, there) > 0 and ratio > SPREAD:
                what = (
                    f"values of the {name} part are {spec.interval}, those of the training part "
                    f"{like.interval}{at}"
                )
                if spec.is_image:
                    raise DataUnavailable(what, where="data", hint="all parts have the same units")
                warnings.append(f"data: {what}: are they in the same units?")


def _check_labels(dataset: Dataset, looked: Mapping[str, _Looked], warnings: list[str]) -> None:
    k = len(dataset.classes)
    if not k:
        return
    for name, part in looked.items():
        if part.labels is None or not len(part.labels):
            continue
        low, high = int(np.min(part.labels)), int(np.max(part.labels))
        if low < 0 or high >= k:
            raise DataUnavailable(
                f"the {name} part has the label {low if low < 0 else high}, and there are {k} "
                f"classes: {_some(dataset.classes)}",
                where="data",
                hint=f"labels from 0 to {k - 1}",
            )
    trained = looked["train"].labels
    if trained is None or len(trained) < len(dataset.train):
        return  # of a sample only
    present = np.bincount(trained, minlength=k) > 0
    absent = np.flatnonzero(~present)
    if len(absent):
        names = [dataset.classes[i] for i in absent]
        seen = [
            name
            for name in ("held_out", "test")
            if name in looked
            and (labels := looked[name].labels) is not None
            and np.isin(labels, absent).any()
        ]
        also = f", though the {' and the '.join(seen)} part has some" if seen else ""
        warnings.append(f"data: classes without a training example: {_some(names)}{also}")


class Guarded:
    """A source whose examples are checked for values that do not fit whenever they are read.

    For data of `_bounds` that are too large to be scanned when they are opened.

    Args:
      source: the examples.
      part: its name, for messages.
    """

    def __init__(self, source: Source, part: str):
        self.source, self.part, self.provenance = source, part, source.provenance

    def __getattr__(self, name: str) -> Any:
        if name in ("source", "ids", "labels"):
            return getattr(object.__getattribute__(self, "source"), name)
        raise AttributeError(name)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: np.ndarray) -> Mapping[str, Any]:
        """Returns the examples at `indices` `[b]`.

        Raises:
          DataUnavailable: one of them has a value that is NaN, infinite or out of bounds.
        """
        rows = self.source.read(indices)
        fits = _fitting_rows(rows["input"])
        if not fits.all():
            at = int(indices[int(np.argmin(fits))])
            raise _unfit(self.part, self.source, int((~fits).sum()), len(fits), at)
        return rows


# Examples in two parts.


class Overlap(NamedTuple):
    """How many examples of a part are in the training part too.

    Attributes:
      repeated: examples found there.
      of: examples that were looked for.
      whole: whether that is the whole part; otherwise equal positions of both were compared.
    """

    repeated: int
    of: int
    whole: bool

    def spell(self, name: str) -> str:
        """Returns a sentence about the part of that name."""
        if self.whole:
            return (
                f"{self.repeated} of {self.of} examples of the {name} part are in the training "
                "part too"
            )
        return (
            f"the {name} part looks like a copy of the training data: {self.repeated} of {self.of} "
            "examples compared at equal positions are equal"
        )


def root(source: Any) -> Any:
    """Returns the source at the root of a chain of subsets."""
    while isinstance(getattr(source, "source", None), Source):
        source = source.source
    return source


def overlaps(dataset: Dataset) -> dict[str, Overlap]:
    """Returns what of "held_out" and "test" is in the training part, by content.

    Parts in memory up to `LOOKED_AT_BYTES` are searched in full. Of larger ones some examples at
    equal positions are compared, which finds a part that is a copy.
    """
    parts = {name: getattr(dataset, name) for name in PARTS}
    parts = {name: part for name, part in parts.items() if len(part)}
    roots = {name: root(part) for name, part in parts.items()}
    if any(getattr(part, "shapes_only", False) for part in roots.values()):
        return {}
    arrays = [getattr(part, "inputs", None) for part in roots.values()]
    in_memory = all(x is not None for x in arrays)
    shared: dict[str, Overlap] = {}
    if in_memory and sum(x.nbytes for x in jax.tree.leaves(arrays)) <= LOOKED_AT_BYTES:
        seen = set(_digests(parts["train"], np.arange(len(parts["train"]))))
        for name in ("held_out", "test"):
            if name in parts:
                rows = _digests(parts[name], np.arange(len(parts[name])))
                shared[name] = Overlap(sum(row in seen for row in rows), len(rows), True)
        return shared
    for name in ("held_out", "test"):
        other = name in parts and roots[name] is not roots["train"]
        if other and len(roots[name]) == len(roots["train"]):
            at = spread(len(roots[name]), COMPARED)
            pairs = zip(*(_digests(roots[x], at) for x in (name, "train")), strict=True)
            shared[name] = Overlap(sum(a == b for a, b in pairs), len(at), False)
    return shared


def _digests(source: Any, indices: np.ndarray) -> list[int]:
    leaves = [np.ascontiguousarray(x) for x in jax.tree.leaves(source.read(indices)["input"])]
    return [hash(b"".join(x[i].tobytes() for x in leaves)) for i in range(len(indices))]


# Statistics.


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
        raise ArgumentError("the input is not one array", where="normalize", hint="of images")
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
    """Says why `(x - mean) / std` is not the normalization of these data; empty where it may be.

    A mean more than a quarter of a deviation off, or a deviation off by a half, is that of other
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
    """Says that `n` held-out examples are too few to select by; empty where they are enough.

    Of M measurements with independent normal errors the largest is expected to be
    `standard_error * q((M - 3/8) / (M + 1/4))` too high, with the normal quantile q (Blom 1958).

    Args:
      n: examples of the part that the metric is measured on.
      metric: by which the best state is chosen.
      measurements: M, how many states it is chosen from.
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


def missing_array(key: str, given: Mapping[str, Any] | Sequence[str], keys: Sequence[str]) -> str:
    """Returns a hint about an array that a file does not have.

    Args:
      key: the array.
      found: names that the file has.
      keys: names that are read.
    """
    names = sorted(given)
    if not names:
        return f"it holds no array; {', '.join(keys)} are read"
    if {"x", "y"} <= set(names) or any(name not in keys for name in names):
        return (
            f"it holds {', '.join(names[:10])}; the names are {', '.join(keys)}: split the "
            "examples into a training and a test part under these"
        )
    return nearest(key, names)
