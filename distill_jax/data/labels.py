"""Labels of the three tasks: one class, several labels at once, or real values.

| task | `label` of a batch | names in `Dataset.classes` |
|---|---|---|
| classification | int32 `[b]`, from 0 | of the classes |
| multilabel | float32 `[b, k]`, 0 or 1 | of the k labels |
| regression | float32 `[b, m]` | of the m targets |

A network has one output for each name. Where labels of some examples are unknown, a batch has
`labelled` as well, of the shape of `label`: 0 where the label is unknown. `label` is 0 there and
must not be read by any loss or metric. Where the label is known it is n / m in classification, for
m labelled examples of n, so that the mean of a label loss over a batch equals on average the mean
over labelled examples; in other tasks it is 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.core.api import TASKS
from distill_jax.core.errors import ArgumentError, DataUnavailable, nearest


def check_task(task: Any, *, where: str = "task") -> str:
    """Returns `task`; raises `ArgumentError` for a name that is not in `TASKS`."""
    if task not in TASKS:
        raise ArgumentError(f"unknown task {task!r}", where=where, hint=nearest(str(task), TASKS))
    return task


def unknown_value(value: Any, *, where: str = "ignore_label") -> float | None:
    """Returns the value that stands for an unknown label: a number, NaN also as the string "nan".

    Raises:
      ArgumentError: anything else.
    """
    if value is None or value == "":
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        hint = "a number such as -1, or nan"
        raise ArgumentError(f"ignore_label is {value!r}", where=where, hint=hint) from None


def as_labels(labels: Any, *, name: str = "", where: str = "data") -> np.ndarray:
    """Returns labels as int32 `[n]`.

    Floats and truth values are accepted where they are whole numbers.

    Args:
      labels: `[n]`.
      name: of the part, for messages.
      where: path of the file or of the setting.

    Raises:
      DataUnavailable: another rank or type, fractions, or numbers that int32 does not hold.
    """
    labels, part = np.asarray(labels), f"{name}: " if name else ""

    def refuse(what: str, hint: str) -> DataUnavailable:
        return DataUnavailable(f"{part}labels {what}", where=where, hint=hint)

    description = f"are {labels.dtype} {list(labels.shape)}"
    if labels.ndim == 2 and labels.shape[1] == 1:
        raise refuse(description, "integers [n] are expected: labels[:, 0]")
    if labels.ndim == 2:
        raise refuse(description, "integers [n] are expected: of one-hot rows, labels.argmax(1)")
    if labels.ndim != 1:
        raise refuse(description, "integers [n] are expected")
    if labels.dtype.kind in "USO":
        raise refuse(
            description,
            "integers [n] are expected: names, labels = np.unique(labels, return_inverse=True), "
            "with the names as classes",
        )
    if labels.dtype.kind == "f":
        whole = np.isfinite(labels) & (labels == np.floor(labels))
        if not whole.all():
            at = int(np.argmin(whole))
            raise refuse(
                f"{description}, of which {labels[at]} at position {at} is no whole number",
                "integers [n] are expected",
            )
    elif labels.dtype.kind not in "iub":
        raise refuse(description, "integers [n] are expected")
    if labels.dtype != np.int32 and len(labels):
        low, high = labels.min(), labels.max()
        if low < -(2**31) or high >= 2**31:
            raise refuse(f"reach {high if high >= 2**31 else low:.0f}", "numbers of classes from 0")
    return labels.astype(np.int32, copy=False)


def read_labels(
    labels: Any,
    *,
    task: str = "classification",
    ignore_label: Any = None,
    name: str = "",
    where: str = "data",
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns labels in the format of batches, and `labelled` where `ignore_label` is given.

    Args:
      labels: `[n]` integers; `[n, k]` of 0 and 1 (numbers or truth values); or `[n]` or `[n, m]`
        real numbers.
      task: one of `TASKS`.
      ignore_label: the value that stands for an unknown label.
      name: of the part, for messages.
      where: path of the file or of the setting.

    Returns:
      See the module: int32 `[n]`, float32 `[n, k]` or float32 `[n, m]`; and None, or float32 of the
      same shape.

    Raises:
      ArgumentError: an unknown task, or an `ignore_label` that is no number.
      DataUnavailable: another shape, type or range, values that are not finite, no known label.
    """
    check_task(task)
    ignored = unknown_value(ignore_label)
    labels = np.asarray(labels)
    unknown = _equals(labels, ignored)
    if unknown is not None and unknown.size and unknown.all():
        part = f"{name}: " if name else ""
        raise DataUnavailable(
            f"{part}all labels are {ignored:g}, the value of an unknown one", where=where
        )
    known = labels if unknown is None else np.where(unknown, np.zeros((), labels.dtype), labels)
    if task == "classification":
        known = as_labels(known, name=name, where=where)
    else:
        known = _as_numbers(known, task, name=name, where=where)
    if unknown is None:
        return known, None
    labelled = (~unknown).astype(np.float32).reshape(known.shape)
    if task == "classification" and len(labelled):
        labelled *= np.float32(len(labelled) / labelled.sum())
    return known, labelled


def _equals(labels: np.ndarray, value: float | None) -> np.ndarray | None:
    if value is None or labels.dtype.kind not in "iufb":
        return None
    return np.isnan(labels) if np.isnan(value) else labels == value


def _as_numbers(labels: np.ndarray, task: str, *, name: str, where: str) -> np.ndarray:
    """Returns labels of `multilabel` or `regression` as float32 `[n, m]`, checked."""
    part = f"{name}: " if name else ""
    expected = {
        "multilabel": "0 or 1 of shape [n, k] are expected, one column for each label",
        "regression": "real numbers [n] or [n, m] are expected",
    }[task]

    def refuse(what: str, hint: str = expected) -> DataUnavailable:
        return DataUnavailable(f"{part}labels {what}", where=where, hint=hint)

    description = f"are {labels.dtype} {list(labels.shape)}"
    if labels.dtype.kind not in "iufb":
        raise refuse(description)
    if task == "regression" and labels.ndim == 1:
        labels = labels[:, None]
    if labels.ndim != 2 or not labels.shape[1]:
        raise refuse(description)
    with np.errstate(over="ignore"):
        numbers = labels.astype(np.float32)
    finite = np.isfinite(numbers)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise refuse(
            f"{description}, of which {labels[row, column]} at [{row}, {column}] is not finite",
            "leave such examples out, or name the value with ignore_label (of NaN, nan), where it "
            "stands for an unknown label",
        )
    if task == "multilabel":
        binary = (numbers == 0) | (numbers == 1)
        if not binary.all():
            row, column = np.argwhere(~binary)[0]
            raise refuse(
                f"{description}, of which {labels[row, column]} at [{row}, {column}] is neither "
                "0 nor 1",
                f"{expected}; ignore_label names a value that stands for an unknown label",
            )
    return numbers


def output_names(labels: np.ndarray, names: Sequence[str], *, task: str) -> tuple[str, ...]:
    """Returns the names of the columns of `labels` `[n, m]`, numbered where none are given.

    Raises:
      ArgumentError: as many names as columns are needed.
    """
    m = labels.shape[1]
    word = {"multilabel": "label", "regression": "target"}[task]
    if not names:
        return (word,) if m == 1 else tuple(f"{word} {i}" for i in range(m))
    if len(names) != m:
        raise ArgumentError(
            f"{len(names)} names for {m} columns of labels",
            where="classes",
            hint=f"one for each {word}, in the order of the columns",
        )
    return tuple(names)


def read_soft(labels: Any, task: str, *, where: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns the most probable classes `[n]` and `label_probs` of soft labels; others unchanged.

    Soft labels are real numbers `[n, k]` where the task is classification.

    Raises:
      DataUnavailable: see `read_label_probs`.
    """
    labels = np.asarray(labels)
    if task != "classification" or labels.ndim != 2 or labels.dtype.kind != "f":
        return labels, {}
    probs = read_label_probs(labels, n=len(labels), where=where)
    return probs.argmax(1), {"label_probs": probs}


def read_label_probs(probs: Any, *, n: int, where: str = "label_probs") -> np.ndarray:
    """Returns soft labels, distributions over the classes, as float32 `[n, k]`.

    Raises:
      DataUnavailable: another shape, negative or infinite values, or rows that do not sum to 1
        (to 1e-3; they are scaled to sum to 1 exactly).
    """
    probs = np.asarray(probs)
    hint = "probabilities [n, k], one row for each training example"
    description = f"soft labels are {probs.dtype} {list(probs.shape)}"
    if probs.ndim != 2 or len(probs) != n or probs.dtype.kind not in "fiub":
        raise DataUnavailable(f"{description} of {n} examples", where=where, hint=hint)
    values = probs.astype(np.float64)
    total = values.sum(1)
    right = np.isfinite(values).all(1) & (values >= 0).all(1) & (np.abs(total - 1) <= 1e-3)
    if not right.all():
        row = int(np.argmin(right))
        raise DataUnavailable(
            f"{description}, of which row {row} is no distribution: it sums to {total[row]:.6g}",
            where=where,
            hint=hint,
        )
    return (values / total[:, None]).astype(np.float32)


def check_parts(
    parts: Mapping[str, np.ndarray | None], names: Sequence[str], *, task: str, where: str = "data"
) -> list[str]:
    """Checks the labels `[n, m]` of all parts of `multilabel` or `regression` data.

    Args:
      parts: labels by part, None where they are read example by example and unknown here.
      names: of the columns.
      task: the task of the labels.
      where: path of the file or of the setting.

    Returns:
      Warnings, one line each.

    Raises:
      DataUnavailable: labels of another shape, type or range, or a column of the training part
        that is constant.
    """
    for name, labels in parts.items():
        if labels is None:
            continue
        checked = _as_numbers(np.asarray(labels), task, name=name, where=where)
        if checked.shape[1] != len(names):
            raise DataUnavailable(
                f"the {name} part has {checked.shape[1]} columns of labels and there are "
                f"{len(names)} names",
                where=where,
                hint="one name for each column",
            )
    warnings, train = [], parts.get("train")
    if train is None or len(train) < 2:
        return warnings
    train = np.asarray(train).reshape(len(train), -1)
    for i, name in enumerate(names):
        if np.ptp(train[:, i]) == 0:
            warnings.append(
                f"data: all training examples have {train[0, i]:g} for {name!r}: there is nothing "
                "to learn"
            )
    return warnings


def label_counts(labels: np.ndarray, labelled: np.ndarray | None, *, k: int) -> np.ndarray:
    """Returns how many examples have each class, `[k]`; of several labels, each label.

    Args:
      labels: int `[n]`, or 0 and 1 `[n, k]`.
      labelled: of the same shape, 0 where a label is unknown; None where all are known.
      k: classes or labels.
    """
    if labels.ndim == 1:
        known = labels if labelled is None else labels[labelled > 0]
        return np.bincount(known, minlength=k)
    return labels.sum(0) if labelled is None else (labels * (labelled > 0)).sum(0)


def label_scale(labels: np.ndarray, labelled: np.ndarray | None) -> np.ndarray:
    """Returns the standard deviation of each target over its known values, `[m]`, 1 where it is 0.

    Args:
      labels: `[n, m]`.
      labelled: of the same shape, 0 where a value is unknown; None where all are known.
    """
    values = labels.astype(np.float64)
    known = np.ones_like(values) if labelled is None else (labelled > 0).astype(np.float64)
    n = np.maximum(known.sum(0), 1)
    mean = (values * known).sum(0) / n
    std = np.sqrt((known * (values - mean) ** 2).sum(0) / n)
    return np.where(std > 0, std, 1.0)


def stratified(labels: np.ndarray, *, fraction: float, seed: int) -> np.ndarray:
    """Returns which examples are held out, bool `[n]`, so that each label keeps its share.

    Iterative stratification (Sechidis, Tsoumakas, Vlahavas 2011, "On the Stratification of
    Multi-label Data", algorithm 1) into two parts: examples with the label that has the fewest left
    go, in random order, to the part that lacks most of it. Examples without a label come last.

    Args:
      labels: bool `[n, k]`.
      fraction: share held out.
      seed: any non-negative integer.
    """
    shares = np.array([fraction, 1 - fraction])
    room = shares * len(labels)  # that each part lacks, of examples and of each label
    lacks = shares[:, None] * labels.sum(0)
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(labels))
    held = np.zeros(len(labels), bool)
    left = labels[order]
    while len(order):
        counts = left.sum(0)
        rarest = int(np.where(counts > 0, counts, len(labels) + 1).argmin())
        chosen = left[:, rarest] if counts.any() else np.ones(len(order), bool)
        for i, bits in zip(order[chosen].tolist(), left[chosen], strict=True):
            need = lacks[:, rarest] if counts.any() else room
            part = 0 if (need[0], room[0]) > (need[1], room[1]) else 1
            held[i] = part == 0
            room[part] -= 1
            lacks[part] -= bits
        order, left = order[~chosen], left[~chosen]
    return held
