"""Tables in files: CSV and TSV with a header, JSON lines, Parquet; text may be gzipped (`.gz`).

A column is numeric where all its cells are numbers, else categorical. Categories and scales are
those of the training part, see `_tables`: a missing cell is category 0, or the mean. The parts are
those of a column `split_column`; else of files of their own (`test_path`, or a folder of files
called `train*`, `val*`, `test*`); else a hash of `id_column`, or of the row, draws them.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distill_jax.core.api import Dataset, Provenance
from distill_jax.core.errors import ArgumentError, DataUnavailable, nearest
from distill_jax.data import _columns, _splits, _tables, checks, source
from distill_jax.data import labels as labels_lib

HINT = f"a file, or a folder of files, ending in {', '.join(_columns.SUFFIXES)}, or text in .gz"

_SPLIT = re.compile(rf"({'|'.join(_splits.SPLITS)})(?![A-Za-z])", re.IGNORECASE)

MANY = 100
"""Text with more values than this, mostly unique, is treated as names or sentences."""


def list_files(path: Path, suffixes: Sequence[str] = _columns.SUFFIXES) -> list[Path]:
    """Returns the file, or the files of a folder that have one of the endings, sorted.

    Raises:
      DataUnavailable: there are none.
    """
    if not path.is_dir():
        return [path]
    files = [
        file
        for file in sorted(path.iterdir())
        if not file.name.startswith(".") and file.is_file() and _columns.kind(file) in suffixes
    ]
    if not files:
        raise DataUnavailable("no tables in it", where=str(path), hint=HINT)
    return files


def parts_by_name(files: Sequence[Path]) -> list[str]:
    """Returns the part named at the start of each file's name, "" for all where none is.

    Raises:
      DataUnavailable: some file names begin with a part and others do not.
    """
    found = [_SPLIT.match(file.name) for file in files]
    if len(files) == 1 or not any(found):
        return [""] * len(files)
    for file, match in zip(files, found, strict=True):
        if not match:
            hint = "the names of all files of a folder begin with train, val or test, or none does"
            raise DataUnavailable("names no split", where=str(file), hint=hint)
    return [_splits.SPLITS[match[1].lower()] for match in found if match]


def make(
    *,
    path: str,
    label: str | Sequence[str],
    task: str = "classification",
    test_path: str = "",
    features: str | Sequence[str] = (),
    drop: str | Sequence[str] = (),
    categorical: str | Sequence[str] = (),
    numeric: str | Sequence[str] = (),
    split_column: str = "",
    id_column: str = "",
    missing: str | Sequence[str] = _columns.MISSING,
    delimiter: str = "",
    classes: str | Sequence[str] = (),
    unknown_labels: bool = False,
    test_fraction: float = 0.2,
    name: str = "",
    licence: str = "",
    held_out: float = 0.1,
    split_seed: int = 0,
) -> Dataset:
    """Reads a table; see the module for formats, types of columns and parts.

    Arguments for several columns also accept one string of comma-separated names.

    Args:
      path: the file, or a folder of files of the same columns.
      label: column of labels, whose values are the classes; for another task, the numeric columns,
        whose names are those of the outputs. Several columns of classes are soft labels: the
        probability of each, by its name.
      task: "classification", "multilabel" (cells are 0 and 1, or false and true), "regression".
      test_path: file or folder of the test part.
      features: columns that are inputs; by default all that no other argument uses.
      drop: columns that are left out.
      categorical: columns that are categorical though they hold numbers.
      numeric: columns that must be numbers.
      split_column: column with the values train, val or test.
      id_column: column whose hash draws the parts, so that rows of one value stay together.
      missing: cells of text that stand for a missing value.
      delimiter: of text; a comma in `.csv`, a tab in `.tsv`.
      classes: classes in label order; by default sorted.
      unknown_labels: whether rows without a label are kept, as examples whose label is unknown.
      test_fraction: share of the rows that is the test part where a hash decides.
      name: name in the provenance; the file's name by default.
      licence: licence of the data, for the provenance.
      held_out: share of the training part held out, where no file or cell names a part `val`.
      split_seed: seed of the split.

    Raises:
      DataUnavailable: damaged files, cells that do not fit their column, no label, one class, a
        class without training rows, columns that look like identifiers.
      ArgumentError: a column that does not exist, or an invalid argument.
    """
    _splits.check_held_out(held_out)
    labels_lib.check_task(task)
    root = source.existing(path, hint=HINT)
    files = list_files(root)
    named = parts_by_name(files)
    if test_path:
        more = list_files(source.existing(test_path, hint=HINT))
        files, named = [*files, *more], [*["train"] * len(files), *["test"] * len(more)]
    gone = _splits.names_of(missing)
    read = [_columns.read(file, delimiter=delimiter, missing=gone) for file in files]
    table = _columns.concatenate(read, root)
    for column in _splits.names_of(label):
        require(table, column, "label")
    given = np.repeat(np.array(named), [len(one) for one in read])
    parts = split(
        table,
        given,
        split_column=split_column,
        id_column=id_column,
        test_fraction=test_fraction,
        held_out=held_out,
        seed=split_seed,
    )
    return make_from(
        table,
        parts,
        label=label,
        features=features,
        drop=(*_splits.names_of(drop), *(c for c in (split_column, id_column) if c)),
        categorical=categorical,
        numeric=numeric,
        classes=classes,
        task=task,
        unknown_labels=unknown_labels,
        provenance=Provenance(
            name or root.name, str(path), len(table), source.files_checksum(files), licence
        ),
        held_out=held_out,
        split_seed=split_seed,
    )


def split(
    table: _columns.Table,
    given: np.ndarray,
    *,
    split_column: str,
    id_column: str,
    test_fraction: float,
    held_out: float,
    seed: int,
    keys: Sequence[bytes] = (),
) -> np.ndarray:
    """Returns the part of each row, `[n]`.

    Args:
      table: all rows.
      given: the part that the file of each row names, `[n]`, "" where none does.
      split_column: see `make`.
      id_column: see `make`.
      test_fraction: see `make`.
      held_out: see `make`.
      seed: of the hash.
      keys: what is hashed of each row without `id_column`, `[n]`; by default all its cells.

    Raises:
      DataUnavailable: a cell that names no part, or an empty part.
      ArgumentError: no such column.
    """
    where = str(table.path)
    for argument, column in (("split_column", split_column), ("id_column", id_column)):
        if column:
            require(table, column, argument)
    if split_column:
        cells = table.text(split_column)
        return _splits.settle(
            np.array(
                [
                    _splits.part_of(cell or "", where=f"{where} {table.at(i)}: {split_column}")
                    for i, cell in enumerate(cells)
                ]
            ),
            where=where,
        )
    if given[0]:
        return _splits.settle(given, where=where)
    if id_column:
        keys = [("" if cell is None else cell).encode() for cell in table.text(id_column)]
    else:
        keys = keys or list(_columns.iterate_rows(table))
    return _splits.by_hash(
        keys,
        test_fraction=test_fraction,
        held_out=held_out,
        seed=seed,
    )


def require(table: _columns.Table, column: str, argument: str) -> None:
    """Raises an error for a column that does not exist.

    Raises:
      ArgumentError: with the nearest name.
    """
    if column not in table.names:
        raise ArgumentError(
            f"{table.path} has no column {column!r}",
            where=argument,
            hint=nearest(column, table.names),
        )


def labels_of(
    table: _columns.Table,
    columns: Sequence[str],
    parts: np.ndarray,
    *,
    task: str,
    classes: str | Sequence[str],
    unknown: bool,
    what: str,
) -> tuple[np.ndarray, tuple[str, ...], float | None]:
    """Returns the labels of all rows, as a source takes them.

    Args:
      table: all rows.
      columns: of labels.
      parts: of the rows, `[n]`.
      task: what labels are.
      classes: names of the outputs; by default the sorted classes, or the columns.
      unknown: whether rows without a label are kept.
      what: examples in messages: "images", "rows".

    Returns:
      int32 `[n]`, or float64 `[n, m]` of other tasks and of soft labels; names of the outputs; and
      the value of an unknown label, None where there is none.

    Raises:
      ArgumentError: no such column.
      DataUnavailable: see `read_labels`, `read_targets` and `_splits.number`.
    """
    if not columns:
        raise ArgumentError("no column is named", where="label", hint=nearest("", table.names))
    if task != "classification" or len(columns) > 1:
        soft = task == "classification"  # a column of probabilities for each class
        labels = read_targets(table, columns, task=task, unknown=unknown and not soft)
        none = math.nan if np.isnan(labels).any() else None
        return labels, _splits.names_of(classes) or tuple(columns), none
    names = read_labels(table, columns[0], unknown=unknown)
    labels, order = _splits.number(names, parts, classes=classes, where=str(table.path), what=what)
    return labels, order, -1.0 if None in names else None


def read_labels(table: _columns.Table, column: str, *, unknown: bool = False) -> list[str | None]:
    """Returns the class of each row as text.

    Raises:
      ArgumentError: no such column.
      DataUnavailable: a row without a label, unless `unknown`; or fractions.
    """
    require(table, column, "label")
    labels = table.text(column)
    _check_present(table, column, np.array([cell is None for cell in labels]), unknown=unknown)
    cells = table.cells[column]
    if cells.dtype != object:
        odd = np.flatnonzero(np.isfinite(cells) & (cells != np.floor(cells)))
        if odd.size:
            raise DataUnavailable(
                f"{table.at(int(odd[0]))}: the label {column!r} is {cells[odd[0]]}",
                where=str(table.path),
                hint='classes are whole numbers or text; numbers to predict are task="regression"',
            )
    return labels


def _check_present(
    table: _columns.Table, column: str, absent: np.ndarray, *, unknown: bool
) -> None:
    if not absent.any() or (unknown and not absent.all()):
        return
    count = int(absent.sum()) - 1
    raise DataUnavailable(
        f"{table.at(int(np.argmax(absent)))}: no label in {column!r}"
        + (f", as in {count} more rows" if count else ""),
        where=str(table.path),
        hint="leave these rows out, fill them in, or set unknown_labels=True",
    )


_TRUTH = {"false": 0.0, "true": 1.0, "no": 0.0, "yes": 1.0}


def read_targets(
    table: _columns.Table, columns: Sequence[str], *, task: str, unknown: bool
) -> np.ndarray:
    """Returns columns of labels as float64 `[n, m]`, NaN where one is unknown.

    Raises:
      ArgumentError: no such column.
      DataUnavailable: text, or rows without a label, unless `unknown`.
    """
    found = []
    for column in columns:
        require(table, column, "label")
        numbers = table.numbers(column)
        if numbers is None and task == "multilabel":
            cells = [None if c is None else c.lower() for c in table.text(column)]
            if all(cell is None or cell in _TRUTH for cell in cells):
                numbers = np.array([math.nan if c is None else _TRUTH[c] for c in cells])
        if numbers is None:
            cell = next((c for c in table.text(column) if c is not None), "nothing")
            raise DataUnavailable(
                f"the label {column!r} holds text: {cell!r}",
                where=str(table.path),
                hint={
                    "classification": "one column of classes, or the probability of each class",
                    "multilabel": "0 and 1 are expected",
                    "regression": "numbers are expected",
                }[task],
            )
        _check_present(table, column, np.isnan(numbers), unknown=unknown)
        found.append(numbers)
    return np.stack(found, 1)


def choose(
    table: _columns.Table,
    *,
    label: Sequence[str],
    features: str | Sequence[str],
    drop: str | Sequence[str],
    categorical: str | Sequence[str],
    numeric: str | Sequence[str],
    trained: np.ndarray,
) -> tuple[dict[str, np.ndarray], dict[str, list[str]], list[str]]:
    """Sorts columns into numeric and categorical ones.

    Args:
      table: all rows.
      label: columns of labels.
      features: see `make`.
      drop: see `make`.
      categorical: see `make`.
      numeric: see `make`.
      trained: rows of the training part, bool `[n]`.

    Returns:
      Numeric columns, float64 `[n]` with NaN; categorical ones, text with "" where it is missing;
      and notes on the columns left out, one line each.

    Raises:
      ArgumentError: no such column, or none at all.
      DataUnavailable: columns that do not have their declared type, or look like identifiers.
    """
    lists = {"features": features, "drop": drop, "categorical": categorical, "numeric": numeric}
    chosen = {argument: _splits.names_of(value) for argument, value in lists.items()}
    for argument, columns in chosen.items():
        for column in columns:
            require(table, column, argument)
            if column in label and argument != "drop":
                raise ArgumentError(f"{column!r} is a label", where=argument)
    left_out = {*label, *chosen["drop"]}
    wanted = chosen["features"] or tuple(n for n in table.names if n not in left_out)
    numbers: dict[str, np.ndarray] = {}
    texts: dict[str, list[str]] = {}
    notes = []
    for column in wanted:
        if column not in chosen["categorical"]:
            values = table.numbers(column)
            if values is not None:
                numbers[column] = values
                continue
            if column in chosen["numeric"]:
                cell = next((c for c in table.text(column) if c is not None), "nothing")
                raise ArgumentError(f"{column!r} holds text: {cell!r}", where="numeric")
        text = ["" if cell is None else cell for cell in table.text(column)]
        present = [cell for cell, own in zip(text, trained, strict=True) if own and cell]
        values = set(present)
        if not values:
            notes.append(f"the column {column!r} is left out: it is empty in the training part")
            continue
        many = len(values) > MANY and 2 * len(values) > len(present)
        if many and column not in chosen["categorical"]:
            raise DataUnavailable(
                f"the column {column!r} has {len(values)} different values in {len(present)} "
                f"training rows, such as {present[0][:40]!r}",
                where=str(table.path),
                hint=f"of names or sentences drop={column}; categorical={column} keeps them as "
                "categories",
            )
        texts[column] = text
    if not numbers and not texts:
        raise ArgumentError(
            "no column is left as input", where="features", hint=nearest("", table.names)
        )
    return numbers, texts, notes


def make_from(
    table: _columns.Table,
    parts: np.ndarray,
    *,
    label: str | Sequence[str],
    features: str | Sequence[str] = (),
    drop: str | Sequence[str] = (),
    categorical: str | Sequence[str] = (),
    numeric: str | Sequence[str] = (),
    classes: str | Sequence[str] = (),
    task: str = "classification",
    unknown_labels: bool = False,
    provenance: Provenance,
    held_out: float,
    split_seed: int,
) -> Dataset:
    """Returns the data set of a table whose rows have their parts.

    Args:
      table: all rows.
      parts: "train", "held_out" or "test" of each, `[n]`.
      label: see `make`, as the arguments that follow.
      features: columns.
      drop: columns.
      categorical: columns.
      numeric: columns.
      classes: names.
      task: of the labels.
      unknown_labels: see `make`.
      provenance: of the files; name, number and checksum are replaced.
      held_out: share of the training part held out where no row is.
      split_seed: seed of that split.

    Raises:
      DataUnavailable: see `make`.
      ArgumentError: see `make`.
    """
    columns = _splits.names_of(label)
    trained = parts != "test"
    numbers, texts, notes = choose(
        table,
        label=columns,
        features=features,
        drop=drop,
        categorical=categorical,
        numeric=numeric,
        trained=trained,
    )
    labels, order, none = labels_of(
        table, columns, parts, task=task, classes=classes, unknown=unknown_labels, what="rows"
    )
    _splits.check_filled(parts, where=str(table.path), what="rows")
    values, codes = [], []
    for text in texts.values():
        known, inverse = np.unique(np.array(text, object), return_inverse=True)
        values.append(known.tolist())
        codes.append(inverse)
    blank = np.zeros((len(table), 0))
    all_codes = np.stack(codes, 1) if codes else blank.astype(np.int64)
    all_numbers = np.stack(list(numbers.values()), 1) if numbers else blank
    raws = []
    for part, rows in (("train", trained), ("test", ~trained)):
        seed = f"{provenance.sha256} {part} {columns} {[*texts]} {[*numbers]} {order}"
        sha = hashlib.sha256(seed.encode() + np.flatnonzero(rows).astype("<i8").tobytes())
        p = provenance._replace(
            name=f"{provenance.name} ({part})", n=int(rows.sum()), sha256=sha.hexdigest()
        )
        raws.append(_tables.Raw(all_codes[rows], values, all_numbers[rows], labels[rows], p))
    dataset = _tables.make_dataset(
        *raws,
        classes=order,
        held_out=held_out,
        split_seed=split_seed,
        held=_splits.held(parts[trained]),
        task=task,
        ignore_label=none,
    )
    checks.root(dataset.train).notes = tuple(f"{provenance.origin}: {note}" for note in notes)
    return dataset
