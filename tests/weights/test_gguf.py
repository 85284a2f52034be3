"""GGUF files: values of every type that is read, metadata, and damaged files."""

import re
import struct

import ml_dtypes
import numpy as np
import pytest

from distill_jax import weights
from tests.weights.test_hostile import refused

STRING, ARRAY = 8, 9


def text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def entry(name, kind, data):
    return text(name) + struct.pack("<I", kind) + data


def info(name, shape, kind, offset):
    sizes = b"".join(struct.pack("<Q", size) for size in reversed(shape))
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


def gguf(entries=(), infos=(), data=b"", *, version=3, counts=None, padding=None):
    """A file; `padding` are the bytes between header and tensors, else as many as are needed."""
    n, m = counts or (len(infos), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, n, m) + b"".join(entries) + b"".join(infos)
    return head + (b"\0" * (-len(head) % 32) if padding is None else padding) + data


def halves(*values):
    return np.array(values, "<f2").tobytes()


RANDOM = np.random.default_rng(0)
NIBBLES = RANDOM.integers(0, 16, 32)
PACKED = (NIBBLES[:16] | NIBBLES[16:] << 4).astype(np.uint8).tobytes()
BYTES = RANDOM.integers(-128, 128, 32).astype(np.int8)
FLOATS = RANDOM.normal(size=4).astype(np.float32)
TYPES = {
    "F32": (0, FLOATS.tobytes(), FLOATS),
    "F16": (1, FLOATS.astype("<f2").tobytes(), FLOATS.astype("<f2")),
    "BF16": (30, FLOATS.astype(ml_dtypes.bfloat16).tobytes(), FLOATS.astype(ml_dtypes.bfloat16)),
    "Q4_0": (2, halves(0.5) + PACKED, 0.5 * (NIBBLES - 8.0)),
    "Q4_1": (3, halves(0.25, -2) + PACKED, 0.25 * NIBBLES - 2.0),
    "Q8_0": (8, halves(0.125) + BYTES.tobytes(), 0.125 * BYTES),
}


def one(name, kind, data, n):
    return gguf([], [info(name, (n,), kind, 0)], data)


@pytest.mark.parametrize("kind", TYPES)
def test_values(kind, tmp_path):
    code, data, values = TYPES[kind]
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf([], [info("w", (2, len(values)), code, 0)], data + data))
    loaded = weights.read(path)
    assert loaded.format == "gguf" and loaded.specs["w"].shape == (2, len(values))
    assert loaded["w"].dtype == loaded.specs["w"].dtype and not loaded["w"].flags.writeable
    np.testing.assert_array_equal(loaded["w"], np.stack([values, values]))


def test_metadata_and_places(tmp_path):
    entries = [
        entry("general.alignment", 4, struct.pack("<I", 64)),
        entry("name", STRING, text("llama")),
        entry("theta", 6, struct.pack("<f", 1e5)),
        entry("flag", 7, b"\1"),
        entry("tokens", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + text("é")),
        entry("types", ARRAY, struct.pack("<IQ3i", 5, 3, 1, -2, 3)),
    ]
    infos = [info("b", (2, 3), 0, 64), info("a", (2,), 0, 0)]
    data = FLOATS[:2].tobytes() + b"\0" * 56 + np.arange(6, dtype="<f4").tobytes()
    head = len(gguf(entries, infos, padding=b""))
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf(entries, infos, data, padding=b"\0" * (-head % 64)))
    loaded = weights.read(path, check_finite=True)
    assert {k: loaded.metadata[k] for k in ("name", "flag", "tokens")} == {
        "name": "llama",
        "flag": True,
        "tokens": ("a", "é"),
    }
    assert loaded.metadata["theta"] == 1e5
    np.testing.assert_array_equal(loaded.metadata["types"], [1, -2, 3])
    np.testing.assert_array_equal(loaded["a"], FLOATS[:2])
    np.testing.assert_array_equal(loaded["b"], [[0, 1, 2], [3, 4, 5]])


WHOLE = gguf(
    [entry("name", STRING, text("llama"))],
    [info("a", (2,), 0, 0), info("b", (2,), 0, 32)],
    FLOATS[:2].tobytes() + b"\0" * 24 + FLOATS[:2].tobytes(),
)
HOSTILE = {
    "big-endian": (gguf(version=3 << 24), "big-endian"),
    "version": (gguf(version=9), "version 9"),
    "tensors": (gguf(counts=(1 << 60, 0)), "claims 1152921504606846976 tensors"),
    "entries": (gguf(counts=(0, 1 << 60)), "entries of metadata"),
    "fewer": (gguf(counts=(1, 0), data=b"\0" * 8), "twice|end of the file|no tensor|axes"),
    "twice": (gguf([entry("a", 7, b"\1")] * 2), "'a' twice"),
    "tensor-twice": (gguf([], [info("a", (1,), 0, 0)] * 2, b"\0" * 4), "'a' twice"),
    "no-type": (gguf([entry("a", 13, b"\0" * 8)]), "type 13"),
    "boolean": (gguf([entry("a", 7, b"\2")]), "neither 0 nor 1"),
    "nested": (gguf([entry("a", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "type 9"),
    "long-array": (
        gguf([entry("a", ARRAY, struct.pack("<IQ", 4, 1 << 62))]),
        "beyond the end",
    ),
    "long-strings": (
        gguf([entry("a", ARRAY, struct.pack("<IQ", STRING, 1 << 62))]),
        "claims 4611686018427387904 strings",
    ),
    "long-string": (gguf([entry("a", STRING, struct.pack("<Q", 1 << 63))]), "beyond the end"),
    "not-utf8": (gguf([entry("a", STRING, struct.pack("<Q", 1) + b"\xff")]), "not UTF-8"),
    "axes": (gguf([], [info("a", (1,) * 9, 0, 0)], b"\0" * 4), "9 axes"),
    "size": (gguf([], [info("a", (1 << 62, 4), 0, 0)], b"\0" * 4), "no memory can hold"),
    "kind": (one("a", 12, b"\0" * 144, 256), "type Q4_K"),
    "unknown": (one("a", 77, b"\0" * 4, 1), "type 77"),
    "rows": (one("a", 2, b"\0" * 18, 31), "rows of 31"),
    "scalar": (gguf([], [info("a", (), 2, 0)], b"\0" * 18), "scalar"),
    "beyond": (one("a", 0, b"\0" * 4, 2), "beyond the end"),
    "far": (gguf([], [info("a", (1,), 0, (1 << 64) - 32)], b"\0" * 4), "beyond the end"),
    "overlap": (
        gguf([], [info("a", (2,), 0, 0), info("b", (2,), 0, 4)], b"\0" * 12),
        "'a' and 'b' overlap",
    ),
    "gap": (gguf([], [info("a", (1,), 0, 64)], b"\0" * 68), "no tensor has bytes"),
    "rest": (one("a", 0, b"\0" * 64, 1), "no tensor has the last 60"),
    "alignment": (
        gguf([entry("general.alignment", 4, struct.pack("<I", 0))]),
        "general.alignment is 0",
    ),
    "alignment-text": (
        gguf([entry("general.alignment", STRING, text("x"))]),
        "general.alignment is 'x'",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_damaged_files_are_refused(name, tmp_path):
    data, match = HOSTILE[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    refused(path, match)


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(WHOLE)
    weights.read(path)
    for size in range(4, len(WHOLE)):
        path.write_bytes(WHOLE[:size])
        with pytest.raises(weights.WeightsError):
            weights.read(path)


def test_flipped_bits_are_refused_or_read(tmp_path):
    """Nothing but a `WeightsError` comes out; values may differ where no structure does."""
    path = tmp_path / "x.gguf"
    for bit in range(32, 8 * len(WHOLE), 3):
        data = bytearray(WHOLE)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            dict(weights.read(path))
        except weights.WeightsError as error:
            assert re.search("x.gguf", str(error))


def test_the_reference_reads_the_same(tmp_path):
    reference = pytest.importorskip("gguf")
    path = tmp_path / "x.gguf"
    writer = reference.GGUFWriter(str(path), "llama")
    values = RANDOM.normal(size=(3, 64)).astype(np.float32)
    for name in ("Q4_0", "Q4_1", "Q8_0"):
        kind = reference.GGMLQuantizationType[name]
        writer.add_tensor(name, reference.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = weights.read(path)
    for tensor in reference.GGUFReader(str(path)).tensors:
        wanted = reference.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(loaded[tensor.name], wanted)
