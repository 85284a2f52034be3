"""Documents of tokens, packed into rows of one length; parts are whole documents."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from distill_jax.core import ranges
from distill_jax.core.api import Dataset, Provenance
from distill_jax.core.errors import DataUnavailable
from distill_jax.data import _splits

CHUNK = 2**24
"""Number of ids that are checked at a time."""


class Tokens(NamedTuple):
    """Token ids of documents, one after the other.

    Attributes:
      ids: integers `[m]`, in memory or memory-mapped.
      starts: int64 `[documents]`, position of the first id of each document.
      lengths: int64 `[documents]`, their numbers of ids.
      vocabulary: number of token ids.
      end: id of the token between documents. It is not among the ids of a document.
      sizes: int64 `[documents]`, bytes of text of each document; None where they are unknown.
    """

    ids: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    vocabulary: int
    end: int
    sizes: np.ndarray | None = None


def check_ids(ids: np.ndarray, vocabulary: int, *, where: str) -> None:
    """Raises an error for ids outside the vocabulary, which a network would read as another token.

    Raises:
      DataUnavailable: an id is negative, or not below the vocabulary.
    """
    for at in range(0, len(ids), CHUNK):
        chunk = ids[at : at + CHUNK]
        odd = (chunk < 0) | (chunk >= vocabulary)
        if odd.any():
            i = int(np.argmax(odd))
            raise DataUnavailable(
                f"token {at + i} has the id {int(chunk[i])}, and the vocabulary has {vocabulary} "
                "tokens",
                where=where,
                hint=f"ids from 0 to {vocabulary - 1}",
            )


class TokenRows:
    """Documents of one part, packed: every token is the target of exactly one row.

    The documents follow each other, an end token before each and one after the last. Row i has the
    tokens at `i t` to `i t + t` of that sequence, so that neighbouring rows share one token. A long
    document continues in the next row; short documents share a row. The last row is padded.

    `read` gives `input`, a dictionary of `tokens` and `segments`, int32 `[b, t + 1]`: documents are
    numbered within a row from 0 on, an end token belongs to the document behind it, and padding has
    the number -1. `label` is the document of the first token. Where sizes of documents are known,
    `bytes` float32 `[b]` is the text that the t targets of a row stand for: in a document, bytes
    are divided evenly over its tokens.

    Args:
      tokens: the documents.
      documents: int `[d]`, which of them belong to the part, in order.
      length: t.
      provenance: of the part; `n` is set to the number of rows.
    """

    def __init__(
        self, tokens: Tokens, documents: np.ndarray, *, length: int, provenance: Provenance
    ):
        self.tokens, self.documents, self.length = tokens, documents, length
        lengths = tokens.lengths[documents] + 1
        self._cumulative = np.concatenate([[0], np.cumsum(lengths)])
        n = -(-int(self._cumulative[-1]) // length)
        self.provenance = provenance._replace(n=n)
        first = np.arange(n, dtype=np.int64) * length
        self.labels = documents[self._document(first)].astype(np.int32)
        self._bytes = None
        if tokens.sizes is not None:
            sizes = np.concatenate([[0], np.cumsum(tokens.sizes[documents])])
            edges = np.interp(np.append(first, first[-1:] + length), self._cumulative, sizes)
            self._bytes = np.diff(edges).astype(np.float32)

    def __len__(self) -> int:
        return self.provenance.n

    def _document(self, position: np.ndarray) -> np.ndarray:
        found = np.searchsorted(self._cumulative, position, side="right") - 1
        return np.minimum(found, len(self.documents) - 1)

    def read(self, indices: np.ndarray) -> Mapping[str, Any]:
        """Returns `input`, `label` and `bytes` of the rows at `indices` `[b]`."""
        indices = np.asarray(indices, np.int64)
        position = indices[:, None] * self.length + np.arange(self.length + 1)
        document = self._document(position)
        offset = position - self._cumulative[document]
        total = self._cumulative[-1]
        inner = (offset > 0) & (position < total)
        start = self.tokens.starts[self.documents[document]]
        ids = np.full(position.shape, self.tokens.end, np.int32)
        ids[inner] = self.tokens.ids[(start + offset - 1)[inner]]
        segment = document - document[:, :1] + (position == total)
        segment = np.where(position > total, -1, segment).astype(np.int32)
        rows = {"input": {"tokens": ids, "segments": segment}, "label": self.labels[indices]}
        return rows if self._bytes is None else {**rows, "bytes": self._bytes[indices]}


def draw_parts(
    keys: Sequence[bytes],
    sizes: np.ndarray,
    *,
    test_fraction: float,
    held_out: float,
    seed: int,
    where: str,
) -> np.ndarray:
    """Returns the part of each document, an array of "train", "held_out" and "test".

    Documents are drawn in an order that depends on their keys and `seed` alone. A part takes each
    document that leaves it at most its share of all tokens, and at least one. Documents with equal
    keys stay together.

    Args:
      keys: one for each document.
      sizes: int `[documents]`, their tokens.
      test_fraction: share of all tokens in the test part, in (0, 1).
      held_out: share of the rest that is held out, in [0, 1).
      seed: any whole number.
      where: path of the data.

    Raises:
      ArgumentError: a share out of its range.
      DataUnavailable: fewer documents than parts.
    """
    ranges.within("(0, 1)", test_fraction=test_fraction)
    _splits.check_held_out(held_out)
    groups: dict[bytes, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    needed = 3 if held_out else 2
    if len(groups) < needed:
        what = "one document" if len(keys) == 1 else f"{len(keys)} documents"
        if len(groups) < len(keys):
            what += f", {len(groups)} of them different"
        raise DataUnavailable(
            f"{what}, and parts are whole documents",
            where=where,
            hint=f"at least {needed} documents; a separator splits files into several, and folders "
            "train, val and test are taken as parts",
        )
    parts = np.full(len(keys), "train", "<U8")
    left = sorted(groups)
    total = int(np.sum(sizes))
    for name, share in (("test", test_fraction), ("held_out", held_out)):
        most, taken = share * total, 0
        if not share:
            continue
        order = sorted(left, key=lambda key: _splits.position(key, f"{name} {seed}"))
        weight = {key: int(sizes[groups[key]].sum()) for key in order}
        chosen = []
        for key in order:
            if taken + weight[key] <= most:
                chosen.append(key)
                taken += weight[key]
        chosen = chosen or [min(order, key=weight.__getitem__)]
        for key in chosen:
            parts[groups[key]] = name
        left = [key for key in left if key not in set(chosen)]
        total -= sum(weight[key] for key in chosen)
    return parts


def make_dataset(
    tokens: Tokens, parts: np.ndarray, *, length: int, provenance: Provenance
) -> Dataset:
    """Returns the packed parts of documents.

    Args:
      tokens: the documents, with ids below the vocabulary.
      parts: the part of each, `[documents]`.
      length: t, targets in a row.
      provenance: of all documents together.

    Raises:
      ArgumentError: a length below 1.
      DataUnavailable: a part with less than one row.
    """
    ranges.sizes(length=length)
    made = {}
    for name in ("train", "held_out", "test"):
        documents = np.flatnonzero(parts == name)
        count = int((tokens.lengths[documents] + 1).sum())
        if count < length and (len(documents) or name != "held_out"):
            raise DataUnavailable(
                f"the {name} part has {count} tokens, and a row has {length}",
                where=provenance.origin,
                hint="a smaller length, or more text",
            )
        sha = hashlib.sha256(f"{provenance.sha256} {tokens.vocabulary} {length} ".encode())
        sha.update(documents.astype("<i8").tobytes())
        title = f"{provenance.name} ({name}: {len(documents)} documents, {count} tokens)"
        of_part = provenance._replace(name=title, sha256=sha.hexdigest())
        made[name] = TokenRows(tokens, documents, length=length, provenance=of_part)
    return Dataset(**made, vocabulary=tokens.vocabulary)


def joined(
    documents: Sequence[np.ndarray], dtype: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns ids `[m]`, starts and lengths of documents, `[tokens]` each."""
    lengths = np.array([len(ids) for ids in documents], np.int64)
    ids = np.concatenate([np.zeros(0, dtype), *documents]).astype(dtype)
    return ids, np.cumsum(lengths) - lengths, lengths
