"""Columns of a user's tables: delimited text, JSON lines and Parquet, as text or numbers."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.core.errors import DataUnavailable, nearest, text_of
from distill_jax.data import _tables, source

DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet", ".pq")
SUFFIXES = (*DELIMITERS, *JSON_LINES, *PARQUET)

MISSING = ("", "?", "NA", "N/A", "NaN", "nan", "NULL", "null")
"""Cells of text that stand for a missing value."""

WHOLE = 2**53
"""From here on float64 does not hold every whole number."""

MOSTLY = 0.9
"""A column with at least this share of numbers is one of numbers with faulty cells."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of one or several files.

    Attributes:
      path: the file, or the folder of the files.
      cells: `[n]` by column: `object` arrays of text with None where it is missing, or float64
        with NaN.
      rows: `[n]`, the file and line or row number of each row, for messages.
      unusable: types of the columns that hold neither text nor numbers, by column.
      names: all columns in their order.
    """

    path: Path
    cells: Mapping[str, np.ndarray]
    rows: Sequence[str]
    unusable: Mapping[str, str]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, i: int) -> str:
        """Returns the location of row `i`, for messages."""
        return self.rows[i]

    def check(self, column: str) -> None:
        """Raises an error for a column that holds neither text nor numbers.

        Raises:
          DataUnavailable: the column is unusable; the hint gives the remedy.
        """
        if column in self.unusable:
            raise DataUnavailable(
                f"the column {column!r} holds {self.unusable[column]}",
                where=str(self.path),
                hint=f"leave it out with drop={column}, or store it as text or numbers",
            )

    def text(self, column: str) -> list[str | None]:
        """Returns a column as text; whole numbers without a fraction."""
        self.check(column)
        cells = self.cells[column]
        if cells.dtype == object:
            return cells.tolist()
        return [None if math.isnan(x) else _spell(x) for x in cells.tolist()]

    def numbers(self, column: str) -> np.ndarray | None:
        """Returns a column as float64 with NaN where it is missing; None for a column of text.

        Raises:
          DataUnavailable: a few cells that are no numbers among many that are, infinite values, or
            whole numbers too large to be represented exactly.
        """
        self.check(column)
        cells = self.cells[column]
        numbers = self._parsed(column) if cells.dtype == object else cells
        if numbers is None:
            return None
        whole = np.isfinite(numbers) & (numbers == np.floor(numbers))
        for odd, what, hint in (
            (np.isinf(numbers), "is infinite", "finite numbers, or nothing, are expected"),
            (
                whole & (np.abs(numbers) >= WHOLE),
                "has more digits than float64",
                f"of identifiers drop={column}, of codes categorical={column}",
            ),
        ):
            if odd.any():
                i = int(np.argmax(odd))
                what = f"{self.at(i)}: {column} {what}: {cells[i]}"
                raise DataUnavailable(what, where=str(self.path), hint=hint)
        return numbers

    def _parsed(self, column: str) -> np.ndarray | None:
        cells = self.cells[column]
        numbers = np.full(len(cells), math.nan)
        faulty, present = [], 0
        for i, cell in enumerate(cells.tolist()):
            if cell is not None:
                present += 1
                try:
                    numbers[i] = float(cell)
                except ValueError:
                    faulty.append(i)
        good = present - len(faulty)
        if faulty and present > 1 and good >= MOSTLY * present:
            raise DataUnavailable(
                f"{self.at(faulty[0])}: {column} is {cells[faulty[0]]!r}, and a number in {good} "
                f"of {present} rows",
                where=str(self.path),
                hint=f"correct it, name it in missing, or set categorical={column}",
            )
        return numbers if present and not faulty else None

    def select(self, keep: np.ndarray) -> "Table":
        """Returns the rows at positions `keep`."""
        cells = {name: column[keep] for name, column in self.cells.items()}
        return dataclasses.replace(self, cells=cells, rows=[self.rows[i] for i in keep])


def _spell(x: float) -> str:
    """Returns a number as text, without a fraction where it has none."""
    return str(int(x)) if math.isfinite(x) and x.is_integer() else repr(x)


def kind(path: Path) -> str:
    """Returns the file extension of a known format, without `.gz`; "" for other files."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else ""


def read(path: Path, *, delimiter: str = "", missing: Sequence[str] = MISSING) -> Table:
    """Reads a whole file; the format is inferred from its name.

    Args:
      path: `.csv`, `.tsv` (UTF-8 with a header, quoted with `"`), `.jsonl` (an object a line), each
        plain or `.gz`, or `.parquet`.
      delimiter: delimiter of text files; by default that of the extension.
      missing: cells of text that stand for a missing value.

    Raises:
      DataUnavailable: another format, or a damaged file.
    """
    ending = kind(path)
    if not path.is_file():
        raise DataUnavailable("is not a file", where=str(path))
    if not ending:
        given = path.name.removesuffix(".gz")
        hint = nearest(Path(given).suffix, SUFFIXES)
        raise DataUnavailable("has an ending that is not read", where=str(path), hint=hint)
    if ending in PARQUET:
        return from_arrow(read_parquet(path), path=path, missing=missing)
    if ending in JSON_LINES:
        return _read_json_lines(path, missing)
    return _read_delimited(path, delimiter or DELIMITERS[ending], missing)


def _lines(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(_tables.open_bytes(path), encoding="utf-8-sig", newline="")


def _read_delimited(path: Path, delimiter: str, missing: Sequence[str]) -> Table:
    if len(delimiter) != 1:
        raise DataUnavailable(f"delimiter is {delimiter!r}", where=str(path), hint="one character")
    rows, lines = [], []
    with _reading(path), _lines(path) as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header = next((row for row in reader if row), [])
        names = [name.strip() for name in header]
        _check_names(path, names)
        before = reader.line_num
        try:
            for row in reader:
                line, before = before + 1, reader.line_num
                if not row:
                    continue
                if len(row) != len(names):
                    raise DataUnavailable(
                        f"line {line}: {len(row)} columns, the header has {len(names)}",
                        where=str(path),
                        hint='a cell with the delimiter in it is quoted: "a, b"',
                    )
                rows.append(row)
                lines.append(f"line {line}")
        except csv.Error as error:
            raise DataUnavailable(
                f"line {reader.line_num}: {text_of(error)}",
                where=str(path),
                hint='a quoted cell begins and ends with ", and a " in it is doubled',
            ) from error
    _check_some(path, rows)
    gone = frozenset(missing)
    cells = {}
    for name, column in zip(names, zip(*rows, strict=True), strict=True):
        values = np.empty(len(column), object)
        values[:] = [None if (c := cell.strip()) in gone else c for cell in column]
        cells[name] = values
    return Table(path, cells, lines, {}, tuple(names))


def _reading(path: Path) -> Any:
    return source.reading(path, hint="text in UTF-8, plain or gzipped (.gz), is expected")


def _check_some(path: Path, rows: Sequence[Any]) -> None:
    if not rows:
        raise DataUnavailable("no rows", where=str(path))


def _check_names(path: Path, names: Sequence[str]) -> None:
    if not names:
        raise DataUnavailable("is empty", where=str(path), hint="a header of names is expected")
    for name in names:
        if not name or names.count(name) > 1:
            what = f"two columns are called {name!r}" if name else "a column has no name"
            hint = "the header names each column once"
            if not name:
                hint += "; pandas writes such a column of row numbers unless index=False"
            raise DataUnavailable(what, where=str(path), hint=hint)


def _read_json_lines(path: Path, missing: Sequence[str]) -> Table:
    columns: dict[str, list[Any]] = {}
    lines = []
    with _reading(path), _lines(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=_unique)
            except (ValueError, RecursionError) as error:
                what = f"line {number}: {text_of(error, most=100)}"
                hint = "one JSON object a line"
                raise DataUnavailable(what, where=str(path), hint=hint) from error
            if not isinstance(row, dict):
                what = f"line {number}: a {type(row).__name__}"
                raise DataUnavailable(what, where=str(path), hint="one JSON object a line")
            for name in row.keys() - columns.keys():
                columns[name] = [None] * len(lines)
            for name, column in columns.items():
                column.append(row.get(name))
            lines.append(f"line {number}")
    _check_some(path, lines)
    names = sorted(columns, key=list(columns).index)
    return _from_values(path, {n: columns[n] for n in names}, lines, missing)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two values are called {twice!r}")
    return row


def _from_values(
    path: Path, columns: Mapping[str, list[Any]], rows: Sequence[str], missing: Sequence[str]
) -> Table:
    cells, unusable = {}, {}
    for name, values in columns.items():
        kinds = {type(value) for value in values if value is not None}
        if odd := kinds - {str, int, float, bool}:
            unusable[name] = f"a {sorted(kind.__name__ for kind in odd)[0]} in some rows"
        elif kinds <= {int, float} and kinds and not _exceeds(values):
            cells[name] = _to_float(values)
        else:
            gone = frozenset(missing)
            column = np.empty(len(values), object)
            column[:] = [_as_text(value, gone) for value in values]
            cells[name] = column
    return Table(path, cells, rows, unusable, tuple(columns))


def _exceeds(values: Sequence[Any]) -> bool:
    """Returns whether a whole number is too large for float64; the values are then kept as text."""
    return any(isinstance(value, int) and abs(value) >= WHOLE for value in values)


def _as_text(value: Any, missing: frozenset[str]) -> str | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return _spell(value) if isinstance(value, float) else str(value)
    return None if (text := value.strip()) in missing else text


def _to_float(values: Sequence[Any]) -> np.ndarray:
    out = np.full(len(values), math.nan)
    for i, value in enumerate(values):
        if value is not None:
            try:
                out[i] = value
            except OverflowError:
                out[i] = math.inf
    return out


# Arrow.


def arrow() -> Any:
    """Returns the module `pyarrow`.

    Raises:
      DataUnavailable: it is not installed, or so old that it unpickles types of columns.
    """
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        hint = "pip install pyarrow"
        raise DataUnavailable("pyarrow cannot be imported", where="dataset", hint=hint) from error
    if tuple(int(part) for part in pyarrow.__version__.split(".")[:2]) < (15, 0):
        raise DataUnavailable(
            f"pyarrow {pyarrow.__version__} runs code that a file names (CVE-2023-47248)",
            where="dataset",
            hint='pip install "pyarrow>=15"',
        )
    return pyarrow


def read_parquet(path: Path) -> Any:
    """Returns the Arrow table of a Parquet file.

    Raises:
      DataUnavailable: no Parquet file, or a damaged one.
    """
    pa = arrow()
    with arrow_reading(path, hint="a Parquet file is expected"):
        # One file and no folder of partitions, whose names would become columns.
        return pa.parquet.ParquetFile(path, memory_map=True).read()


class arrow_reading:
    """Like `source.reading`, for errors raised by Arrow, including Arrow's own types."""

    def __init__(self, path: Path, *, hint: str):
        self.path, self.hint = path, hint

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, DataUnavailable) or not isinstance(error, Exception):
            return
        what = f"cannot be read: {text_of(error, most=120) or type(error).__name__}"
        raise DataUnavailable(what, where=str(self.path), hint=self.hint) from error


def from_arrow(table: Any, *, path: Path, missing: Sequence[str] = MISSING) -> Table:
    """Returns the columns of an Arrow table that are text or numbers.

    Truth values are text, decimals numbers. Nested columns, times and bytes are unusable.

    Raises:
      DataUnavailable: no rows, or two columns of one name.
    """
    pa = arrow()
    _check_names(path, table.column_names)
    rows = [f"row {i}" for i in range(1, len(table) + 1)]
    _check_some(path, rows)
    cells: dict[str, np.ndarray] = {}
    unusable: dict[str, str] = {}
    gone = frozenset(missing)
    for name in table.column_names:
        column = table.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        t = column.type
        if pa.types.is_integer(t) or pa.types.is_floating(t) or pa.types.is_decimal(t):
            numbers = column.cast(pa.float64(), safe=False).to_numpy()
            if pa.types.is_integer(t) and (np.abs(np.nan_to_num(numbers)) >= WHOLE).any():
                texts = [None if x is None else str(x) for x in column.to_pylist()]
                numbers = np.array(texts, object)
            cells[name] = numbers
        elif pa.types.is_string(t) or pa.types.is_large_string(t) or pa.types.is_boolean(t):
            values = np.empty(len(column), object)
            values[:] = [_as_text(value, gone) for value in column.to_pylist()]
            cells[name] = values
        elif pa.types.is_null(t):
            cells[name] = np.full(len(column), None, object)
        else:
            unusable[name] = f"values of the Arrow type {str(t)[:60]}"
    return Table(path, cells, rows, unusable, tuple(table.column_names))


def concatenate(tables: Sequence[Table], path: Path) -> Table:
    """Joins tables of the same columns.

    Raises:
      DataUnavailable: columns or their types differ.
    """
    first = tables[0]
    if len(tables) == 1:
        return dataclasses.replace(first, path=path)
    for other in tables[1:]:
        if set(other.names) != set(first.names):
            odd = sorted(set(other.names) ^ set(first.names))
            raise DataUnavailable(
                f"the column {odd[0]!r} is in one of {first.path.name} and {other.path.name}",
                where=str(path),
                hint="files of one table have the same columns",
            )
    unusable = {name: what for table in tables for name, what in table.unusable.items()}
    cells: dict[str, np.ndarray] = {}
    for name in (n for n in first.names if n not in unusable):
        pieces = [table.cells[name] for table in tables]
        if any(piece.dtype == object for piece in pieces):
            pieces = [
                p if p.dtype == object else np.array(t.text(name), object)
                for p, t in zip(pieces, tables, strict=True)
            ]
        cells[name] = np.concatenate(pieces)
    rows = [f"{table.path.name} {row}" for table in tables for row in table.rows]
    return Table(path, cells, rows, unusable, first.names)


def iterate_rows(table: Table) -> Iterator[bytes]:
    """Yields the content of each row, the same whatever the order of the columns."""
    columns = [table.text(name) for name in sorted(table.cells)]
    for row in zip(*columns, strict=True):
        yield "\x1f".join("" if cell is None else cell for cell in row).encode("utf-8", "replace")
