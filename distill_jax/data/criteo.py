"""Clicks on display ads in the layout of the Criteo challenge (Kaggle, 2014), from a local file.

Tab-separated, no header, in the order of time: the label, 13 integers I1 to I13, 26 categories C1
to C26 of 8 hexadecimal digits; a missing value is an empty field. The challenge's training file
(45,840,617 rows) is the one with labels. It is Criteo's, under its own terms.
"""

from distill_jax.core.api import Dataset
from distill_jax.data import _tables

NUMERIC = tuple(f"I{i}" for i in range(1, 14))
CATEGORICAL = tuple(f"C{i}" for i in range(1, 27))
COLUMNS = ("label", *NUMERIC, *CATEGORICAL)
HINT = "name train.txt of the Criteo challenge, plain or with .gz, with the argument path"
LABELS = {"0": 0, "1": 1}


def make(
    *,
    path: str,
    buckets: int = 65536,
    max_rows: int = 0,
    test_fraction: float = 0.1,
    held_out: float = 0.1,
    split_seed: int = 0,
) -> Dataset:
    """Reads 26 categorical and 13 numeric columns, 2 classes; the last rows are the test part.

    Categories are hashed (`_tables.make_hash`; keys "C1" to "C26"); a missing one has id 0.
    Integers, which are counts and may be negative, enter as sign(x) log(1 + |x|), standardized by
    the training part's present values; a missing one is 0, the mean. Memory: 160 bytes a row.

    Args:
      path: the file, plain or `.gz`.
      buckets: ids of each categorical column, id 0 among them.
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
        return (
            chunk.convert("label", LABELS.__getitem__, "i4", expected="0 or 1"),
            [chunk.convert(key, to, "i4", expected="text") for key, to in hashes.items()],
            [_tables.signed_log(chunk.numbers(key, optional=True)) for key in NUMERIC],
        )

    return _tables.make_click_log(
        encode,
        path=path,
        name="Criteo layout",
        hint=HINT,
        columns=COLUMNS,
        delimiter="\t",
        header=False,
        cardinalities=[buckets] * len(CATEGORICAL),
        numeric=len(NUMERIC),
        max_rows=max_rows,
        test_fraction=test_fraction,
        held_out=held_out,
        split_seed=split_seed,
    )
