"""Your own labelled text for classifiers: a table of texts and labels, or a folder for each class.

    texts.jsonl                   columns text and label; also CSV and Parquet (`table_file`)
    texts/spam/1.txt              a file of plain text, or with `separator` a piece of it, is a text
    texts/train/spam/1.txt        with texts/test/..., and texts/val/... if there is one

Where neither folders nor a column name the parts, a hash of each text does, or of an `id_column`,
so that equal ones fall in the same part. An example is `tokens` and `mask`, int32 `[length]` each,
the mask 0 on padding behind a short text; long texts are cut.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distill_jax.core import ranges
from distill_jax.core.api import Dataset, Provenance
from distill_jax.core.errors import ArgumentError, DataUnavailable
from distill_jax.data import _columns, _documents, _splits, source, table_file

HINT = "a table with columns text and label, or a folder with a folder of texts for each class"


def make(
    *,
    path: str,
    text: str = "text",
    label: str = "label",
    split_column: str = "",
    id_column: str = "",
    length: int = 64,
    suffixes: str | Sequence[str] = (),
    separator: str = "",
    tokenizer_path: str = "",
    classes: str | Sequence[str] = (),
    test_fraction: float = 0.2,
    held_out: float = 0.1,
    split_seed: int = 0,
    name: str = "",
    licence: str = "",
) -> Dataset:
    r"""Reads labelled text; see the module for its layout.

    Args:
      path: the table or the folder.
      text: column of the texts.
      label: column of the labels.
      split_column: column with the values train, val or test.
      id_column: column whose hash draws the parts, so that texts of one value, such as a chapter or
        a customer, stay together.
      length: t, tokens of an example.
      suffixes: endings of files of plain text in a folder; by default .txt, .text and .md.
      separator: text between two texts in a file, such as "\n\n".
      tokenizer_path: a `tokenizer.json` of the package `tokenizers`, or a folder with one; the
        tokens that it adds to a text are kept. By default tokens are bytes, with 256 as padding.
      classes: class names in label order; by default those of the training part, sorted.
      test_fraction: share of the texts that is the test part, where parts are drawn.
      held_out: share of the training part held out, where there is no part val.
      split_seed: seed of the split.
      name: name in the provenance; the name of the file or folder by default.
      licence: licence of the text, for the provenance.

    Raises:
      DataUnavailable: no text, text that is not UTF-8, rows without text or label, one class alone,
        or a tokenizer that is missing or damaged.
      ArgumentError: a column that does not exist, or a share or length out of its range.
    """
    ranges.sizes(length=length)
    root = source.existing(path, hint=HINT)
    drawn = {"test_fraction": test_fraction, "held_out": held_out, "seed": split_seed}
    if not root.is_dir():
        table = _columns.read(root, missing=("",))
        texts, labels = _rows(table, text=text, label=label)
        columns = {"split_column": split_column, "id_column": id_column}
        parts = table_file.split(table, np.full(len(texts), ""), keys=texts, **columns, **drawn)
    elif split_column or id_column:
        where = "split_column" if split_column else "id_column"
        hint = "leave it out: folders train, val and test name the parts"
        raise ArgumentError(f"{path} is a folder, without columns", where=where, hint=hint)
    else:
        suffixes = _splits.names_of(suffixes)
        texts, labels, parts = _folder(root, suffixes=suffixes, separator=separator)
        if parts[0]:
            parts = _splits.settle(parts, where=str(path))
        else:
            parts = _splits.by_hash(texts, **drawn)
    _splits.check_filled(parts, where=str(path), what="texts")
    ids, order = _splits.number(labels, parts, classes=classes, where=str(path), what="texts")
    tokens, mask, vocabulary = _tokens(texts, length=length, tokenizer_path=tokenizer_path)
    made = []
    for part, rows in (("train", parts != "test"), ("test", parts == "test")):
        inputs = {"tokens": tokens[rows], "mask": mask[rows]}
        sha = source.checksum({**inputs, "label": ids[rows]})
        title = f"{name or root.resolve().name} ({part})"
        provenance = Provenance(title, str(path), int(rows.sum()), sha, licence)
        made.append(source.ArraySource(inputs, ids[rows], provenance))
    held = _splits.held(parts[parts != "test"])
    dataset = source.make_dataset(
        *made, held_out=held_out, split_seed=split_seed, classes=order, held=held
    )
    return dataset._replace(vocabulary=vocabulary)


def _rows(table: _columns.Table, *, text: str, label: str) -> tuple[list[bytes], list[str]]:
    table_file.require(table, text, "text")
    table_file.require(table, label, "label")
    found = []
    for i, (one, own) in enumerate(zip(table.text(text), table.text(label), strict=True)):
        if one is None or own is None:
            what = f"{table.at(i)} has no {text if one is None else label}"
            raise DataUnavailable(what, where=str(table.path), hint="leave such rows out")
        found.append((one.encode("utf-8", "surrogatepass"), own))
    return [one for one, _ in found], [own for _, own in found]


def _folder(
    root: Path, *, suffixes: Sequence[str], separator: str
) -> tuple[list[bytes], list[str], np.ndarray]:
    documents = _documents.read(root, suffixes=suffixes, separator=separator)
    labels = []
    for document in documents:
        folders = document.name.split("/")[1 if document.part else 0 : -1]
        if not folders:
            raise DataUnavailable(
                f"{document.name} is in no folder of a class", where=str(root), hint=HINT
            )
        labels.append(folders[0])
    texts = [document.text for document in documents]
    return texts, labels, np.array([document.part for document in documents])


def _tokens(
    texts: Sequence[bytes], *, length: int, tokenizer_path: str
) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns tokens and mask, int32 `[n, length]`, and the vocabulary."""
    if tokenizer_path:
        tokenizer = _documents.read_tokenizer(tokenizer_path)
        tokenizer.enable_truncation(length)
        strings = [text.decode("utf-8", "surrogatepass") for text in texts]
        rows = [one.ids for one in tokenizer.encode_batch(strings)]
        known = tokenizer.get_vocab(with_added_tokens=True)
        vocabulary, padding = max(known.values(), default=-1) + 1, known.get("[PAD]", 0)
    else:
        rows = [np.frombuffer(text[:length], np.uint8) for text in texts]
        vocabulary, padding = _documents.BYTES, _documents.BYTES - 1
    tokens = np.full((len(texts), length), padding, np.int32)
    mask = np.zeros((len(texts), length), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, 1
    return tokens, mask, vocabulary


def spec(
    *,
    length: int = 64,
    tokenizer_path: str = "",
    classes: str | Sequence[str] = (),
    **unused: object,
) -> Dataset:
    """Returns shapes in place of texts, for `make` with the same arguments, `classes` included."""
    del unused
    order = _splits.names_of(classes)
    vocabulary = 0 if tokenizer_path else _documents.BYTES
    shapes = _Shapes(length)
    return Dataset(shapes, shapes, shapes, order, vocabulary=vocabulary)


class _Shapes:
    shapes_only = True
    provenance = Provenance("texts", "", 1024, "")

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.provenance.n

    def read(self, indices: np.ndarray) -> dict[str, object]:
        zeros = np.zeros((len(indices), self.length), np.int32)
        return {"input": {"tokens": zeros, "mask": zeros}, "label": zeros[:, 0]}
