"""Documents of text: read from files, and turned into tokens."""

import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill_jax.core import ranges
from distill_jax.core.api import Dataset, Provenance
from distill_jax.core.errors import ArgumentError, DataUnavailable, nearest, text_of
from distill_jax.data import _columns, _splits, _tokens, source

PLAIN = (".txt", ".text", ".md")
TABLES = (*_columns.JSON_LINES, *_columns.PARQUET)
ENDS = ("<|endoftext|>", "</s>", "<|im_end|>", "[SEP]", "<eos>")
"""Tokens that usually end a document."""

BYTES = 257
"""Vocabulary of bytes: the 256 values, and the end of a document."""


class Document(NamedTuple):
    """One document.

    Attributes:
      name: file, and row or number within it.
      part: "train", "held_out", "test", or "" where the files do not say.
      text: UTF-8.
    """

    name: str
    part: str
    text: bytes


def read(
    root: Path, *, suffixes: Sequence[str] = (), field: str = "text", separator: str = ""
) -> list[Document]:
    """Reads the documents of a file or folder, in the order of their names.

    Args:
      root: a file, or a folder with files at any depth. Folders or files called train, val and
        test at its top are parts.
      suffixes: endings of files of plain text; by default `PLAIN`. JSON lines and Parquet are read
        always.
      field: column of the text in JSON lines and Parquet.
      separator: text between two documents in a file of plain text; "" where a file is one.

    Raises:
      DataUnavailable: no file of a known kind, text that is not UTF-8, or no text at all.
      ArgumentError: a column that does not exist.
    """
    plain = tuple(suffix.lower() for suffix in suffixes) or PLAIN
    files = _files(root, (*plain, *TABLES))
    documents = []
    for file in files:
        name = file.relative_to(root).as_posix() if root.is_dir() else file.name
        part = _splits.SPLITS.get(Path(name.split("/")[0]).stem.lower(), "")
        if file.suffix.lower() in plain:
            documents += _plain(file, name, part, separator)
        else:
            documents += _rows(file, name, part, field)
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        count = "1 file" if len(files) == 1 else f"{len(files)} files"
        raise DataUnavailable(f"{count} and no text", where=str(root), hint="files with text")
    if len({bool(document.part) for document in documents}) > 1:
        odd = next(document for document in documents if not document.part)
        raise DataUnavailable(
            f"{odd.name} is in no part, and others are",
            where=str(root),
            hint="all documents below train, val and test, or none",
        )
    return documents


def _files(root: Path, suffixes: Sequence[str]) -> list[Path]:
    if root.is_file():
        if root.suffix.lower() not in suffixes:
            hint = f"{nearest(root.suffix, suffixes)}; suffixes names other endings of plain text"
            raise DataUnavailable("has an ending that is not read", where=str(root), hint=hint)
        return [root]
    found = []
    for folder, folders, names in os.walk(root):  # does not follow links
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            known = path.suffix.lower() in suffixes and not name.startswith(".")
            if known and path.is_file() and not path.is_symlink():
                found.append(path)
    if not found:
        raise DataUnavailable(
            "no files of text",
            where=str(root),
            hint=f"endings that are read: {', '.join(suffixes)}",
        )
    return found


def _plain(file: Path, name: str, part: str, separator: str) -> list[Document]:
    with source.reading(file):
        content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataUnavailable(
            f"byte {error.start} is not UTF-8", where=str(file), hint="convert it, as with iconv"
        ) from None
    if "\0" in text:
        at = content.index(0)
        raise DataUnavailable(f"byte {at} is 0: this is no text", where=str(file))
    if not separator:
        return [Document(name, part, content)]
    pieces = [piece for piece in text.split(separator) if piece.strip()]
    return [Document(f"{name} {i}", part, piece.encode()) for i, piece in enumerate(pieces)]


def _rows(file: Path, name: str, part: str, field: str) -> list[Document]:
    table = _columns.read(file, missing=("",))
    if field not in table.names:
        what = f"{file} has no column {field!r}"
        raise ArgumentError(what, where="field", hint=nearest(field, table.names))
    texts = table.text(field)
    return [
        Document(f"{name} {table.at(i)}", part, text.encode("utf-8", "surrogatepass"))
        for i, text in enumerate(texts)
        if text is not None
    ]


def tokens_of(
    documents: Sequence[Document], *, tokenizer_path: str = "", end: str = "", where: str = ""
) -> _tokens.Tokens:
    """Returns documents as tokens.

    Args:
      documents: the documents.
      tokenizer_path: a `tokenizer.json`, or a folder with one; "" for bytes.
      end: the token between documents; by default one of `ENDS`. Not for bytes.
      where: path of the data.

    Raises:
      ArgumentError: an end that is no token.
      DataUnavailable: the tokenizer is missing or damaged, or its package is not installed.
    """
    sizes = np.array([len(document.text) for document in documents], np.int64)
    if not tokenizer_path:
        if end:
            raise ArgumentError(f"end is {end!r}, and tokens are bytes", where="end")
        ids = [np.frombuffer(document.text, np.uint8) for document in documents]
        return _tokens.Tokens(*_tokens.joined(ids, np.uint8), BYTES, BYTES - 1, sizes)
    tokenizer = read_tokenizer(tokenizer_path)
    known = tokenizer.get_vocab(with_added_tokens=True)
    vocabulary = max(known.values(), default=-1) + 1
    chosen = end or next((name for name in ENDS if name in known), "")
    if chosen not in known:
        what = f"the tokenizer has no token {end!r}" if end else "no token ends a document"
        raise ArgumentError(what, where="end", hint=nearest(end or ENDS[0], known))
    texts = [document.text.decode("utf-8", "surrogatepass") for document in documents]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    dtype = np.uint16 if vocabulary <= 2**16 else np.uint32
    ids = [np.array(one.ids, dtype) for one in encoded]
    return _tokens.Tokens(*_tokens.joined(ids, dtype), vocabulary, known[chosen], sizes)


def read_tokenizer(path: str) -> Any:
    """Returns a tokenizer of the package `tokenizers`, without truncation and padding.

    Raises:
      DataUnavailable: the file is missing or damaged, or the package is not installed.
    """
    try:
        import tokenizers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataUnavailable(
            "a tokenizer is read by the package tokenizers, which is not installed",
            where="tokenizer_path",
            hint="pip install 'distill_jax[text]'; without tokenizer_path, tokens are bytes",
        ) from error
    file = source.existing(path, hint="a tokenizer.json, or a folder with one")
    file = source.existing(file / "tokenizer.json", hint="") if file.is_dir() else file
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # of its own, without a common class
        what = f"is no tokenizer: {text_of(error, most=100)}"
        raise DataUnavailable(what, where=str(file), hint="the file tokenizer.json") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def make_dataset(
    documents: Sequence[Document],
    *,
    name: str,
    origin: str,
    licence: str,
    length: int,
    test_fraction: float,
    held_out: float,
    split_seed: int,
    tokenizer_path: str = "",
    end: str = "",
    reserved: int = 0,
) -> Dataset:
    """Returns packed documents; parts are those of the files, else drawn, see `_tokens.draw_parts`.

    Args:
      documents: the documents.
      name: of the data.
      origin: path or package.
      licence: of the text.
      length: t, targets in a row.
      test_fraction: share of the tokens in the test part, where parts are drawn.
      held_out: share of the rest that is held out, where it is drawn.
      split_seed: seed of the draw.
      tokenizer_path: see `tokens_of`, as the next one.
      end: token between documents.
      reserved: number of further token ids, behind the others, that no text has.

    Raises:
      ArgumentError, DataUnavailable: see `tokens_of`, `draw_parts` and `_tokens.make_dataset`; a
        negative `reserved`.
    """
    ranges.counts(reserved=reserved)
    tokens = tokens_of(documents, tokenizer_path=tokenizer_path, end=end, where=origin)
    tokens = tokens._replace(vocabulary=tokens.vocabulary + reserved)
    digests = [hashlib.sha256(document.text).digest() for document in documents]
    sha256 = hashlib.sha256(b"".join(digests)).hexdigest()
    if documents[0].part:
        parts = _splits.settle(np.array([d.part for d in documents]), where=origin)
    else:
        parts = _tokens.draw_parts(
            digests,
            tokens.lengths + 1,
            test_fraction=test_fraction,
            held_out=held_out,
            seed=split_seed,
            where=origin,
        )
    provenance = Provenance(name, origin, len(documents), sha256, licence)
    dataset = _tokens.make_dataset(tokens, parts, length=length, provenance=provenance)
    return dataset._replace(decode=decoder(tokenizer_path, end=tokens.end))


def decoder(tokenizer_path: str, *, end: int) -> Callable[[Sequence[int]], str]:
    """Returns `Dataset.decode`; the tokenizer, if there is one, is read when it is called."""

    def decode(ids: Sequence[int]) -> str:
        inner = list(itertools.dropwhile(lambda token: token == end, ids))
        document = list(itertools.takewhile(lambda token: token != end, inner))
        if not tokenizer_path:
            return bytes(document).decode("utf-8", "replace")
        return read_tokenizer(tokenizer_path).decode(document, skip_special_tokens=False)

    return decode
