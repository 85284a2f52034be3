"""Reader of GGUF, the format of llama.cpp: metadata, and tensors whose blocks are expanded.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import functools
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from distill_jax.weights import common
from distill_jax.weights.common import File, Weights, WeightsError, shown, size_of

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32

MAX_STRINGS = 2_000_000
"""Strings in the arrays of the metadata; vocabularies and merges of tokenizers have fewer."""

_NUMBERS: Mapping[int, str] = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4"},
    **{6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"},
}
_STRING, _ARRAY = 8, 9


class _Kind(NamedTuple):
    """A type of tensors: elements and bytes of a block, and how blocks become numbers.

    `expand` takes bytes `[n, nbytes]` and returns `[n, elements]`; None for plain numbers.
    """

    name: str
    elements: int
    nbytes: int
    dtype: np.dtype
    expand: Callable[[np.ndarray], np.ndarray] | None = None


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(blocks: np.ndarray) -> np.ndarray:
    """Returns 32 numbers of 16 bytes: all low halves, then all high ones."""
    return np.concatenate([blocks & 15, blocks >> 4], axis=1)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * np.ascontiguousarray(blocks[:, 2:]).view(np.int8)


_FLOAT32 = np.dtype("<f4")
_KINDS: Mapping[int, _Kind] = {
    0: _Kind("F32", 1, 4, _FLOAT32),
    1: _Kind("F16", 1, 2, np.dtype("<f2")),
    30: _Kind("BF16", 1, 2, common.BFLOAT16),
    2: _Kind("Q4_0", 32, 18, _FLOAT32, _q4_0),
    3: _Kind("Q4_1", 32, 20, _FLOAT32, _q4_1),
    8: _Kind("Q8_0", 32, 34, _FLOAT32, _q8_0),
}
_OTHERS: Mapping[int, str] = {
    **{6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K"},
    **{14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"},
    **{20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32"},
    **{27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"},
}


def recognised(file: File) -> bool:
    return file.bytes(0, 4) == MAGIC


class _Cursor:
    """Reads numbers and strings one behind the other, within the file."""

    def __init__(self, file: File):
        self.file, self.at, self.strings = file, 4, 0

    def take(self, size: int, what: str) -> memoryview:
        if size > self.file.size - self.at:
            raise self.file.error(
                f"{what} of {size_of(size)} reaches beyond the end of the file",
                "a file that is not truncated",
            )
        self.at += size
        return self.file.view[self.at - size : self.at]

    def number(self, kind: str, what: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}"), what))[0]

    def text(self, what: str) -> str:
        data = bytes(self.take(self.number("Q", what), what))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.file.error(f"{what} is not UTF-8: {shown(data)}") from error

    def value(self, what: str) -> Any:
        kind = self.number("I", what)
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY:
            return self._numbers(kind, 1, what)[0].item()
        kind, count = self.number("I", what), self.number("Q", what)
        if kind == _STRING:
            if count > (self.file.size - self.at) // 8:  # each has a length of 8 bytes
                raise self.file.error(f"{what} claims {count} strings", "a file that has them")
            self.strings += count
            if self.strings > MAX_STRINGS:
                raise self.file.error(f"its metadata has more than {MAX_STRINGS:,} strings")
            return tuple(self.text(what) for _ in range(count))
        return self._numbers(kind, count, what)

    def _numbers(self, kind: int, count: int, what: str) -> np.ndarray:
        if kind not in _NUMBERS:
            raise self.file.error(f"{what} is of type {kind}, which is not read")
        dtype = np.dtype(_NUMBERS[kind])
        values = np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
        if dtype.kind == "b":
            common.check_booleans(values, lambda text: self.file.error(f"{what} {text}"))
        return values


def read(file: File) -> Weights:
    """Reads a GGUF file. Quantised tensors become float32 when they are looked up.

    `metadata` has the file's own: numbers, strings, tuples of strings, and arrays of numbers.

    Raises:
      WeightsError: it is damaged, or has a tensor of a type that is not read.
    """
    cursor = _Cursor(file)
    version = cursor.number("I", "its version")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        raise file.error(
            "is a big-endian GGUF file" if swapped else f"is GGUF of version {version}",
            "version 2 or 3, little-endian",
        )
    tensors, entries = (cursor.number("Q", "its header") for _ in range(2))
    most = common.MAX_TENSORS
    if tensors > min(most, file.size // 24) or entries > min(most, file.size // 12):
        raise file.error(f"claims {tensors} tensors and {entries} entries of metadata")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        name = cursor.text("a name of its metadata")
        if name in metadata:
            raise file.error(f"its metadata has the name {shown(name)} twice")
        metadata[name] = cursor.value(f"metadata {shown(name)}")
    infos = [_info(cursor) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
        raise file.error(f"general.alignment is {shown(alignment)}", "a number of bytes")
    start = -(-cursor.at // alignment) * alignment
    loaded: dict[str, common.Entry] = {}
    ranges = []
    for name, spec, kind, offset in infos:
        if name in loaded:
            raise file.error(f"has the tensor {shown(name)} twice")
        nbytes = spec.size // kind.elements * kind.nbytes
        begin, end = start + offset, start + offset + nbytes
        if end > file.size:
            raise file.error(
                f"tensor {shown(name)} reaches beyond the end of the file",
                "a file that is not truncated",
            )
        ranges.append((begin, end, name))
        load = functools.partial(_load, file, spec, kind, begin, end)
        loaded[name] = common.Entry(spec, load)
    _check_cover(file, sorted(ranges), start, alignment)
    return Weights(file.path, "gguf", loaded, metadata)


def _info(cursor: _Cursor) -> tuple[str, common.Spec, _Kind, int]:
    """Returns name, spec, type and offset of a tensor; sizes are stored from the last axis on."""
    name = cursor.text("the name of a tensor")

    def fail(what: str, hint: str = "") -> WeightsError:
        return cursor.file.error(f"tensor {shown(name)} {what}", hint)

    what = f"the header of tensor {shown(name)}"
    axes = cursor.number("I", what)
    if axes > 8:
        raise fail(f"has {axes} axes", "at most 8")
    shape = [cursor.number("Q", what) for _ in range(axes)][::-1]
    code, offset = cursor.number("I", what), cursor.number("Q", what)
    if code not in _KINDS:
        known = ", ".join(kind.name for kind in _KINDS.values())
        raise fail(f"is of type {_OTHERS.get(code, code)}, which is not read", f"one of {known}")
    kind = _KINDS[code]
    spec = common.check_shape(shape, kind.dtype, fail)
    if shape and shape[-1] % kind.elements:
        raise fail(f"has rows of {shape[-1]}, and blocks of {kind.name} have {kind.elements}")
    if not shape and kind.elements > 1:
        raise fail(f"is a scalar of type {kind.name}")
    return name, spec, kind, offset


def _check_cover(
    file: File, ranges: list[tuple[int, int, str]], start: int, alignment: int
) -> None:
    """Refuses tensors that overlap, and bytes between them that are more than alignment."""
    at, before = start, ""
    for begin, end, name in ranges:
        if begin < at and end > begin:
            raise file.error(f"tensors {shown(before)} and {shown(name)} overlap")
        if begin - at >= alignment:
            raise file.error(f"no tensor has bytes {at} to {begin}, before {shown(name)}")
        at, before = max(at, end), name
    if file.size - at >= alignment:
        raise file.error(f"no tensor has the last {file.size - at} bytes")


def _load(file: File, spec: common.Spec, kind: _Kind, begin: int, end: int) -> np.ndarray:
    if kind.expand is None:
        return common.array(spec, file.view, begin)
    blocks = np.frombuffer(file.view[begin:end], np.uint8).reshape(-1, kind.nbytes)
    with np.errstate(over="ignore", invalid="ignore"):  # of scales that are not finite
        values = kind.expand(blocks).astype(np.float32, copy=False).reshape(spec.shape)
    values.flags.writeable = False
    return values
