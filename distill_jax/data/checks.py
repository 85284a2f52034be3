"""Checks that every data set passes when it is opened, whatever its source.

A network trains on almost anything without an error: a missing value, parts in different units, a
channel axis in the wrong place, labels that wrap around. Each check is a function of the arrays
alone. Impossible values raise an error; unusual ones give a warning.

Floating-point inputs are read once. Parts larger than `SCANNED_BYTES` are sampled, and the rest is
checked as it is read (`Guarded`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from distill_jax.core.api import Dataset, Source
from distill_jax.core.errors import ArgumentError, DataUnavailable, nearest
from distill_jax.data import labels as labels_lib
from distill_jax.data.moments import (
    CHUNK_BYTES,
    SAMPLE,
    SCANNED_BYTES,
    Values,
    example_array,
    limits_of,
    root,
    spread,
    values_of,
)

MOST_CLASSES = 2**20
"""More classes than this are taken for identifiers, before anything of their number is made."""


CHANNELS = (1, 3, 4)
"""Numbers of channels of an image."""


SPREAD = 16.0
"""Parts whose standard deviations differ by more than this factor are in different units."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The findings of the checks of a data set.

    Attributes:
      warnings: one line each, without a full stop.
      values: statistics of the training part, where the input is one array; None where it is not,
        or where only shapes are known.
      scanned: whether all values were read.
    """

    warnings: tuple[str, ...] = ()
    values: Values | None = None
    scanned: bool = True


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
      parts: labels int32 `[n]` by part; the count is that of "train".
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


def check_layout(shape: Sequence[int], dtype: Any, *, name: str, where: str) -> None:
    """Raises an error for arrays of images whose channels are not on the last axis.

    Args:
      shape: `[n, h, w, c]`; others are not images and pass.
      dtype: of the array; floating-point arrays are taken for images where two sides are equal.
      name: of the part.
      where: path of the file or of the setting.

    Raises:
      DataUnavailable: the channels are elsewhere; the hint gives the correct transposition.
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


def open_dataset(dataset: Any, *, where: str = "data") -> tuple[Dataset, Report]:
    """Checks a data set that was just made.

    Args:
      dataset: the result of the data set's function.
      where: the config path of that function.

    Returns:
      The data set and the findings. Parts that were not scanned in full are wrapped so that
      examples are checked when they are read.

    Raises:
      DataUnavailable: values that are not finite, or not in the type that they have on a device;
        arrays of another type than numbers; examples without a value or an axis; parts of
        different shapes, types or units; channels on another axis than the last; labels out of
        range.
      ArgumentError: not a data set.
    """
    dataset = _as_dataset(dataset, where=where)
    parts = dataset.parts
    if any(getattr(root(part), "shapes_only", False) for part in parts.values()):
        return dataset, Report()
    roots = {id(one): one for one in map(root, parts.values())}.values()
    warnings = [f"data: {note}" for one in roots for note in getattr(one, "notes", ())]
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
    for name, part in dataset.parts.items():
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
    known: np.ndarray | None  # those of examples with a known class
    scanned: bool


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
    known, shown = labels, rows.get("labelled")
    if task == "classification" and labels is not None and shown is not None and not shown.all():
        every = example_array(part, "labelled") if len(labels) == n else None
        known = labels[(shown if every is None else every) > 0]
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
                low, high = limits_of(chunk[key])
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
    values = {key: values_of(sample[key], limits[key]) for key in leaves}
    return _Looked(values, labels, known, scanned)


def _check_arrays(leaves: Mapping[str, np.ndarray], *, name: str, where: str) -> None:
    """Raises an error for inputs that cannot become device arrays, or that are empty.

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
        if not leaf.size and not any(other.size for other in leaves.values()):
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
    """Returns bool `[b]`: whether all values of an example fit.

    A value fits where it is finite and within `_bounds`.
    """
    fits: list[Any] = [np.ones(len(x), bool) for x in _leaves(inputs).values()]
    for x in _leaves(inputs).values():
        if bounds := _bounds(x.dtype):
            fits.append(((x >= bounds[0]) & (x <= bounds[1])).reshape(len(x), -1).all(1))
    return np.all(np.stack(fits), axis=0)


def _unfit(name: str, part: Any, bad: int, n: int, position: int) -> DataUnavailable:
    """Returns the error for examples that `_fitting_rows` rejects; it names the first position."""
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


def _compare(looked: Mapping[str, _Looked], warnings: list[str]) -> None:
    """Raises an error for parts that differ from the training part in shape, type or units."""
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
    trained, known = looked["train"].labels, looked["train"].known
    if trained is None or known is None or len(trained) < len(dataset.train):
        return  # of a sample only
    present = np.bincount(known, minlength=k) > 0
    absent = np.flatnonzero(~present)
    if len(absent):
        names = [dataset.classes[i] for i in absent]
        seen = [
            name
            for name in ("held_out", "test")
            if name in looked
            and (labels := looked[name].known) is not None
            and np.isin(labels, absent).any()
        ]
        also = f", though the {' and the '.join(seen)} part has some" if seen else ""
        kind = "training" if len(known) == len(trained) else "labelled training"
        warnings.append(f"data: classes without a {kind} example: {_some(names)}{also}")


class Guarded:
    """A source whose examples are checked for values that do not fit whenever they are read.

    For data types with `_bounds`, in parts too large to be scanned when they are opened.

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


def missing_array(key: str, given: Mapping[str, Any] | Sequence[str], keys: Sequence[str]) -> str:
    """Returns a hint about an array that is missing from a file.

    Args:
      key: the array.
      given: names that the file has.
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
