"""Safetensors: a length, a JSON header, and one buffer that tensors cover exactly.

https://github.com/huggingface/safetensors#format
"""

import functools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from distill_jax.weights import common
from distill_jax.weights.common import File, Weights, WeightsError, shown, size_of

MAX_HEADER = 100_000_000
"""Bytes that the reference implementation allows."""

DTYPES = {
    "BOOL": np.dtype("bool"),
    **{
        f"{kind}{bits}": np.dtype(f"<{low}{bits // 8}")
        for kind, low in (("I", "i"), ("U", "u"))
        for bits in (8, 16, 32, 64)
    },
    **{f"F{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
    "C64": np.dtype("<c8"),
    "BF16": common.BFLOAT16,
    "F8_E4M3": np.dtype(common.FLOAT8["float8_e4m3fn"]),
    "F8_E5M2": np.dtype(common.FLOAT8["float8_e5m2"]),
    "F8_E8M0": np.dtype(common.FLOAT8["float8_e8m0fnu"]),
    "F8_E4M3FNUZ": np.dtype(common.FLOAT8["float8_e4m3fnuz"]),
    "F8_E5M2FNUZ": np.dtype(common.FLOAT8["float8_e5m2fnuz"]),
}


class _Duplicate(ValueError):
    pass


def parse_json(file: File, data: bytes, what: str) -> Any:
    """Parses JSON of a file, within a multiple of its size.

    Raises:
      WeightsError: it is not JSON, has a name twice, or is made of too many small parts.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            seen: set[str] = set()
            raise _Duplicate(next(n for n, _ in pairs if n in seen or seen.add(n)))
        return content

    # A list or an object takes up to 64 bytes of memory and two of JSON. The header of a tensor
    # has three in 50 bytes.
    parts = data.count(b"[") + data.count(b"{")
    if parts > 3 * common.MAX_TENSORS or (len(data) > 1 << 16 and parts > len(data) // 8):
        raise file.error(f"{what} has more lists and objects than one of tensors can have")
    try:
        return json.loads(data.decode(), object_pairs_hook=unique)
    except _Duplicate as error:
        raise file.error(
            f"{what} has the name {shown(str(error))} twice", "each name once"
        ) from error
    except (ValueError, RecursionError) as error:
        raise file.error(
            f"{what} is not JSON: {shown(str(error))[1:-1]}",
            "a file that is complete and undamaged",
        ) from error


def recognised(file: File) -> bool:
    return file.size > 8 and file.view[8] == ord("{")


def read(file: File) -> Weights:
    """Reads a safetensors file.

    Raises:
      WeightsError: its header or its offsets are not those of a safetensors file.
    """
    length = int.from_bytes(file.bytes(0, 8), "little")
    if length > MAX_HEADER:
        raise file.error(
            f"its safetensors header claims {size_of(length)}", f"at most {size_of(MAX_HEADER)}"
        )
    if 8 + length > file.size:
        raise file.error(
            f"its safetensors header claims {size_of(length)}, the file has {size_of(file.size)}",
            "a file that is not truncated",
        )
    start = 8 + length
    header = parse_json(file, file.bytes(8, start), "its safetensors header")
    if not isinstance(header, dict):
        raise file.error("its safetensors header is no JSON object")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise file.error("its __metadata__ is not an object of strings")
    entries, ranges = {}, []
    for name, info in header.items():
        spec, begin, end = _info(file, name, info, file.size - start)
        ranges.append((begin, end, name))
        load = functools.partial(common.array, spec, file.view, start + begin)
        if spec.dtype == bool:
            common.check_booleans(
                load(), lambda what, name=name: file.error(f"tensor {shown(name)} {what}")
            )
        entries[name] = common.Entry(spec, load)
    _check_cover(file, ranges, file.size - start)
    return Weights(file.path, "safetensors", entries, metadata)


def _info(file: File, name: str, info: Any, size: int) -> tuple[common.Spec, int, int]:
    """Returns the spec of a tensor and where it begins and ends in the buffer."""

    def fail(what: str, hint: str = "") -> WeightsError:
        return file.error(f"tensor {shown(name)} {what}", hint)

    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        raise fail("is described by something else than dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise fail(
            f"has the dtype {shown(dtype)}, which is not read", f"one of {', '.join(DTYPES)}"
        )
    if not isinstance(shape, list):
        raise fail(f"has the shape {shown(shape)}, which is no list")
    spec = common.check_shape(shape, DTYPES[dtype], fail)
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(offset) is int for offset in offsets)
        or not 0 <= offsets[0] <= offsets[1] <= size
    ):
        raise fail(
            f"has the offsets {shown(offsets)} in a buffer of {size} bytes",
            "a file that is not truncated, with 0 <= begin <= end <= size",
        )
    begin, end = offsets
    if end - begin != spec.nbytes:
        raise fail(
            f"has {end - begin} bytes, its shape {shown(shape)} of {dtype} takes {spec.nbytes}"
        )
    return spec, begin, end


def _check_cover(file: File, ranges: list[tuple[int, int, str]], size: int) -> None:
    """Refuses tensors that overlap or leave bytes of the buffer out, as the format does."""
    at, before = 0, ""
    for begin, end, name in sorted(ranges):
        if begin < at:
            raise file.error(f"tensors {shown(before)} and {shown(name)} overlap")
        if begin > at:
            raise file.error(f"no tensor has bytes {at} to {begin}, before {shown(name)}")
        if end > begin:
            at, before = end, name
    if at < size:
        raise file.error(f"no tensor has the last {size - at} bytes")


def parts(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes]:
    """Yields a safetensors file: its header, and one tensor after the other.

    Args:
      tensors: arrays by name.
      metadata: text by name, the file's `__metadata__`.

    Raises:
      WeightsError: an array of a dtype that the format lacks.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    # Wide types first, so that every tensor is aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in order:
        dtype = tensors[name].dtype.newbyteorder("<")
        if dtype not in names:
            raise WeightsError(
                f"safetensors holds no {dtype}, the dtype of {shown(name)}",
                hint=f"one of {', '.join(DTYPES)}",
            )
        end = at + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        x = np.asarray(tensors[name])
        yield x.astype(x.dtype.newbyteorder("<"), copy=False).tobytes()


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes `parts` to a file. One of this name is replaced when the new one is complete.

    Raises:
      WeightsError: an array of a dtype that the format lacks, or a file that cannot be written.
    """
    place = pathlib.Path(path)
    part = place.with_name(f"{place.name}.part")
    try:
        with part.open("wb") as file:
            file.writelines(parts(tensors, metadata))
        part.replace(place)
    except OSError as error:
        raise WeightsError(
            f"cannot be written: {error.strerror or error}", where=common.place(place)
        ) from error
