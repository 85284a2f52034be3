"""Code shared by the tables: delimited text in chunks, ids of categories, scaling, embedded files.

A table's input is `{"categorical": int32 [n, c], "numeric": float32 [n, m]}`. Column j of
`categorical` holds ids in [0, cardinalities[j]); id 0 stands for a missing value and for a value
that does not occur in the training part. The vocabulary of ids and the mean and deviation of every
numeric column come from the official training part alone, before the held-out share is split off.
"""

import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from distill_jax.core.api import Dataset, Provenance
from distill_jax.core.errors import ArgumentError, DataUnavailable
from distill_jax.data import shapes, source

CHUNK = 8192
MISSING = frozenset({"", "?"})


class _Converted(dict[str, Any]):
    """Results of `to` by cell, stripped of blanks; `last` is the cell that was converted last."""

    def __init__(self, to: Callable[[str], Any]):
        self.to, self.last = to, ""

    def __missing__(self, cell: str) -> Any:
        self.last = cell
        value = self[cell] = self.to(cell.strip())
        return value


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some consecutive rows of a file.

    Attributes:
      path: the file.
      lines: the line of each row, counted from 1.
      columns: cells `[n]` by column name.
    """

    path: Path
    lines: Sequence[int]
    columns: Mapping[str, Sequence[str]]

    def __len__(self) -> int:
        return len(self.lines)

    def convert(
        self, column: str, to: Callable[[str], Any], dtype: Any, *, expected: str
    ) -> np.ndarray:
        """Returns `to` of every cell of a column, stripped of blanks; each value is converted once.

        Raises:
          DataUnavailable: `to` raised KeyError or ValueError; the message names the file, line,
            cell and what was `expected`.
        """
        cells, table = self.columns[column], _Converted(to)
        try:
            return np.fromiter(map(table.__getitem__, cells), dtype, len(cells))
        except (KeyError, ValueError) as error:
            line = self.lines[cells.index(table.last)]
            raise DataUnavailable(
                f"line {line}: {column} is {table.last.strip()!r}",
                where=str(self.path),
                hint=f"expected: {expected}",
            ) from error

    def numbers(self, column: str, *, optional: bool = False) -> np.ndarray:
        """Returns a numeric column, float64 `[n]`; empty cells are NaN where `optional`."""

        def number(cell: str) -> float:
            if optional and not cell:
                return math.nan
            if not math.isfinite(value := float(cell)):
                raise ValueError
            return value

        hint = "a finite number, or nothing" if optional else "a finite number"
        return self.convert(column, number, np.float64, expected=hint)


def open_bytes(path: Path) -> IO[bytes]:
    """Opens a file, decompressed if it ends in `.gz`."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # pyright: ignore[reportReturnType]


def read_chunks(
    path: Path, *, columns: Sequence[str], delimiter: str = ",", header: bool = False, rows: int = 0
) -> Iterator[Chunk]:
    """Reads delimited text (UTF-8, no quoting, plain or `.gz`) piece by piece; skips empty lines.

    Args:
      path: the file.
      columns: names of all its columns, in order.
      delimiter: one character.
      header: whether the first line holds those names.
      rows: rows to read at most; 0 reads all.

    Raises:
      DataUnavailable: the file cannot be read, or a line has another number of columns.
    """

    def refuse(line: int, what: str) -> DataUnavailable:
        names = columns if len(columns) < 8 else (*columns[:3], "...", *columns[-2:])
        sort = {"\t": "tab"}.get(delimiter, repr(delimiter))
        hint = f"expected: {len(columns)} columns between {sort}: {', '.join(names)}"
        return DataUnavailable(f"line {line}: {what}", where=str(path), hint=hint)

    with (
        source.reading(path),
        io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="\n") as file,
    ):
        texts = (text.rstrip("\r\n") for text in file)
        numbered = (
            (line, text.split(delimiter)) for line, text in enumerate(texts, start=1) if text
        )
        if header:
            line, names = next(numbered, (1, []))
            if [name.strip() for name in names] != list(columns):
                raise refuse(line, f"the header is {delimiter.join(names)[:60]!r}")
        numbered = itertools.islice(numbered, rows or None)
        while chunk := list(itertools.islice(numbered, CHUNK)):
            for line, row in chunk:
                if len(row) != len(columns):
                    raise refuse(line, f"{len(row)} columns")
            lines, cells = zip(*chunk, strict=True)
            yield Chunk(path, lines, dict(zip(columns, zip(*cells, strict=True), strict=True)))


class Raw(NamedTuple):
    """A part of a table before ids are assigned from the training part.

    Attributes:
      codes: int `[n, c]`, positions in `values`.
      values: the strings of each of the c categorical columns.
      numeric: float64 `[n, m]`.
      labels: int `[n]`, or labels of another task.
      provenance: provenance of the part.
    """

    codes: np.ndarray
    values: list[list[str]]
    numeric: np.ndarray
    labels: np.ndarray
    provenance: Provenance


class _Codes(dict[str, int]):
    """Numbers new strings in the order in which they are first looked up."""

    def __missing__(self, value: str) -> int:
        return self.setdefault(value, len(self))


def read_raw(
    path: Path,
    *,
    columns: Sequence[str],
    categorical: Sequence[str],
    numeric: Sequence[str],
    label: str,
    labels: Mapping[str, int],
    name: str,
    licence: str,
) -> Raw:
    """Reads a whole file of comma-separated values without a header.

    Args:
      path: the file, plain or `.gz`.
      columns: names of all columns; those not used by another argument are dropped.
      categorical: names of the c categorical columns.
      numeric: names of the m numeric columns.
      label: name of the column of labels.
      labels: label numbers by their text.
      name: accurate name of the part.
      licence: SPDX identifier or short name.

    Raises:
      DataUnavailable: the file is empty, damaged, or a cell does not fit the type of its column.
    """
    known = ", ".join(labels)
    codes = {key: _Codes() for key in categorical}
    pieces = []
    for chunk in read_chunks(path, columns=columns):
        ids = [
            chunk.convert(key, seen.__getitem__, np.int32, expected="text")
            for key, seen in codes.items()
        ]
        numbers = [chunk.numbers(key) for key in numeric]
        y = chunk.convert(label, labels.__getitem__, np.int32, expected=known)
        pieces.append((np.stack(ids, 1), np.stack(numbers, 1), y))
    if not pieces:
        raise DataUnavailable("no examples", where=str(path))
    ids, numbers, y = (np.concatenate(part) for part in zip(*pieces, strict=True))
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    provenance = Provenance(name, str(path), len(y), sha256, licence)
    return Raw(ids, [list(seen) for seen in codes.values()], numbers, y, provenance)


def count_in_name(raw: Raw, rows: int) -> Raw:
    """Returns the part with its number of rows in its name, if that is not the original `rows`."""
    p = raw.provenance
    if p.n == rows:
        return raw
    return raw._replace(provenance=p._replace(name=f"{p.name}, {p.n} rows instead of {rows}"))


def signed_log(x: np.ndarray) -> np.ndarray:
    """Returns sign(x) log(1 + |x|), for columns with heavy tails."""
    return np.sign(x) * np.log1p(np.abs(x))


def standardize(train: np.ndarray, *others: np.ndarray) -> None:
    """Brings columns to mean 0 and deviation 1 of `train`, in place; NaN becomes 0, the mean.

    A column that does not vary in `train` is centred only. Columns are processed one by one, so
    that no array of the size of the table is allocated.
    """
    for j in range(train.shape[1]):
        present = train[:, j][~np.isnan(train[:, j])].astype(np.float64)
        mean = present.mean() if present.size else 0.0
        scale = present.std() if present.size and np.ptp(present) else 1.0
        for part in (train, *others):
            part[:, j] = np.nan_to_num((part[:, j] - mean) / scale)


def make_dataset(
    train: Raw,
    test: Raw,
    *,
    log: Collection[int] = (),
    classes: Sequence[str],
    held_out: float,
    split_seed: int,
    held: np.ndarray | None = None,
    task: str = "classification",
    ignore_label: float | None = None,
) -> Dataset:
    """Assigns ids and scales from the training part; see the module.

    Ids follow the sorted values of a column, from 1.

    Args:
      train: the official training part.
      test: the test part.
      log: positions of numeric columns to take `signed_log` of before they are standardized.
      classes: class names in label order.
      held_out: share of the training part held out.
      split_seed: seed of that split.
      held: which training examples are held out instead, bool `[n]`.
      task: what labels are; see `labels`.
      ignore_label: the value that stands for an unknown label.
    """
    parts = (train, test)
    index = []
    for j, values in enumerate(train.values):
        seen = {values[code] for code in np.unique(train.codes[:, j])} - MISSING
        index.append({value: i for i, value in enumerate(sorted(seen), start=1)})
    inputs = []
    for part in parts:
        ids = np.zeros(part.codes.shape, np.int32)
        for j, known in enumerate(index):
            ids[:, j] = np.array([known.get(v, 0) for v in part.values[j]])[part.codes[:, j]]
        numeric = np.array(part.numeric, np.float64)
        for j in log:
            numeric[:, j] = signed_log(numeric[:, j])
        inputs.append((ids, numeric))
    standardize(*(numeric for _, numeric in inputs))
    sources = [
        source.ArraySource(
            {"categorical": ids, "numeric": numeric.astype(np.float32)},
            part.labels,
            part.provenance,
            task=task,
            ignore_label=ignore_label,
        )
        for part, (ids, numeric) in zip(parts, inputs, strict=True)
    ]
    return source.make_dataset(
        *sources,
        held_out=held_out,
        split_seed=split_seed,
        classes=classes,
        cardinalities=[len(known) + 1 for known in index],
        held=held,
        task=task,
    )


def make_spec(
    *,
    per_class: Sequence[int],
    n_test: int,
    cardinalities: Sequence[int],
    numeric: int,
    held_out: float,
    classes: Sequence[str],
) -> Dataset:
    """Returns sizes and shapes of a table with `numeric` numeric columns; see `shapes`."""
    return shapes.make_shapes(
        per_class=per_class,
        n_test=n_test,
        shape={"categorical": (len(cardinalities),), "numeric": (numeric,)},
        dtype={"categorical": np.int32, "numeric": np.float32},
        held_out=held_out,
        classes=classes,
        cardinalities=cardinalities,
    )


def read_asset(
    asset: str, *, sha256: str, name: str, licence: str, split: str = "own"
) -> tuple[Raw, Raw]:
    """Reads a table that ships with the package; returns its training and test part.

    Keys of the `.npz`: `codes` uint8 `[c, n]`, `values` (UTF-8 of a JSON list of c lists of
    strings), `numeric_<j>` unsigned `[n]` for each numeric column, `scale` `[m]` by which they are
    divided, `label` uint8 `[n]`, `test_<split>` bool `[n]`. Columns are stored one after another
    because they compress better that way.

    Raises:
      DataUnavailable: the file is absent from the installation or damaged.
    """
    path = resources.files("distill_jax.data") / "assets" / asset
    hint = "install the package again, or rebuild the asset with tools/build_assets.py"
    if not path.is_file():
        raise DataUnavailable("the embedded data set is missing", where=str(path), hint=hint)
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataUnavailable("the embedded data set is damaged", where=str(path), hint=hint)
    with np.load(io.BytesIO(content)) as arrays:
        codes, labels, test = arrays["codes"].T, arrays["label"], arrays[f"test_{split}"]
        values = json.loads(arrays["values"].tobytes())
        scale = arrays["scale"]
        columns = [arrays[f"numeric_{j}"] / scale[j] for j in range(len(scale))]
    numeric = np.stack(columns, 1)

    def part(title: str, rows: np.ndarray) -> Raw:
        origin = f"distill_jax/data/assets/{asset}"
        provenance = Provenance(f"{name} ({title})", origin, int(rows.sum()), sha256, licence)
        return Raw(codes[rows], values, numeric[rows], labels[rows], provenance)

    return part("train", ~test), part("test", test)


def make_hash(column: str, buckets: int) -> Callable[[str], int]:
    """Returns the stable map from values of a column to ids: 0 for an empty value, else

        1 + BLAKE2b(value in UTF-8; key = column name, 8 bytes, little-endian) mod (buckets - 1)

    so that ids need no vocabulary, do not depend on the rows read, and equal values of different
    columns collide independently. No value is unknown; rare values share buckets with others.

    Raises:
      ArgumentError: fewer than 2 buckets.
    """
    if isinstance(buckets, bool) or not isinstance(buckets, int) or buckets < 2:
        raise ArgumentError(f"buckets is {buckets}", where="buckets", hint="a whole number from 2")
    keyed = hashlib.blake2b(key=column.encode(), digest_size=8)

    def bucket(value: str) -> int:
        if not value:
            return 0
        digest = keyed.copy()
        digest.update(value.encode())
        return 1 + int.from_bytes(digest.digest(), "little") % (buckets - 1)

    return bucket


def count_lines(path: Path, *, stop: int = 0) -> int:
    """Returns the number of lines of a file, or a number of at least `stop` if that is given.

    Raises:
      DataUnavailable: the file cannot be read.
    """
    count, last = 0, b"\n"
    with source.reading(path), open_bytes(path) as file:
        while (not stop or count < stop) and (block := file.read(1 << 20)):
            count, last = count + block.count(b"\n"), block[-1:]
    return count + (last != b"\n")


def make_click_log(
    encode: Callable[[Chunk], tuple[np.ndarray, Sequence[np.ndarray], Sequence[np.ndarray]]],
    *,
    path: str,
    name: str,
    hint: str,
    columns: Sequence[str],
    delimiter: str,
    header: bool,
    cardinalities: Sequence[int],
    numeric: int,
    max_rows: int,
    test_fraction: float,
    held_out: float,
    split_seed: int,
) -> Dataset:
    """Reads one large file of clicks in the order of time; its last rows are the test part.

    The file is read twice, once to count its lines, so that only the arrays and one chunk are held
    in memory: 4 (c + m + 1) bytes a row. The digests in the provenance are those of the arrays.

    Args:
      encode: `chunk -> (labels [n], c columns of ids [n], m columns of numbers [n])`; a number is
        NaN where it is missing.
      path: the file, plain or `.gz`.
      name: name of the data in that layout.
      hint: the file expected at `path`.
      columns: names of all columns.
      delimiter: one character.
      header: whether the first line holds those names.
      cardinalities: of the categorical columns, c of them.
      numeric: m.
      max_rows: rows to read at most, from the start; 0 reads all.
      test_fraction: share of the rows read that are the test part.
      held_out: share of the training part held out, drawn over all its time.
      split_seed: seed of that split.

    Raises:
      DataUnavailable: no such file, or a line that is not of the layout.
      ArgumentError: an impossible `max_rows` or `test_fraction`.
    """
    if max_rows < 0:
        raise ArgumentError(f"max_rows is {max_rows}", where="max_rows", hint="0 or more")
    file = source.existing(path, hint=hint)
    if not file.is_file():
        raise DataUnavailable("is not a file", where=str(file), hint=hint)
    lines = count_lines(file, stop=max_rows and max_rows + header) - header
    capacity = min(lines, max_rows) if max_rows else lines
    labels = np.zeros(capacity, np.int32)
    ids = np.zeros((capacity, len(cardinalities)), np.int32)
    numbers = np.zeros((capacity, numeric), np.float32)
    n = 0
    for chunk in read_chunks(
        file, columns=columns, delimiter=delimiter, header=header, rows=max_rows
    ):
        rows = slice(n, n + len(chunk))
        labels[rows], id_columns, number_columns = encode(chunk)
        for j, column in enumerate(id_columns):
            ids[rows, j] = column
        for j, column in enumerate(number_columns):
            numbers[rows, j] = column
        n += len(chunk)
    if not n:
        raise DataUnavailable("no examples", where=str(file), hint=hint)
    cut = n - int(test_fraction * n + 0.5) if 0 < test_fraction < 1 else 0
    if not 0 < cut < n:
        raise ArgumentError(
            f"test_fraction {test_fraction} of {n} rows leaves a part empty",
            where="test_fraction",
            hint="0 < x < 1",
        )
    standardize(numbers[:cut], numbers[cut:n])

    def part(title: str, start: int, stop: int) -> source.ArraySource:
        inputs = {"categorical": ids[start:stop], "numeric": numbers[start:stop]}
        y = labels[start:stop]
        sha256 = source.checksum({"input": inputs, "label": y})
        full = f"{name}, {file.name} ({title}: rows {start + 1} to {stop})"
        provenance = Provenance(full, str(path), stop - start, sha256, "terms of the owner")
        return source.ArraySource(inputs, y, provenance)

    return source.make_dataset(
        part("train", 0, cut),
        part("test", cut, n),
        held_out=held_out,
        split_seed=split_seed,
        classes=("no click", "click"),
        cardinalities=cardinalities,
    )
