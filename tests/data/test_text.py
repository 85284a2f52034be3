"""Text as packed rows of tokens: rows, whole documents in parts, files that are refused."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.api import Provenance
from distill_jax.core.errors import UserError
from distill_jax.data import (
    _documents,
    _tokens,
    checks,
    stdlib_bytes,
    text_classes,
    text_folder,
    token_file,
)
from distill_jax.data.transforms import tokens as token_transforms
from tests.data import files

TEXTS = [f"Document {i}: {'αβγ ' * (i % 5)}".encode() for i in range(30)]


def folder(path, texts=None, suffix=".txt"):
    path.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(TEXTS if texts is None else texts):
        (path / f"{i:03}{suffix}").write_bytes(text)
    return str(path)


def targets(part, length):
    """Returns the targets of all rows in order, without padding."""
    rows = part.read(np.arange(len(part)))["input"]
    assert rows["tokens"].shape == rows["segments"].shape == (len(part), length + 1)
    assert (rows["tokens"][1:, 0] == rows["tokens"][:-1, -1]).all()
    return rows["tokens"][:, 1:][rows["segments"][:, 1:] >= 0]


@pytest.mark.parametrize("length", [7, 64])
def test_every_token_is_one_target(tmp_path, length):
    made = text_folder.make(path=folder(tmp_path), length=length)
    dataset, _ = checks.open_dataset(made)
    found = []
    for _, part in parts(dataset):
        stream = targets(part, length)
        *documents, rest = (bytes(x[x < 256].tolist()) for x in cut(stream))
        assert rest == b"" and stream[-1] == 256
        found += documents
        counted = part.read(np.arange(len(part)))["bytes"].sum()
        assert counted == pytest.approx(sum(map(len, documents)))
        first = part.read(np.zeros(1, np.int64))
        assert first["input"]["tokens"][0, 0] == 256 and first["label"] == part.documents[0]
    assert sorted(found) == sorted(TEXTS) and dataset.vocabulary == 257
    shares = {name: part.tokens.lengths[part.documents].sum() for name, part in parts(dataset)}
    assert shares["test"] <= 0.1 * sum(shares.values()) < shares["train"] / 5


def cut(stream):
    return np.split(stream, np.flatnonzero(stream == 256) + 1)


def parts(dataset) -> list[tuple[str, Any]]:
    return [*dataset.parts.items()]


def test_documents_in_a_row_are_numbered_and_padding_is_negative():
    lengths = np.array([2, 3, 1])
    tokens = _tokens.Tokens(
        np.arange(6, dtype=np.uint8), np.cumsum(lengths) - lengths, lengths, 10, 9
    )
    provenance = Provenance("x", "x", 0, "")
    rows = _tokens.TokenRows(tokens, np.array([0, 2, 1]), length=6, provenance=provenance)
    got = rows.read(np.array([1, 0]))
    assert got["input"]["tokens"].tolist() == [[2, 3, 4, 9, 9, 9, 9], [9, 0, 1, 9, 5, 9, 2]]
    assert got["input"]["segments"].tolist() == [[0, 0, 0, 1, -1, -1, -1], [0, 0, 0, 1, 1, 2, 2]]
    assert got["label"].tolist() == [1, 0] and "bytes" not in got and len(rows) == 2
    made = token_transforms.make_next_token()(jax.random.key(0), got, jnp.int32(0))
    assert made["target"].tolist() == got["input"]["tokens"][:, 1:].tolist()
    assert made["target_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert made["input"]["tokens"].tolist() == got["input"]["tokens"][:, :-1].tolist()


def test_equal_documents_stay_together():
    keys = [bytes([i % 10]) for i in range(40)]
    drawn = draw(keys)
    assert {len({drawn[j] for j in range(i, 40, 10)}) for i in range(10)} == {1}
    assert [(drawn == name).sum() for name in ("train", "held_out", "test")] == [28, 4, 8]
    later = draw([bytes([i]) for i in range(3)])
    assert sorted(later) == ["held_out", "test", "train"]


def draw(keys):
    sizes = np.full(len(keys), 5)
    return _tokens.draw_parts(keys, sizes, test_fraction=0.2, held_out=0.15, seed=3, where="x")


def test_formats_give_the_same_documents(tmp_path):
    import pyarrow.parquet

    texts = [text.decode().strip() for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": t, "n": 1}) for t in texts))
    table = files.arrow_table({"body": texts})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("\n\n".join(texts))
    made = [
        [d.text.decode() for d in _documents.read(tmp_path / name, field="body", separator="\n\n")]
        for name in ("a.jsonl", "b.parquet", "c.txt")
    ]
    assert made == [texts] * 3


def test_folders_give_parts(tmp_path):
    for name in ("train", "val", "test"):
        folder(tmp_path / name, [f"{name} {i}".encode() * 5 for i in range(4)])
    made = text_folder.make(path=str(tmp_path), length=8)
    for name, text in (("train", b"train"), ("held_out", b"val"), ("test", b"test")):
        stream = targets(getattr(made, name), 8)
        assert bytes(stream[stream < 256].tolist()).count(text) == 20


def test_a_token_file_is_mapped(tmp_path):
    ids = np.concatenate([np.append(np.frombuffer(text, np.uint8), 256) for text in TEXTS])
    np.save(tmp_path / "ids.npy", ids.astype(np.uint16))
    mapped = token_file.make(path=str(tmp_path / "ids.npy"), vocabulary=257, end=256, length=16)
    assert all(isinstance(part.tokens.ids, np.memmap) for _, part in parts(mapped))
    read = [targets(part, 16) for _, part in parts(mapped)]
    documents = [bytes(x[:-1].tolist()) for stream in read for x in cut(stream)[:-1]]
    assert sorted(documents) == sorted(TEXTS)


@pytest.mark.slow
def test_the_standard_library_is_the_same_every_time():
    one, two = stdlib_bytes.make(length=512), stdlib_bytes.make(length=512)
    assert one.train.provenance == two.train.provenance
    assert len(one.train) > 5 * len(one.test) > len(one.held_out) > 100


def save(path, array):
    np.save(path / "x.npy", array)
    return {"path": str(path / "x.npy"), "vocabulary": 300, "end": 256, "length": 4}


def write(path, content, name="x.txt", **kwargs):
    (path / name).write_bytes(content)
    return {"path": str(path / name), "length": 4, **kwargs}


LINES = b"one\n\ntwo three\n\nfour five six\n\nseven"
REFUSED = {
    "an empty file": (lambda p: write(p, b""), "1 file and no text"),
    "an empty folder": (lambda p: {"path": str(p)}, "no files of text"),
    "nothing there": (lambda p: {"path": str(p / "no")}, "no such file or folder"),
    "white space": (lambda p: write(p, b" \n\t\n", separator="\n"), "no text"),
    "not UTF-8": (lambda p: write(p, b"caf\xe9 au lait"), "byte 3 is not UTF-8"),
    "a binary file": (lambda p: write(p, b"PK\x00\x01"), "byte 2 is 0"),
    "another ending": (lambda p: write(p, b"x", "x.docx"), "has an ending that is not read"),
    "one document": (lambda p: write(p, LINES), "one document, and parts are whole documents"),
    "equal documents": (lambda p: write(p, b"a b\n" * 9, separator="\n"), "9 documents, 1 of them"),
    "a long row": (lambda p: write(p, LINES, separator="\n\n") | {"length": 99}, "a row has 99"),
    "no length": (lambda p: write(p, LINES, separator="\n\n") | {"length": 0}, "length is 0"),
    "all of it": (lambda p: write(p, LINES, separator="\n\n", test_fraction=1.0), "test_fraction"),
    "another column": (lambda p: write(p, b'{"body": "x"}', "x.jsonl"), "no column 'text'"),
    "no JSON": (lambda p: write(p, b"{'text': 1}", "x.jsonl"), "line 1"),
    "no Parquet": (lambda p: write(p, b"PAR1", "x.parquet"), "cannot be read"),
    "an end of bytes": (lambda p: write(p, LINES, separator="\n\n", end="x"), "tokens are bytes"),
    "an id too large": (lambda p: save(p, np.array([1, 256, 300, 2])), "token 2 has the id 300"),
    "a negative id": (lambda p: save(p, np.array([1, 256, -1, 2])), "token 2 has the id -1"),
    "floats": (lambda p: save(p, np.ones(9)), "holds float64 [9]"),
    "a matrix": (lambda p: save(p, np.ones((3, 3), int)), "holds int64 [3, 3]"),
    "no token": (lambda p: save(p, np.zeros(0, int)), "holds no token"),
    "objects": (lambda p: save(p, np.array([None])), "cannot be read"),
    "no end": (lambda p: save(p, np.arange(9)), "one document"),
    "an end outside": (lambda p: save(p, np.arange(9)) | {"end": 300}, "end is 300"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    arrange, message = REFUSED[name]
    kwargs = arrange(tmp_path)
    make = token_file.make if "vocabulary" in kwargs else text_folder.make
    with pytest.raises(UserError) as error:
        checks.open_dataset(make(**kwargs))
    assert message in str(error.value) and "\n" not in error.value.what


def test_a_document_outside_of_the_parts(tmp_path):
    folder(tmp_path / "train")
    (tmp_path / "more.txt").write_text("x")
    with pytest.raises(UserError, match=r"more\.txt is in no part"):
        text_folder.make(path=str(tmp_path))


MESSAGES = [(f"offer {i}", "spam") for i in range(15)] + [(f"hello {i}", "ham") for i in range(15)]


def labelled(path):
    """Writes the messages as JSON lines and as folders; returns both paths."""
    rows = [json.dumps({"text": text, "label": label}) for text, label in MESSAGES]
    (path / "messages.jsonl").write_text("\n".join(rows))
    for i, (text, label) in enumerate(MESSAGES):
        folder(path / "messages" / label / str(i), [text.encode()])
    return path / "messages.jsonl", path / "messages"


def test_labelled_text(tmp_path):
    found = {}
    for path in labelled(tmp_path):
        dataset, _ = checks.open_dataset(text_classes.make(path=str(path), length=8))
        assert dataset.classes == ("ham", "spam") and dataset.vocabulary == 257
        for name, part in parts(dataset):
            rows = part.read(np.arange(len(part)))
            tokens, mask = rows["input"]["tokens"], rows["input"]["mask"]
            assert ((tokens == 256) == (mask == 0)).all()
            texts = [bytes(t[m > 0].tolist()).decode() for t, m in zip(tokens, mask, strict=True)]
            own = [
                (t, dataset.classes[label]) for t, label in zip(texts, rows["label"], strict=True)
            ]
            found.setdefault(name, []).append(sorted(own))
    assert len({str(part) for part in found["test"]}) == 1  # by content, in either layout
    whole = [(text[:8], label) for text, label in MESSAGES]
    assert sorted(one for part in found.values() for one in part[0]) == sorted(whole)


def test_columns_give_the_parts_of_labelled_text(tmp_path):
    rows = [
        {"text": text, "label": label, "chapter": i % 10, "side": ("train", "val", "test")[i % 3]}
        for i, (text, label) in enumerate(MESSAGES)
    ]
    path = tmp_path / "messages.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))

    def found(**columns):
        made, _ = checks.open_dataset(text_classes.make(path=str(path), length=16, **columns))
        return {
            name: {bytes(t[t < 256].tolist()).decode() for t in x["input"]["tokens"]}
            for name, part in parts(made)
            if (x := part.read(np.arange(len(part)))) is not None
        }

    for name, texts in found(split_column="side").items():
        side = "val" if name == "held_out" else name
        assert texts == {row["text"] for row in rows if row["side"] == side}
    sides = found(id_column="chapter", split_seed=1).values()
    chapters = [{row["chapter"] for row in rows if row["text"] in texts} for texts in sides]
    assert sum(map(len, chapters)) == len(set.union(*chapters)) == 10
    with pytest.raises(UserError, match="no column 'chapers'"):
        found(id_column="chapers")
    with pytest.raises(UserError, match="is a folder, without columns"):
        text_classes.make(path=str(labelled(tmp_path)[1]), split_column="side")


UNLABELLED = {
    "no label": (b'{"text": "x"}\n{"text": "y"}', "no column 'label'"),
    "a row without": (b'{"text": "x", "label": "a"}\n{"text": "y", "label": null}', "has no label"),
    "one class": (b'{"text": "%d", "label": "a"}\n', "all 40 texts are of the class 'a'"),
}


@pytest.mark.parametrize("name", UNLABELLED)
def test_labelled_text_is_refused(tmp_path, name):
    content, message = UNLABELLED[name]
    if b"%d" in content:
        content = b"".join(content % i for i in range(40))
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError) as error:
        text_classes.make(path=str(tmp_path / "x.jsonl"))
    assert message in str(error.value)


def test_a_text_outside_of_classes_is_refused(tmp_path):
    folder(tmp_path)
    with pytest.raises(UserError, match="in no folder of a class"):
        text_classes.make(path=str(tmp_path))


def test_a_tokenizer_of_the_package(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator([text.decode() for text in TEXTS], trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    path = folder(tmp_path / "text")
    dataset = text_folder.make(path=path, length=8, tokenizer_path=str(tmp_path))
    assert dataset.vocabulary == made.get_vocab_size()
    assert [part.tokens.end for _, part in parts(dataset)] == [0, 0, 0]
    made.decoder = tokenizers.decoders.ByteLevel()
    streams = [targets(part, 8) for _, part in parts(dataset)]
    texts = [made.decode(x.tolist()) for s in streams for x in np.split(s, np.flatnonzero(s == 0))]
    assert sorted(filter(None, texts)) == sorted(text.decode() for text in TEXTS)
    counted = sum(part.read(np.arange(len(part)))["bytes"].sum() for _, part in parts(dataset))
    assert counted == pytest.approx(sum(map(len, TEXTS)))
    short = text_classes.make(
        path=str(labelled(tmp_path)[0]), length=4, tokenizer_path=str(tmp_path)
    )
    assert short.vocabulary == dataset.vocabulary
    assert short.train.read(np.arange(2))["input"]["mask"].tolist() == [[1] * 4] * 2
    with pytest.raises(UserError, match="no token 'STOP'"):
        text_folder.make(path=path, tokenizer_path=str(tmp_path), end="STOP")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is no tokenizer"):
        text_folder.make(path=path, tokenizer_path=str(tmp_path))


def test_a_tokenizer_without_its_package(tmp_path):
    try:
        import tokenizers  # noqa: F401 # pyright: ignore[reportMissingImports]
    except ImportError:
        with pytest.raises(UserError, match="tokenizers, which is not installed"):
            text_folder.make(path=folder(tmp_path), tokenizer_path=str(tmp_path))
