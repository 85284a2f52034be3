"""Clicks on mobile ads in the layout of the Avazu challenge (Kaggle, 2014), from a local file.

Comma-separated with a header, in the order of time: id, click, hour (YYMMDDHH) and 21 anonymized
categories. The challenge's training file (40,428,967 rows) is the one with clicks. It is Avazu's,
under the rules of the challenge.
"""

import datetime

from distill_jax.core.api import Dataset
from distill_jax.data import _tables

_NAMES = (
    "id click hour C1 banner_pos site_id site_domain site_category app_id app_domain app_category "
    "device_id device_ip device_model device_type device_conn_type C14 C15 C16 C17 C18 C19 C20 C21"
)
COLUMNS = tuple(_NAMES.split())
CATEGORICAL = COLUMNS[3:]
HINT = "name the training file of the Avazu challenge, plain or with .gz, with the argument path"
LABELS = {"0": 0, "1": 1}


def parse_hour(cell: str) -> tuple[int, int]:
    """Returns hour of the day, 1 to 24, and weekday, 1 (Monday) to 7, of YYMMDDHH in UTC."""
    if len(cell) != 8:
        raise ValueError
    time = datetime.datetime.strptime(cell, "%y%m%d%H")
    return time.hour + 1, time.isoweekday()


def make(
    *,
    path: str,
    buckets: int = 65536,
    max_rows: int = 0,
    test_fraction: float = 0.1,
    held_out: float = 0.1,
    split_seed: int = 0,
) -> Dataset:
    """Reads 23 categorical columns and no numeric one, 2 classes; the last rows are the test part.

    First hour of the day (25 ids) and weekday (8 ids), then the columns of the file, each hashed
    into `buckets` ids (`_tables.make_hash`; its key is the column's name); an empty field has id
    0. `id`, a name of the row, is dropped. Memory: 96 bytes a row.

    Args:
      path: the file, plain or `.gz`.
      buckets: ids of each hashed column, id 0 among them.
      max_rows: rows to read at most, from the start; 0 reads all.
      test_fraction: share of the rows read, at their end, that is the test part.
      held_out: share of the other rows held out, drawn over all their time.
      split_seed: seed of that split.

    Raises:
      DataUnavailable: no such file, or a line that is not of the layout.
      ArgumentError: impossible `buckets`, `max_rows` or `test_fraction`.
    """
    hashes = {column: _tables.make_hash(column, buckets) for column in CATEGORICAL}

    def encode(chunk: _tables.Chunk):
        times = chunk.convert("hour", parse_hour, "2i4", expected="YYMMDDHH")
        hashed = [chunk.convert(key, to, "i4", expected="text") for key, to in hashes.items()]
        clicks = chunk.convert("click", LABELS.__getitem__, "i4", expected="0 or 1")
        return clicks, [*times.T, *hashed], []

    return _tables.make_click_log(
        encode,
        path=path,
        name="Avazu layout",
        hint=HINT,
        columns=COLUMNS,
        delimiter=",",
        header=True,
        cardinalities=[25, 8, *[buckets] * len(CATEGORICAL)],
        numeric=0,
        max_rows=max_rows,
        test_fraction=test_fraction,
        held_out=held_out,
        split_seed=split_seed,
    )
