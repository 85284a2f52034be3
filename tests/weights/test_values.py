"""Files that the real libraries wrote are read to the values that they stand for."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

from distill_jax import weights
from distill_jax.core.errors import UserError
from distill_jax.weights import __main__ as command
from tests.weights import files

KINDS = ("kinds.pth", "kinds_protocol4.pth", "kinds_legacy.pth", "kinds.safetensors", "sharded")


def ramp(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def wanted():
    """The tensors of `tools/build_weight_fixtures.py`."""
    base = ramp(4, 6)
    return {
        "plain": ramp(2, 3) / 4,
        "scalar": np.float32(2.5),
        "empty": np.zeros((0, 3), np.float32),
        "float64": ramp(3).astype(np.float64) / 8,
        "float16": (ramp(5) / 2).astype(np.float16),
        "bfloat16": (ramp(5) - 2).astype(ml_dtypes.bfloat16),
        "int8": np.array([-128, -1, 0, 127], np.int8),
        "uint8": np.array([0, 255], np.uint8),
        "int16": np.array([-32768, 32767], np.int16),
        "int32": np.array([-(2**31), 2**31 - 1], np.int32),
        "int64": np.array([-(2**63), 2**63 - 1]),
        "bool": np.array([[True, False], [False, True]]),
        "complex64": (ramp(2) - 1j * ramp(2)).astype(np.complex64),
        "float8_e4m3fn": (ramp(4) / 2).astype(ml_dtypes.float8_e4m3fn),
        "float8_e5m2": (ramp(4) / 2).astype(ml_dtypes.float8_e5m2),
        "uint16": np.array([0, 65535], np.uint16),
        "transposed": base.T,
        "window": base[1:3, 2::2],
        "base": base,
        "expanded": np.broadcast_to(ramp(3)[:, None], (3, 4)),
    }


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found.specs[name] == (value.shape, value.dtype), name
        assert found[name].shape == value.shape, name
        np.testing.assert_array_equal(np.asarray(found[name]), value, err_msg=name)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_tensor(name):
    assert_equal(weights.read(files.FIXTURES / name), wanted())


def swapped(content):
    """An archive of PyTorch as a big-endian machine writes it."""
    sizes = {}
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        records = {name: source.read(name) for name in source.namelist()}
    root = next(iter(records)).partition("/")[0]
    # Storages are numbered in the order of `wanted`; the views at its end share one.
    for i, value in enumerate([*wanted().values()][:17]):
        sizes[f"{root}/data/{i}"] = value.dtype.itemsize // (2 if value.dtype.kind == "c" else 1)
    sizes[f"{root}/data/17"] = 4
    for name, size in sizes.items():
        whole = np.frombuffer(records[name], f"<u{size}")
        records[name] = whole.astype(f">u{size}").tobytes()
    records[f"{root}/byteorder"] = b"big"
    return files.archive(records.items())


def test_big_endian_archive(tmp_path):
    path = tmp_path / "big.pth"
    path.write_bytes(swapped((files.FIXTURES / "kinds.pth").read_bytes()))
    found = weights.read(path)
    assert_equal(found, wanted())
    assert np.shares_memory(found["base"], found["transposed"])


def test_the_suffix_does_not_matter(tmp_path):
    for name, format in [
        ("kinds.pth", "torch (zip)"),
        ("kinds_legacy.pth", "torch (legacy)"),
        ("kinds.safetensors", "safetensors"),
    ]:
        shutil.copy(files.FIXTURES / name, tmp_path / "weights.npz")
        assert weights.read(tmp_path / "weights.npz").format == format


@pytest.mark.parametrize("name", ["checkpoint.pth", "checkpoint_legacy.pt"])
def test_a_checkpoint(name):
    found = weights.read(files.FIXTURES / name)
    first = "model.first.weight"
    assert [*found][:3] == [first, "model.first.bias", "model.norm.weight"]
    assert found.tied == (
        (first, "model.second.weight", "parameters.0"),
        ("model.first.bias", "parameters.1.0"),
    )
    np.testing.assert_array_equal(found[first], ramp(4, 3))
    np.testing.assert_array_equal(found["model.norm.bias"], ramp(4) + 3)
    assert found["model.norm.num_batches_tracked"] == 0
    assert np.shares_memory(found[first], found["model.second.weight"])
    assert found.metadata == {
        "epoch": 3,
        "best": 0.25,
        "name": "naïve",
        "flags.ema": True,
        "flags.resumed": None,
        "dtype": "torch.bfloat16",
        "ordered.a": 1,
    }


def test_arrays_are_mapped_and_read_only():
    for name in ("kinds.pth", "kinds_legacy.pth", "kinds.safetensors"):
        found = weights.read(files.FIXTURES / name)
        assert not any(found[key].flags.writeable for key in found)
        assert not any(found[key].flags.owndata for key in found if found[key].size)
    with pytest.raises(ValueError, match="read-only"):
        found["plain"][0, 0] = 1


def test_names_that_differ_in_case_are_two_tensors(tmp_path):
    two = np.arange(2, dtype=np.float32)
    header = {"A.w": files.tensor(0, 4), "a.w": files.tensor(4, 8)}
    contents = {
        "x.safetensors": files.safetensors(header, two.tobytes()),
        "x.pth": files.pth(
            files.state(
                **{
                    "A.w": files.rebuilt(files.storage("0", 2), 0, (1,)),
                    "a.w": files.rebuilt(files.storage("0", 2), 1, (1,)),
                }
            ),
            {"0": two.tobytes()},
        ),
        "x.npz": files.archive([("A.w.npy", npy(two[:1])), ("a.w.npy", npy(two[1:]))]),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        found = weights.read(tmp_path / name)
        assert {key: float(found[key][0]) for key in found} == {"A.w": 0, "a.w": 1}


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(save, tmp_path):
    expected = {
        "params/encoder/kernel": ramp(3, 4),
        "params/encoder/bias": np.asfortranarray(ramp(2, 3)).astype(np.float16),
        "params/scalar": np.float64(0.1),
        "params/empty": np.zeros((0, 2)),
        "flags": np.array([True, False]),
        "ids": np.arange(4),
        "complex": (1 + 2j) * ramp(2).astype(np.complex64),
        "half": ramp(4).astype(ml_dtypes.bfloat16),
    }
    save(tmp_path / "w.npz", **expected)
    found = weights.read(tmp_path / "w.npz")
    assert found.format == "npz"
    assert_equal(found, expected)
    assert set(found.nested()["params"]["encoder"]) == {"kernel", "bias"}


def test_npz_in_big_endian_order(tmp_path):
    np.savez(tmp_path / "w.npz", a=ramp(2, 3).astype(">f4"), b=np.arange(3).astype(">i8").T)
    assert_equal(weights.read(tmp_path / "w.npz"), {"a": ramp(2, 3), "b": np.arange(3)})


def test_compressed_storages(tmp_path):
    content = files.pth(
        files.state(a=files.rebuilt(), b=files.rebuilt()), compression=zipfile.ZIP_DEFLATED
    )
    (tmp_path / "w.pth").write_bytes(content)
    found = weights.read(tmp_path / "w.pth")
    assert_equal(found, {"a": ramp(4) + 1, "b": ramp(4) + 1})
    assert np.shares_memory(found["a"], found["b"])


def test_views_of_storages_in_the_format_before_1_6(tmp_path):
    view = b"(" + files.text("view") + files.integer(1) + files.integer(2) + b"t"
    stored = files.storage("0", 4, view=view)
    data = files.state(
        whole=files.rebuilt(files.storage()[:-2] + b"NtQ"), part=files.rebuilt(stored, 0, (2,))
    )
    (tmp_path / "w.pth").write_bytes(files.legacy(data))
    assert_equal(weights.read(tmp_path / "w.pth"), {"whole": ramp(4) + 1, "part": ramp(2) + 2})


def test_strings_of_python_2(tmp_path):
    key = b"U\x03w.b"
    (tmp_path / "w.pth").write_bytes(files.legacy(b"\x80\x02}" + key + files.rebuilt() + b"s."))
    assert_equal(weights.read(tmp_path / "w.pth"), {"w.b": ramp(4) + 1})


def test_shards_without_an_index(tmp_path):
    for path in (files.FIXTURES / "sharded").glob("*.safetensors"):
        shutil.copy(path, tmp_path)
    assert_equal(weights.read(tmp_path), wanted())
    assert_equal(weights.read(files.FIXTURES / "sharded/model.safetensors.index.json"), wanted())


def test_an_index_of_pytorch_files(tmp_path):
    for key in "ab":
        (tmp_path / f"{key}.bin").write_bytes(files.pth(files.state(**{key: files.rebuilt()})))
    (tmp_path / "i.json").write_text(json.dumps({"weight_map": {"a": "a.bin", "b": "b.bin"}}))
    found = weights.read(tmp_path / "i.json")
    assert_equal(found, {"a": ramp(4) + 1, "b": ramp(4) + 1})
    assert not found.tied


def test_a_length_that_begins_like_json(tmp_path):
    header = json.dumps({"a": files.tensor()}).encode()
    header += b" " * (0x17B - len(header))  # the length is written as b"{\x01..."
    (tmp_path / "w").write_bytes(files.safetensors(header, b"\0" * 4))
    assert (tmp_path / "w").read_bytes()[0] == ord("{")
    assert_equal(weights.read(tmp_path / "w"), {"a": np.zeros(1, np.float32)})


# Checks on request.


def test_sha256(tmp_path):
    path = files.FIXTURES / "kinds.safetensors"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(weights.read(path, sha256=digest)) == 20
    assert len(weights.read(path, sha256={path.name: digest.upper()})) == 20
    with pytest.raises(weights.WeightsError, match=f"SHA-256 is {digest}, not 0{{64}}"):
        weights.read(path, sha256="0" * 64)
    with pytest.raises(weights.WeightsError, match="64 hexadecimal digits"):
        weights.read(path, sha256=digest[:8])
    with pytest.raises(weights.WeightsError, match="no checksum for 'kinds"):
        weights.read(path, sha256={"other": digest})


def test_sha256_of_shards():
    folder = files.FIXTURES / "sharded"
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("*.safetensors")
    }
    assert len(weights.read(folder, sha256=digests)) == 20
    first, second = sorted(digests)
    with pytest.raises(weights.WeightsError, match=f"{second}: its SHA-256"):
        weights.read(folder, sha256=digests | {second: digests[first]})
    with pytest.raises(weights.WeightsError, match="cannot be that of all"):
        weights.read(folder, sha256=digests[first])


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "bfloat16", "float8_e5m2", "complex64"]
)
def test_values_that_are_not_finite(dtype, tmp_path):
    values = np.array([[1, np.nan], [np.inf, -np.inf]]).astype(np.dtype(dtype)).T
    with pytest.raises(weights.WeightsError, match=r"not finite: 'x\.bad' has 3 of 4\n") as error:
        weights.check_finite({"x.bad": values, "good": np.ones(3, dtype), "n": np.arange(2)})
    assert error.value.where == ""
    np.savez(tmp_path / "w.npz", bad=np.array([np.nan]), good=np.ones(2))
    with pytest.raises(weights.WeightsError, match=r"w\.npz: .*'bad' has 1 of 1"):
        weights.read(tmp_path / "w.npz", check_finite=True)
    assert len(weights.read(tmp_path / "w.npz")) == 2


# What is shown.


def test_summary():
    text = weights.summary(weights.read(files.FIXTURES / "checkpoint.pth"))
    lines = text.splitlines()
    # 12 + 4 of the linear layer, 4 x 4 + 1 of the norm, in float32 but for one int64.
    assert lines[0] == "torch (zip): 10 tensors, 33 elements, 136 bytes"
    assert lines[4].split() == ["model.first.weight", "4", "x", "3", "float32"]
    assert "num_batches_tracked  scalar  int64" in text
    assert lines[-1] == "one tensor: 'model.first.bias', 'parameters.1.0'"


def test_names_cannot_act_on_a_terminal(tmp_path):
    path = tmp_path / "w"
    path.write_bytes(files.safetensors({"\x1b[2J\u202e\ud800": files.tensor()}, b"\0" * 4))
    text = weights.summary(weights.read(path))
    assert r"'\x1b[2J\u202e\ud800'" in text and "\x1b" not in text
    path.write_bytes(files.safetensors({"\x1b[2J\n": files.tensor(0, 8)}, b"\0" * 4))
    with pytest.raises(weights.WeightsError, match=r"'\\x1b\[2J\\n'"):
        weights.read(path)


def test_a_name_that_is_missing():
    found = weights.read(files.FIXTURES / "kinds.pth")
    with pytest.raises(weights.WeightsError, match=r"no tensor 'plane'\n  did you mean.*plain"):
        found["plane"]
    assert found.get("plane") is None and "plane" not in found
    assert issubclass(weights.WeightsError, UserError)


def test_nested_names_that_exclude_each_other(tmp_path):
    header = {"a": files.tensor(), "a/b/c": files.tensor(4, 8)}
    (tmp_path / "w").write_bytes(files.safetensors(header, b"\0" * 8))
    with pytest.raises(weights.WeightsError, match="nested in each other"):
        weights.read(tmp_path / "w").nested()
    assert set(weights.read(tmp_path / "w").nested(".")) == {"a", "a/b/c"}


def test_command(capsys, tmp_path):
    assert command.main([str(files.FIXTURES / "kinds.pth")]) == 0
    assert "bfloat16       5       bfloat16" in capsys.readouterr().out
    (tmp_path / "bad\n.pth").write_bytes(b"PK\3\4 and then nothing")
    assert command.main([str(tmp_path / "bad\n.pth")]) == 2
    printed = capsys.readouterr()
    assert not printed.out and "is no complete zip archive" in printed.err
    assert printed.err.count("\n") == 1


def test_command_in_a_process(tmp_path):
    line = [sys.executable, "-m", "distill_jax.weights", "absent.pth"]
    env = {"PYTHONPATH": str(files.FIXTURES.parents[2])}
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "absent.pth: does not exist\n"


def test_reading_imports_neither_jax_nor_torch():
    code = (
        "import sys; from distill_jax import weights\n"
        f"weights.read({str(files.FIXTURES / 'kinds.pth')!r})\n"
        "assert not {'jax', 'torch', 'safetensors', 'pickle5', 'flax'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
