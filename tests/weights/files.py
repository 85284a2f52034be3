"""Writers of small files of weights, right and wrong, byte by byte, and what refuses them."""

import io
import json
import pathlib
import pickle
import struct
import tracemalloc
import zipfile

import pytest

from distill_jax import weights
from distill_jax.weights import common

FIXTURES = pathlib.Path(__file__).parent / "fixtures"

MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."


def safetensors(header, data=b"", length=None):
    """A file of a header: a dict, or the text of one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin=0, end=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value):
    data = value.to_bytes(12, "little", signed=True)
    return b"\x8a\x0c" + data


def numbers(values):
    return b"(" + b"".join(map(integer, values)) + b"t"


def name(module, attribute):
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def storage(key="0", numel=4, kind=("torch", "FloatStorage"), view=b""):
    return (
        b"("
        + text("storage")
        + name(*kind)
        + text(key)
        + text("cpu")
        + integer(numel)
        + (view + b"tQ")
    )


def rebuilt(
    store=None,
    offset=0,
    shape=(4,),
    strides=(1,),
    hooks=b")",
    more=b"",
    function="_rebuild_tensor_v2",
):
    """The pickle of a tensor; `hooks` are the arguments of an OrderedDict."""
    return (
        name("torch._utils", function)
        + b"("
        + (storage() if store is None else store)
        + integer(offset)
        + numbers(shape)
        + numbers(strides)
        + b"\x89"
        + name("collections", "OrderedDict")
        + hooks
        + b"R"
        + more
        + b"tR"
    )


def state(**values):
    """The pickle of a dictionary of pickled values."""
    items = b"".join(text(key) + value for key, value in values.items())
    return b"\x80\x02}(" + items + b"u."


FOUR = struct.pack("<4f", 1, 2, 3, 4)


def pth(data, storages=None, compression=zipfile.ZIP_STORED, **records):
    """A zip archive as torch.save writes it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        for key, value in records.items():
            archive.writestr(f"archive/{key}", value)
        for key, value in ({"0": FOUR} if storages is None else storages).items():
            archive.writestr(f"archive/data/{key}", value)
    return stream.getvalue()


def legacy(data, storages=None, keys=None, little=True, version=1001):
    """A file as torch.save wrote it before PyTorch 1.6; each storage has elements and bytes."""
    storages = {"0": (4, FOUR)} if storages is None else storages
    info = {"protocol_version": 1001, "little_endian": little, "type_sizes": {"int": 4}}
    keys = list(storages) if keys is None else keys
    parts = [MAGIC, *(pickle.dumps(value, 2) for value in (version, info)), data]
    parts += [pickle.dumps(keys, 2)]
    parts += [struct.pack("<q", numel) + content for numel, content in storages.values()]
    return b"".join(parts)


def archive(entries, compression=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as target:
        for key, value in entries:
            target.writestr(key, value)
    return stream.getvalue()


def npy(descr="<f4", shape="(4,)", data=FOUR, order="False", version=b"\x01\x00"):
    header = f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + data


FACTOR = 32
"""Times its own size that a file may make the reader allocate, beyond `common.SLACK`."""


def refused(path, match):
    tracemalloc.start()
    try:
        with pytest.raises(weights.WeightsError, match=match) as error:
            found = weights.read(path)
            weights.summary(found)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = sum(part.stat().st_size for part in [path, *path.glob("*")] if part.is_file())
    assert peak <= FACTOR * size + common.SLACK, peak
    assert str(path.parent) in error.value.where
    assert "\x1b" not in str(error.value) and len(str(error.value)) < 1500
    return error.value
