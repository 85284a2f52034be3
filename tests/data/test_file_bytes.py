"""Windows of files, what is kept of a folder, and parts of whole packages."""

from typing import Any

import numpy as np
import pytest

from distill_jax.core.errors import ArgumentError, DataUnavailable
from distill_jax.data import checks, file_bytes, shared_examples, source

RNG = np.random.default_rng(0)


def random_bytes(n):
    return RNG.integers(0, 256, n, dtype=np.uint8).tobytes()


@pytest.mark.parametrize("n", [0, 1, 20, 1023, 1024, 1025, 4095, 4096, 4097, 9000])
def test_a_window_is_both_ends_without_outer_white_space(tmp_path, n):
    content = b"\n \t" + bytes(RNG.integers(97, 123, n, dtype=np.uint8)) + b" \n"
    (tmp_path / "file").write_bytes(content)
    window = file_bytes.read_window(tmp_path / "file")
    assert window.shape == (2048,) and window.dtype == np.int32
    first, last = content[:4096].lstrip()[:1024], content[-4096:].rstrip()[-1024:]
    assert bytes(window[: len(first)].astype(np.uint8)) == first
    assert bytes(window[2048 - len(last) :].astype(np.uint8)) == last
    assert (window[len(first) : 2048 - len(last)] == 256).all()


def test_windows_are_those_of_magika(tmp_path):
    magika = pytest.importorskip("magika")
    from magika.types import Seekable  # pyright: ignore[reportMissingImports]

    for n in (1, 17, 1000, 1024, 2000, 4096, 5000, 12_000):
        content = b" \r\n\x0b" * (n % 3) + random_bytes(n) + b"\t\x0c\n" * (n % 5)
        (tmp_path / "file").write_bytes(content)
        with (tmp_path / "file").open("rb") as file:
            found = magika.Magika._extract_features_from_seekable(
                Seekable(file), 1024, 0, 1024, 256, 4096, False
            )
        np.testing.assert_array_equal(
            file_bytes.read_window(tmp_path / "file"), np.array([*found.beg, *found.end])
        )


def write(root, path, content):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(content)


def kept(root, **limits):
    return {file.path for file in file_bytes.select(root, **limits)}


def test_copies_and_near_copies_are_kept_once(tmp_path):
    text, other = random_bytes(6000), random_bytes(6000)
    write(tmp_path, "a/one.bin", text)
    write(tmp_path, "b/copy.bin", text)
    write(tmp_path, "c/middle.bin", text[:2000] + other[2000:4000] + text[4000:])
    write(tmp_path, "d/same_end.bin", other[:3000] + text[3000:])
    write(tmp_path, "e/same_block.bin", text[:256] + random_bytes(6000))
    write(tmp_path, "f/short.bin", b"x")
    write(tmp_path, "f/zeros.bin", bytes(6000))
    write(tmp_path, "outside.bin", random_bytes(6000))
    found = kept(tmp_path)
    assert "e/same_block.bin" in found and len(found) == 2


def crops_of(tmp_path, content, n=20, seed="a"):
    (tmp_path / "file").write_bytes(content)
    return list(file_bytes.crops(tmp_path / "file", n, seed=seed))


def test_crops_of_text_begin_at_a_line_and_others_where_the_file_does(tmp_path):
    lines = [b"%06d abcdef" % i for i in range(1000)]
    text = crops_of(tmp_path, b"\n".join(lines))
    firsts = [bytes(w[:13].astype(np.uint8)) for w in text]
    assert set(firsts) <= set(lines) and len(set(firsts)) > 10
    lengths = [int((w != 256).sum()) for w in text]
    assert min(lengths) >= 40 and min(lengths) < 1024 < max(lengths)
    content = b"\x7f" + random_bytes(20) + b"\x00" + random_bytes(9000) + b"\x01"
    binary = crops_of(tmp_path, content)
    assert all(bytes(w[:22].astype(np.uint8)) == content[:22] for w in binary)
    assert len({w.tobytes() for w in binary}) > 10
    again, other = (crops_of(tmp_path, content, seed=s) for s in ("a", "b"))
    assert np.array_equal(binary, again) and not np.array_equal(binary, other)
    (short,) = crops_of(tmp_path, b"short", n=1)
    assert (short != 256).sum() == 10


def test_only_training_files_give_crops_with_the_labels_of_the_file(folder):
    plain, made = (
        file_bytes.make(path=str(folder), test=0.25, held_out=0.2, crops_each=n) for n in (0, 3)
    )
    train: Any = made.train
    assert len(train) == 4 * len(plain.train)
    assert plain.test.provenance.sha256 == made.test.provenance.sha256
    every = np.arange(len(train))
    rows, whole = train.read(every), plain.train.read(every[: len(plain.train)])
    for name in ("input", "label", "labelled"):
        np.testing.assert_array_equal(rows[name][::4], whole[name])
    np.testing.assert_array_equal(rows["label"], np.repeat(whole["label"], 4))


def test_the_installed_packages_are_read_by_default(tmp_path, monkeypatch):
    for package in ("one", "two", "three", "one-1.0.dist-info"):
        write(tmp_path, f"{package}/a.py", random_bytes(300))
    monkeypatch.setattr(file_bytes.sysconfig, "get_path", {"purelib": tmp_path}.get)
    made: Any = file_bytes.make(test=0.3, held_out=0.0)
    assert {f.package for f in (*made.train.files, *made.test.files)} == {"one", "two", "three"}


def test_no_extension_and_no_package_dominates(tmp_path):
    for package in "abc":
        for i in range(6):
            write(tmp_path, f"{package}/{i}.PY", random_bytes(600))
    write(tmp_path, "a/x.rs", random_bytes(600))
    limited = kept(tmp_path, per_package=2, per_extension=5)
    assert sum(path.endswith(".PY") for path in limited) == 5 and "a/x.rs" in limited
    assert max(sum(p.startswith(f"{k}/") for p in limited - {"a/x.rs"}) for k in "abc") == 2
    assert len(kept(tmp_path, most=4)) == 4
    assert limited == kept(tmp_path, per_package=2, per_extension=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    for package in range(12):
        for name in ("a.py", "b.json", "LICENSE", "c.m"):
            write(root, f"package{package}/{name}", random_bytes(300))
    return root


def test_parts_are_whole_packages_and_labels_are_types(folder):
    made: Any = file_bytes.make(path=str(folder), test=0.25, held_out=0.2)
    dataset, _ = checks.open_dataset(made)
    packages = [{f.package for f in part.files} for part in (made.train, made.held_out, made.test)]
    assert [len(p) for p in packages] == [7, 2, 3] and len(set().union(*packages)) == 12
    rows = dataset.train.read(np.arange(len(dataset.train)))
    assert rows["input"].dtype == np.int32 and rows["input"].shape == (28, 2048)
    labelled = rows["labelled"] > 0
    names = {made.classes[i] for i in rows["label"][labelled]}
    assert names == {"python", "json"} and len(made.classes) == 214
    assert labelled.sum() == 14 and rows["labelled"].mean() == pytest.approx(1)
    assert not shared_examples.overlaps(dataset)["test"].repeated
    again = file_bytes.make(path=str(folder), test=0.25, held_out=0.2)
    other = file_bytes.make(path=str(folder), test=0.25, held_out=0.2, split_seed=3)
    sha256 = made.test.provenance.sha256
    assert again.test.provenance.sha256 == sha256 != other.test.provenance.sha256
    spec = file_bytes.spec()
    one = spec.train.read(np.arange(3))
    assert {k: (v.shape[1:], v.dtype) for k, v in one.items()} == {
        k: (v.shape[1:], v.dtype) for k, v in rows.items()
    }


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"path": "no/such/folder"}, DataUnavailable, "fetch_files"),
        ({"test": 0.0}, ArgumentError, "test is 0"),
        ({"held_out": 1.0}, ArgumentError, "held_out is 1"),
        ({"crops_each": -1}, ArgumentError, "crops_each is -1"),
        ({"most": 1}, DataUnavailable, "1 files of 1 packages"),
    ],
)
def test_what_cannot_be_read_is_refused(folder, arguments, error, message):
    with pytest.raises(error, match=message):
        file_bytes.make(**{"path": str(folder), **arguments})


def test_types_have_names_of_their_own():
    types = file_bytes.read_types()
    assert len(set(types["classes"])) == 214
    assert set(types["extensions"].values()) <= set(types["classes"])
    assert source.example_labels(file_bytes.spec().train).max() == 0
