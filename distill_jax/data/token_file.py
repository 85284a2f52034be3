"""Your own token ids in a `.npy` file, mapped rather than loaded, as packed rows.

The file holds one array of integers `[m]`: documents one after the other, with the token `end`
between them. Parts are whole documents. Rows are packed, see `_tokens.TokenRows`; the transform
`next_token` makes inputs and targets of them. NumPy writes such a file:

    np.save("tokens.npy", ids.astype(np.uint16))
"""

import hashlib
from pathlib import Path

import numpy as np

from distill_jax.core import ranges
from distill_jax.core.api import Dataset, Provenance
from distill_jax.core.errors import DataUnavailable
from distill_jax.data import _tokens, source

HINT = "a .npy file with token ids, integers [m]"


def read_ids(path: Path) -> np.ndarray:
    """Returns the ids of a file, memory-mapped.

    Raises:
      DataUnavailable: the file cannot be read, or holds another array.
    """
    with source.reading(path, hint=HINT):
        ids = np.load(path, mmap_mode="r")
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else "an archive"
        raise DataUnavailable(f"holds {found}", where=str(path), hint=HINT)
    if not len(ids):
        raise DataUnavailable("holds no token", where=str(path), hint=HINT)
    return ids


def split_at(ids: np.ndarray, *, vocabulary: int, end: int) -> _tokens.Tokens:
    """Returns the documents between end tokens; empty ones are left out."""
    chunks = range(0, len(ids), _tokens.CHUNK)
    ends = [np.flatnonzero(ids[at : at + _tokens.CHUNK] == end) + at for at in chunks]
    edges = np.concatenate([[-1], *ends, [len(ids)]]).astype(np.int64)
    starts, lengths = edges[:-1] + 1, np.diff(edges) - 1
    some = lengths > 0
    return _tokens.Tokens(ids, starts[some], lengths[some], vocabulary, end)


def make(
    *,
    path: str,
    vocabulary: int,
    end: int,
    length: int = 128,
    test_fraction: float = 0.1,
    held_out: float = 0.1,
    split_seed: int = 0,
    name: str = "",
    licence: str = "",
) -> Dataset:
    """Maps a file of token ids, see the module. All ids are read once, to check them.

    Args:
      path: the file.
      vocabulary: v, number of token ids of the tokenizer.
      end: id of the token between documents.
      length: t, targets in a row.
      test_fraction: share of the tokens that is the test part.
      held_out: share of the rest that is held out.
      split_seed: seed of the draw of parts.
      name: name in the provenance; the name of the file by default.
      licence: licence of the text, for the provenance.

    Raises:
      DataUnavailable: no such file, another array, an id outside the vocabulary, too few documents,
        or a part with less than one row.
      ArgumentError: a number out of its range.
    """
    ranges.sizes(vocabulary=vocabulary)
    ranges.within(f"[0, {vocabulary})", whole=True, end=end)
    file = source.existing(path, hint=HINT)
    ids = read_ids(file)
    _tokens.check_ids(ids, vocabulary, where=str(path))
    tokens = split_at(ids, vocabulary=vocabulary, end=end)
    spans = zip(tokens.starts, tokens.lengths, strict=True)
    digests = [hashlib.sha256(ids[at : at + count].tobytes()).digest() for at, count in spans]
    parts = _tokens.draw_parts(
        digests,
        tokens.lengths + 1,
        test_fraction=test_fraction,
        held_out=held_out,
        seed=split_seed,
        where=str(path),
    )
    sha256 = hashlib.sha256(b"".join(digests)).hexdigest()
    provenance = Provenance(name or file.stem, str(path), len(digests), sha256, licence)
    return _tokens.make_dataset(tokens, parts, length=length, provenance=provenance)
