"""Damaged and hostile files are refused by one clear error; nothing in them is run.

Memory is bounded by what Python allocates while a file is read; the expected messages are parts of
what a user sees. A pickle that would touch a file were it loaded is given the path of a canary.
"""

import io
import json
import os
import pickle
import random
import re
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest

from distill_jax import weights
from distill_jax.weights import common
from tests.weights import files
from tests.weights.files import FACTOR, refused
from tests.weights.test_hostile_pickles import Calls, touch

# Containers of PyTorch.

GOOD = files.state(a=files.rebuilt())
BOOLEANS = files.state(a=files.rebuilt(files.storage(kind=("torch", "BoolStorage"))))
TWO_KINDS = files.state(
    a=files.rebuilt(), b=files.rebuilt(files.storage("0", 2, ("torch", "DoubleStorage")), 0, (1,))
)


def doctored(content, **values):
    """Changes fields of the directory entry of the storage in an archive."""
    content = bytearray(content)
    at = content.rindex(b"PK\1\2")
    places = {"method": (10, "<H"), "crc": (16, "<I"), "packed": (20, "<I"), "size": (24, "<I"),
              "flags": (8, "<H"), "header": (42, "<I")}  # fmt: skip
    for name, value in values.items():
        offset, kind = places[name]
        struct.pack_into(kind, content, at + offset, value)
    return bytes(content)


def bomb():
    return files.pth(GOOD, {"0": FOUR_MIB}, zipfile.ZIP_DEFLATED)


FOUR_MIB = b"\0" * (4 << 20)


def twice():
    stream = io.BytesIO()
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(stream, "w") as target:
        target.writestr("a/data.pkl", GOOD)
        target.writestr("a/data/0", files.FOUR)
        target.writestr("a/data/0", files.FOUR[::-1])
    return stream.getvalue()


def flipped(content, what):
    at = content.index(what)
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def renamed(content):
    """The header of the storage itself has another name than the directory."""
    at = content.index(b"archive/data/0")
    return content[:at] + b"archive/data/1" + content[at + 14 :]


def overlapping():
    """The entry of a storage is put into another one, which holds an archive of its own."""
    stream = io.BytesIO()
    inner = files.pth(GOOD)
    with zipfile.ZipFile(stream, "w") as target:
        target.writestr("archive/data.pkl", GOOD)
        target.writestr("archive/x", inner)
        target.writestr("archive/data/0", files.FOUR)
    content = stream.getvalue()
    return doctored(content, header=content.index(inner) + inner.rindex(b"PK\3\4"))


CONTAINERS = {
    "zip bomb": (bomb, "expand to 4 MiB from"),
    "bomb behind a small size": (
        lambda: doctored(bomb(), size=16), "has not the 16 bytes that"),
    "declared size of 4 GB": (
        lambda: doctored(files.pth(GOOD, None, zipfile.ZIP_DEFLATED), size=2**32 - 2),
        "expand to 4 GiB"),
    "stored in two sizes": (lambda: doctored(files.pth(GOOD), size=2**31), "two sizes"),
    "beyond the end": (
        lambda: doctored(files.pth(GOOD), size=2**31, packed=2**31), "beyond the end of the file"),
    "checksum in the directory": (lambda: doctored(files.pth(GOOD), crc=1), "wrong checksum"),
    "damaged values": (lambda: flipped(files.pth(GOOD), files.FOUR), "data/0' has a wrong"),
    "damaged pickle": (lambda: flipped(files.pth(GOOD), GOOD[4:20]), "data.pkl' has a wrong"),
    "no checksums": (
        lambda: re.sub(rb"(PK\x01\x02.{12}).{4}", rb"\g<1>\0\0\0\0", files.pth(GOOD), flags=re.S),
        r"without checksums\n.*set_crc32_options"),
    "encrypted": (lambda: doctored(files.pth(GOOD), flags=1), "encrypted"),
    "method": (lambda: doctored(files.pth(GOOD), method=12), "differs|method 12"),
    "not deflated": (
        lambda: doctored(files.pth(GOOD), method=8), "differs between the directory"),
    "place": (lambda: doctored(files.pth(GOOD), header=7), "no header where|differs"),
    "place outside": (lambda: doctored(files.pth(GOOD), header=2**31), "outside|zip archive"),
    "another name": (lambda: renamed(files.pth(GOOD)), "differs between"),
    "overlap": (overlapping, "overlaps another"),
    "entry twice": (twice, "is there twice"),
    "no storage": (lambda: files.pth(GOOD, {}), "no entry 'archive/data/0'"),
    "short storage": (lambda: files.pth(GOOD, {"0": b"1234"}), "has 4 bytes, its storage takes 16"),
    "long storage": (lambda: files.pth(GOOD, {"0": b"1" * 20}), "has 20 bytes"),
    "storage of two kinds": (lambda: files.pth(TWO_KINDS), "in another way"),
    "byte order": (lambda: files.pth(GOOD, byteorder=b"middle"), "byte order b'middle'"),
    "bytes behind the pickle": (lambda: files.pth(GOOD + b"x"), "1 bytes behind its pickle"),
    "TorchScript": (lambda: files.pth(GOOD, **{"constants.pkl": b"x"}), "TorchScript"),
    "booleans": (
        lambda: files.pth(BOOLEANS, {"0": b"\0\1\2\3"}), "neither 0 nor 1"),
    "two pickles": (
        lambda: files.archive([("a/data.pkl", GOOD), ("b/data.pkl", GOOD)]), "several pickles"),
    "other archive": (lambda: files.archive([("readme.txt", b"x")]), "neither of torch.save nor"),
    "empty archive": (lambda: files.archive([]), "empty zip archive"),
    "path in a storage": (
        lambda: files.pth(files.state(a=files.rebuilt(files.storage("../../../etc/passwd")))),
        "no entry 'archive/data/../../"),
    "old: big-endian": (lambda: files.legacy(GOOD, little=False), "big-endian"),
    "old: version": (lambda: files.legacy(GOOD, version=1002), "unknown version"),
    "old: storage too short": (lambda: files.legacy(GOOD)[:-1], "beyond the end"),
    "old: bytes behind": (lambda: files.legacy(GOOD) + b"x", "1 bytes behind its storages"),
    "old: storage twice": (lambda: files.legacy(GOOD, keys=["0", "0"]), "list of storages"),
    "old: storage missing": (lambda: files.legacy(GOOD, keys=[]), "list of storages"),
    "old: list of nothing": (lambda: files.legacy(GOOD, keys=7), "list of storages"),
    "old: two sizes": (lambda: files.legacy(GOOD, {"0": (2**40, files.FOUR)}), "two sizes"),
    "old: two kinds": (lambda: files.legacy(TWO_KINDS), "in two ways"),
    "old: view beyond the end": (
        lambda: files.legacy(files.state(a=files.rebuilt(files.storage(
            view=b"(" + files.text("v") + files.integer(2) + files.integer(3) + b"t")))),
        "view beyond the end"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTAINERS)
def test_containers_of_pytorch(case, tmp_path):
    make, match = CONTAINERS[case]
    (tmp_path / "w.pth").write_bytes(make())
    refused(tmp_path / "w.pth", match)


# Safetensors.

ONE = {"a": files.tensor()}


def header_of(**changes):
    return files.safetensors({"a": files.tensor() | changes}, b"\0" * 4)


SAFETENSORS = {
    "header beyond the end": (files.safetensors(ONE, b"\0" * 4, length=10**6), "977 KiB, the file"),
    "header of 2**63": (files.safetensors(ONE, length=2**63), "its safetensors header claims"),
    "header too short": (files.safetensors(ONE, b"\0" * 4, length=20), "not JSON"),
    "header of nothing": (struct.pack("<Q", 0) + b"{}", "is not JSON"),
    "not JSON": (files.safetensors(b"{]"), "not JSON"),
    "not UTF-8": (files.safetensors(b'{"\xff": 1}'), "not JSON"),
    "deep": (files.safetensors(b'{"a":' + b"[" * 50000), "not JSON"),
    "100,000 lists": (files.safetensors(b'{"a":[' + b"[]," * 10**5 + b"0]}"), "lists and objects"),
    "digits": (files.safetensors(b'{"a":' + b"9" * 5000 + b"}"), "not JSON"),
    "name twice": (files.safetensors(b'{"a":{"x":1},"b":1,"a":{}}'), "the name 'a' twice"),
    "field twice": (files.safetensors(b'{"a":{"dtype":"F32","dtype":"F64"}}'), "'dtype' twice"),
    "no field": (files.safetensors({"a": {"dtype": "F32"}}), "something else than dtype"),
    "no object": (files.safetensors({"a": 5}), "something else than dtype"),
    "metadata": (files.safetensors({"__metadata__": {"a": 1}}), "not an object of strings"),
    "dtype": (header_of(dtype="F31"), "dtype 'F31'"),
    "dtype of text": (header_of(dtype=["F32"]), "dtype"),
    "four bits": (header_of(dtype="F4", shape=[8]), "dtype 'F4', which is not read"),
    "dtype that lies": (header_of(dtype="F64"), "has 4 bytes, its shape .1. of F64 takes 8"),
    "shape that lies": (header_of(shape=[2]), "takes 8"),
    "shape that overflows": (header_of(shape=[2**32, 2**32]), "no memory can hold"),
    "shape that overflows to zero": (header_of(shape=[0, 2**62], data_offsets=[0, 0]), "no memory"),
    "negative size": (header_of(shape=[-1]), "integers from zero"),
    "float size": (header_of(shape=[1.0]), "integers from zero"),
    "true as a size": (header_of(shape=[True]), "integers from zero"),
    "shape of text": (header_of(shape="1"), "no list"),
    "65 dimensions": (header_of(shape=[1] * 65), "65 dimensions"),
    "end before begin": (header_of(data_offsets=[4, 0]), "the offsets"),
    "negative begin": (header_of(data_offsets=[-4, 0]), "the offsets"),
    "end beyond the file": (header_of(data_offsets=[4, 8]), "buffer of 4 bytes"),
    "three offsets": (header_of(data_offsets=[0, 4, 8]), "the offsets"),
    "overlap": (
        files.safetensors(ONE | {"b": files.tensor(2, 6)}, b"0" * 6),
        "'a' and 'b' overlap"),
    "same place": (files.safetensors(ONE | {"b": files.tensor()}, b"0" * 4), "overlap"),
    "hole": (
        files.safetensors(ONE | {"b": files.tensor(8, 12)}, b"0" * 12),
        "no tensor has bytes 4 to 8"),
    "bytes at the end": (files.safetensors(ONE, b"0" * 5), "no tensor has the last 1 bytes"),
    "truncated": (files.safetensors(ONE, b"0" * 3), "buffer of 3 bytes"),
    "booleans": (
        files.safetensors({"a": files.tensor(0, 2, (2,), "BOOL")}, b"\1\2"), "neither 0 nor 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAFETENSORS)
def test_safetensors(case, tmp_path):
    content, match = SAFETENSORS[case]
    (tmp_path / "w.safetensors").write_bytes(content)
    refused(tmp_path / "w.safetensors", match)


def test_many_small_tensors_take_a_multiple_of_the_file(tmp_path):
    header = {f"layer{i}.weight": files.tensor(4 * i, 4 * i + 4) for i in range(1500)}
    (tmp_path / "w").write_bytes(files.safetensors(header, b"\0" * 6000))
    tracemalloc.start()
    found = weights.read(tmp_path / "w")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 1500
    assert peak < FACTOR * (tmp_path / "w").stat().st_size + common.SLACK


def test_a_large_file_is_mapped(tmp_path):
    """Tensors of 64 MiB are read, summed up and summarised with a megabyte of memory."""
    count, nbytes = 1 << 24, 1 << 26
    for name, start in [
        ("w.safetensors", files.safetensors({"a": files.tensor(0, nbytes, (count,))})),
        ("w.pth", files.legacy(files.state(a=files.rebuilt(files.storage("0", count), 0, (count,))),
                               {"0": (count, b"")})),
    ]:  # fmt: skip
        with (tmp_path / name).open("wb") as file:
            file.write(start)
            file.truncate(len(start) + nbytes)
        tracemalloc.start()
        found = weights.read(tmp_path / name, check_finite=True)
        assert not found["a"][-1] and found["a"].shape == (count,)
        weights.summary(found)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * common.SLACK, peak


# Archives of NumPy.


def npz(**changes):
    return files.archive([("a.npy", files.npy(**changes))])


def pickled(canary):
    stream = io.BytesIO()
    np.save(stream, np.array([Calls(exec, touch(canary))], object), allow_pickle=True)
    return files.archive([("a.npy", stream.getvalue())])


NPZ = {
    "objects": (lambda c: pickled(c), "a pickle, which is refused"),
    "structure": (
        lambda c: files.archive([("a.npy", files.npy().replace(b"'<f4'", b"[('x', '<f4')]"))]),
        "has the header"),
    "code in the header": (lambda c: npz(shape="(exit(),)"), "has the header"),
    "deep header": (lambda c: npz(shape="(" * 3000), "header"),
    "header of 64 KiB": (lambda c: npz(shape="(" + "1," * 30000 + ")"), "header that claims"),
    "text": (lambda c: npz(descr="<U4"), "dtype '<U4'"),
    "dates": (lambda c: npz(descr="<M8[s]"), "dtype"),
    "float of 3 bytes": (lambda c: npz(descr="<f3"), "dtype '<f3'"),
    "shape that lies": (lambda c: npz(shape="(5,)"), r"16 bytes of data, its shape \(5,\)"),
    "shape beyond memory": (lambda c: npz(shape="(4611686018427387904, 4)"), "no memory can hold"),
    "version": (lambda c: npz(version=b"\x09\x00"), "no array of NumPy"),
    "magic": (lambda c: files.archive([("a.npy", b"x" * 100)]), "no array of NumPy"),
    "empty entry": (lambda c: files.archive([("a.npy", b"")]), "no array of NumPy"),
    "booleans": (lambda c: npz(descr="|b1", shape="(16,)"), "neither 0 nor 1"),
    "bomb": (
        lambda c: files.archive(
            [("a.npy", files.npy(shape=f"({1 << 20},)", data=FOUR_MIB))], zipfile.ZIP_DEFLATED),
        "saved without compression"),
    "damaged": (lambda c: flipped(npz(), files.FOUR), "wrong checksum"),
}  # fmt: skip


@pytest.mark.parametrize("case", NPZ)
def test_npz(case, tmp_path):
    make, match = NPZ[case]
    canary = tmp_path / "canary"
    (tmp_path / "w.npz").write_bytes(make(canary))
    refused(tmp_path / "w.npz", match)
    assert not canary.exists()


# Indices and folders.


def sharded(folder, weight_map, **extra):
    for name in ("x.safetensors", "y.safetensors"):
        tensor = {name[0]: files.tensor()}
        (folder / name).write_bytes(files.safetensors(tensor, b"\0" * 4))
    index = {"weight_map": weight_map, **extra}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


X, Y = {"x": "x.safetensors"}, {"y": "y.safetensors"}
INDICES = {
    "missing shard": (X | Y | {"z": "z.safetensors"}, r"z\.safetensors: does not exist"),
    "missing tensor": (X | Y | {"z": "y.safetensors"}, r"y\.safetensors: lacks 'z'"),
    "parent": ({"x": "../x.safetensors"}, "names of files beside the index"),
    "absolute": ({"x": "/etc/passwd"}, "names of files beside the index"),
    "dots": ({"x": ".."}, "names of files beside the index"),
    "NUL": ({"x": "x\0"}, "names of files beside the index"),
    "number": ({"x": 1}, "names of files beside the index"),
    "long": ({"x": "x" * 10**6}, "names of files beside the index"),
    "escape": ({"x": "\x1b[2J\n"}, r"\\x1b\[2J\\n': does not exist"),
    "itself": ({"x": "model.safetensors.index.json"}, "of no format|header"),
    "empty": ({}, "empty weight_map"),
    "list": ([], "without a weight_map"),
}


@pytest.mark.parametrize("case", INDICES)
def test_indices(case, tmp_path):
    weight_map, match = INDICES[case]
    folder = tmp_path / "model"
    folder.mkdir()
    refused(sharded(folder, weight_map), match)


def test_a_shard_with_a_tensor_that_the_index_lacks(tmp_path):
    sharded(tmp_path, X | Y)
    content = files.safetensors({"x": files.tensor(), "new": files.tensor(4, 8)}, b"\0" * 8)
    (tmp_path / "x.safetensors").write_bytes(content)
    refused(tmp_path, r"x\.safetensors: has, unlike the index, 'new'")


def test_an_index_with_a_tensor_twice(tmp_path):
    sharded(tmp_path, X | Y)
    text = '{"weight_map": {"x": "x.safetensors", "y": "y.safetensors", "x": "y.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, "the index has the name 'x' twice")


def test_folders(tmp_path):
    for name in ("orbax", "run", "empty", "two", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "orbax" / "_CHECKPOINT_METADATA").write_text("{}")
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "other" / "pytorch_model.bin").write_bytes(b"x")
    for name in "ab":
        content = files.safetensors(ONE, b"\0" * 4)
        (tmp_path / "two" / f"{name}.safetensors").write_bytes(content)
    for name in ("orbax", "run"):
        refused(tmp_path / name, r"a checkpoint of Orbax or a run .*\n.*distill_jax\.load")
    refused(tmp_path / "empty", "without safetensors")
    refused(tmp_path / "other", r"the path of a file: pytorch_model\.bin")
    refused(tmp_path / "two", r"'a' is in 'a\.safetensors' and in 'b\.safetensors'")
    sharded(tmp_path / "empty", X | Y)
    (tmp_path / "empty" / "model.safetensors").write_bytes(files.safetensors(ONE, b"\0" * 4))
    refused(tmp_path / "empty", "several models")


# Other files.

OTHERS = {
    "empty": (b"", "is empty"),
    "one byte": (b"x", "of no format"),
    "hdf5": (b"\x89HDF\r\n\x1a\n", "HDF5"),
    "array": (files.npy(), "single array"),
    "gzip": (b"\x1f\x8b\x08", "gzip"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "page": (b"<!DOCTYPE html><html>", "web page"),
    "pickle": (pickle.dumps({"a": 1}), "pickle that torch.save did not write"),
    "tar": (b"storages" + b"\0" * 249 + b"ustar\0" + b"\0" * 249, "tar archive"),
    "json": (b'{"a": 1}', "without a weight_map"),
    "text": (b"hello, world", "of no format that is read"),
    "noise": (random.Random(0).randbytes(4096), "of no format that is read"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_files(case, tmp_path):
    content, match = OTHERS[case]
    (tmp_path / "w.pth").write_bytes(content)
    refused(tmp_path / "w.pth", match)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file")
    refused(tmp_path / "absent", "does not exist")
    refused(tmp_path / "nul\0", "cannot be read")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(tmp_path / "loop", "cannot be read|does not exist")


# Truncation at every byte, and damage at random.

COMPLETE = {
    "safetensors": files.safetensors(
        {"a": files.tensor(0, 8, (2,)), "b": files.tensor(8, 10, (2,), "BOOL")}, b"\0" * 10
    ),
    "zip": files.pth(GOOD),
    "deflated": files.pth(GOOD, None, zipfile.ZIP_DEFLATED),
    "legacy": files.legacy(GOOD),
    "npz": files.archive([("a.npy", files.npy()), ("b.npy", files.npy("|u1", "(16,)"))]),
}


@pytest.mark.parametrize("format", COMPLETE)
def test_truncated_at_every_byte(format, tmp_path):
    content, path = COMPLETE[format], tmp_path / "w"
    path.write_bytes(content)
    assert len(weights.read(path)) >= 1
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(weights.WeightsError):
            weights.read(path)


def damage(content, source):
    """Up to four changes of bits or bytes, or a cut, or a part that is there twice."""
    content = bytearray(content)
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(content) or 1)
        kind = source.random()
        if kind < 0.5:
            content[at] ^= 1 << source.randrange(8)
        elif kind < 0.8:
            content[at] = source.choice(b"\0\xff{}[]()PKcRbQ.u\x80\x7f" + source.randbytes(1))
        elif kind < 0.9:
            content[at:at] = content[at : at + source.randrange(40)]
        else:
            del content[at + 1 :]
    return bytes(content)


def sealed(content, source):
    """Damages the entries of an archive and gives them right checksums."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(stream, "w") as target:
        names = archive.namelist()
        hit = source.choice(names)
        for name in names:
            value = archive.read(name)
            target.writestr(name, damage(value, source) if name == hit and value else value)
    return stream.getvalue()


@pytest.mark.parametrize(
    "format", [*COMPLETE, "sealed zip", "sealed npz", "fixture", "legacy fixture"]
)
def test_damage_at_random_is_an_error_or_nothing(format, tmp_path):
    """Three hundred damaged files: whatever is read can be used, whatever is not is explained."""
    name = format.removeprefix("sealed ")
    fixtures = {"fixture": "checkpoint.pth", "legacy fixture": "checkpoint_legacy.pt"}
    content = (files.FIXTURES / fixtures[name]).read_bytes() if name in fixtures else COMPLETE[name]
    source, path, read = random.Random(f"{format} 0"), tmp_path / "w", 0
    for _ in range(300):
        make = sealed if format.startswith("sealed") or format == "fixture" else damage
        path.write_bytes(make(content, source))
        try:
            found = weights.read(path)
            arrays = {name: np.array(found[name]) for name in found}
            assert {name: a.shape for name, a in arrays.items()} == {
                name: spec.shape for name, spec in found.specs.items()
            }
            weights.summary(found)
            weights.check_finite(found)
            read += 1
        except weights.WeightsError as error:
            assert error.where == str(path) and len(str(error)) < 2000
    assert read < 300


def test_deflate_that_does_not_end(tmp_path):
    """Data behind the end of a compressed entry, and an entry that is cut."""
    for change in (2, -2):
        stream = io.BytesIO()
        packer = zlib.compressobj(wbits=-15)
        packed = packer.compress(GOOD) + packer.flush()
        with zipfile.ZipFile(stream, "w") as target:
            target.writestr("a/data.pkl", packed[:change] if change < 0 else packed + b"xx")
        content = bytearray(stream.getvalue())
        for mark, at in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
            struct.pack_into("<H", content, content.index(mark) + at, 8)
        at = content.index(b"PK\1\2")
        struct.pack_into("<I", content, at + 16, zlib.crc32(GOOD))
        struct.pack_into("<I", content, at + 24, len(GOOD))
        (tmp_path / "w").write_bytes(content)
        refused(tmp_path / "w", "ends too early" if change < 0 else "behind its compressed data")
