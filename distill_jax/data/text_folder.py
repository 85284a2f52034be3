"""Your own text for language models: plain files, JSON lines or Parquet, as packed rows of tokens.

A document is a file of plain text, a row of a JSON lines or Parquet file, or, with `separator`, a
piece of a file of plain text. Parts are whole documents: those below folders (or of files) called
train, val and test, else drawn from their content, so that equal documents fall in the same part.
Without a part val nothing is held out. Rows are packed, see `_tokens.TokenRows`; the transform
`next_token` makes inputs and targets of them.
"""

from collections.abc import Sequence

import numpy as np

from distill_jax.core.api import Dataset, Provenance
from distill_jax.data import _documents, _splits, source

HINT = "a file or folder of text (.txt, .md), JSON lines (.jsonl) or Parquet"


def make(
    *,
    path: str,
    length: int = 128,
    suffixes: str | Sequence[str] = (),
    field: str = "text",
    separator: str = "",
    tokenizer_path: str = "",
    end: str = "",
    test_fraction: float = 0.1,
    held_out: float = 0.1,
    split_seed: int = 0,
    reserved: int = 0,
    name: str = "",
    licence: str = "",
) -> Dataset:
    r"""Reads text; see the module for what a document is.

    Args:
      path: a file, or a folder with files at any depth; links are not followed.
      length: t, targets in a row.
      suffixes: endings of files of plain text, such as ".py"; by default .txt, .text and .md.
      field: column of the text in JSON lines and Parquet.
      separator: text between two documents in a file of plain text, such as "\n\n".
      tokenizer_path: a `tokenizer.json` of the package `tokenizers`, or a folder with one; by
        default tokens are bytes, and 256 is the end of a document.
      end: token of that tokenizer between documents; by default a usual one, such as
        `<|endoftext|>`.
      test_fraction: share of the tokens that is the test part, where parts are drawn.
      held_out: share of the rest that is held out, where parts are drawn.
      split_seed: seed of the draw.
      reserved: number of further token ids, behind the others, that no text has, for `denoise`.
      name: name in the provenance; the name of the file or folder by default.
      licence: licence of the text, for the provenance.

    Raises:
      DataUnavailable: no text, text that is not UTF-8, too few documents, or a part with less than
        one row; or a tokenizer that is missing or damaged.
      ArgumentError: a column or token that does not exist, or a share or length out of its range.
    """
    root = source.existing(path, hint=HINT)
    documents = _documents.read(
        root, suffixes=_splits.names_of(suffixes), field=field, separator=separator
    )
    return _documents.make_dataset(
        documents,
        name=name or root.resolve().name,
        origin=str(path),
        licence=licence,
        length=length,
        test_fraction=test_fraction,
        held_out=held_out,
        split_seed=split_seed,
        reserved=reserved,
        tokenizer_path=tokenizer_path,
        end=end,
    )


def spec(*, length: int = 128, tokenizer_path: str = "", **unused: object) -> Dataset:
    """Returns shapes in place of rows, for `make` with the same arguments."""
    del unused
    shapes = _Shapes(length)
    vocabulary = 0 if tokenizer_path else _documents.BYTES
    return Dataset(shapes, shapes, shapes, vocabulary=vocabulary)


class _Shapes:
    shapes_only = True
    provenance = Provenance("text", "", 1024, "")

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.provenance.n

    def read(self, indices: np.ndarray) -> dict[str, object]:
        zeros = np.zeros((len(indices), self.length + 1), np.int32)
        rows = {"tokens": zeros, "segments": zeros}
        return {"input": rows, "label": zeros[:, 0], "bytes": zeros[:, 0].astype(np.float32)}
