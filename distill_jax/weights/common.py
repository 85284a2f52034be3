"""What the readers share: the error, the mapped file, the mapping that they return."""

import hashlib
import math
import mmap
import os
import pathlib
import reprlib
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from distill_jax.core.errors import UserError, nearest

SLACK = 1 << 20
"""Bytes that a file of any size may take beyond a multiple of its own size."""

EXPANSION = 16
"""Times the size of a file that its compressed entries may expand to."""

VIEWS = 64
"""Times the size of a file that views of its buffers may add up to."""

MAX_TENSORS = 200_000
"""Tensors of a file, which are described one by one: a second or two of Python."""

CHUNK = 1 << 20
"""Bytes that are checked at a time."""

MAX_DIMENSIONS = 64
"""Dimensions that NumPy allows."""


class WeightsError(UserError):
    """A file of weights that is damaged, refused, or of a format that is not read."""


class MissingTensor(WeightsError, KeyError):
    """A name that a file has no tensor of."""

    __str__ = Exception.__str__


class Spec(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class Entry(NamedTuple):
    """A tensor of a file: its description, and a function that loads it.

    Entries of one file with an equal `source` that is not None are one tensor of several names.
    """

    spec: Spec
    load: Callable[[], np.ndarray]
    source: tuple | None = None


class Weights(Mapping[str, np.ndarray]):
    """Tensors by name, as they are in a file.

    Arrays are read-only. Those of uncompressed files are views of the memory-mapped file, so the
    file must not be changed in place while they are in use.

    Attributes:
      path: the file or folder.
      format: "safetensors", "torch (zip)", "torch (legacy)" or "npz".
      metadata: what the file holds beside tensors: of safetensors the strings of `__metadata__`, of
        a PyTorch file its numbers, strings, booleans and None, and tuples of them, by dotted names.
      specs: shape and dtype of each tensor, known without loading it.
      tied: groups of names that stand for one tensor, for formats that keep this.
    """

    def __init__(
        self,
        path: pathlib.Path,
        format: str,
        entries: Mapping[str, Entry],
        metadata: Mapping[str, Any] | None = None,
    ):
        self.path, self.format = path, format
        self.metadata: Mapping[str, Any] = dict(metadata or {})
        self.specs: Mapping[str, Spec] = {name: entry.spec for name, entry in entries.items()}
        self._entries = dict(entries)
        groups: dict[tuple, list[str]] = {}
        for name, entry in entries.items():
            if entry.source is not None:
                groups.setdefault(entry.source, []).append(name)
        self.tied = tuple(tuple(names) for names in groups.values() if len(names) > 1)

    @property
    def entries(self) -> Mapping[str, Entry]:
        return self._entries

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._entries:
            hint = nearest(name, [shown(known) for known in self._entries][:1000])
            hint = hint if len(hint) < 300 else f"{hint[:300]}..."
            raise MissingTensor(f"has no tensor {shown(name)}", where=place(self.path), hint=hint)
        return self._entries[name].load()

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def nested(self, separator: str = "/") -> dict[str, Any]:
        """Returns nested dictionaries: the tensor `a/b` is `["a"]["b"]`.

        Raises:
          WeightsError: a name stands for a tensor and for a group of tensors.
        """
        tree: dict[str, Any] = {}
        for name in self:
            *groups, last = name.split(separator)
            node = tree
            for group in groups:
                node = node.setdefault(group, {})
                if not isinstance(node, dict):
                    break
            if not isinstance(node, dict) or last in node:
                raise WeightsError(
                    f"tensor {shown(name)} and another one are nested in each other",
                    where=place(self.path),
                    hint=f"another separator than {separator!r}",
                )
            node[last] = self[name]
        return tree

    def __repr__(self) -> str:
        return f"Weights({str(self.path)!r}, {self.format}, {len(self)} tensors)"


class File:
    """A regular file, memory-mapped for reading.

    Raises:
      WeightsError: it is absent, empty, not a regular file, or cannot be read.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise self.error("is not a regular file")
            with path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if not self.size:
                    raise self.error("is empty", "a file that was copied or downloaded completely")
                self.map = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise self.error("does not exist") from error
        except (OSError, ValueError) as error:
            raise self.error(
                f"cannot be read: {getattr(error, 'strerror', None) or error}"
            ) from error
        self.view = memoryview(self.map)

    def error(self, what: str, hint: str = "") -> WeightsError:
        return WeightsError(what, where=place(self.path), hint=hint)

    def bytes(self, start: int, end: int) -> bytes:
        return bytes(self.view[start:end])

    def chunks(self, start: int, end: int) -> Iterator[memoryview]:
        for at in range(start, end, CHUNK):
            yield self.view[at : min(at + CHUNK, end)]

    def crc32(self, start: int, end: int) -> int:
        value = 0
        for chunk in self.chunks(start, end):
            value = zlib.crc32(chunk, value)
        return value

    def check_sha256(self, wanted: str) -> None:
        """Compares the checksum of the whole file.

        Raises:
          WeightsError: it is another one, or `wanted` is not a SHA-256 in hexadecimal.
        """
        wanted = wanted.strip().lower()
        if len(wanted) != 64 or set(wanted) - set("0123456789abcdef"):
            raise self.error(f"sha256={shown(wanted)} is no SHA-256", "64 hexadecimal digits")
        digest = hashlib.sha256()
        for chunk in self.chunks(0, self.size):
            digest.update(chunk)
        if digest.hexdigest() != wanted:
            raise self.error(
                f"its SHA-256 is {digest.hexdigest()}, not {wanted}",
                "the file that the checksum was published for",
            )


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring = 3, 100
"""Writes nested containers briefly, however often or deeply they are nested."""


def shown(value: object, length: int = 100) -> str:
    """Returns a name or value as it can be printed on one line: escaped, quoted and cut."""
    text = value if isinstance(value, str) else _BRIEF.repr(value)
    cut = text[:length] + ("..." if len(text) > length else "")
    if isinstance(value, str):
        return f"'{cut}'" if cut.isprintable() else ascii(cut)
    return cut if cut.isprintable() else ascii(cut)


def place(path: pathlib.Path) -> str:
    """Returns a path as it can be printed on one line."""
    return str(path) if str(path).isprintable() else ascii(str(path))


def size_of(nbytes: int) -> str:
    """Returns a number of bytes with its unit, three digits."""
    if nbytes < 1024:
        return f"{nbytes} bytes" if nbytes != 1 else "1 byte"
    power = min((nbytes.bit_length() - 1) // 10, 4)
    value = nbytes / 1024**power if nbytes < 1 << 1000 else math.inf
    return f"{value:.3g} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"


def check_shape(shape: Sequence[Any], dtype: np.dtype, fail: Callable[[str], WeightsError]) -> Spec:
    """Returns the spec of a tensor after checking that such an array can exist.

    Args:
      shape: the shape in the file.
      dtype: of the elements.
      fail: makes the error of a message.
    """
    if not all(type(size) is int and size >= 0 for size in shape):
        raise fail(f"has the shape {shown(list(shape))}; sizes are integers from zero")
    if len(shape) > MAX_DIMENSIONS:
        raise fail(f"has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are possible")
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 1 << 62:
        raise fail(f"has the shape {shown(list(shape))}, which no memory can hold")
    return Spec(tuple(shape), dtype)


def check_booleans(values: np.ndarray, fail: Callable[[str], WeightsError]) -> None:
    """Refuses booleans whose bytes are neither 0 nor 1, which NumPy would not compute with."""
    if values.size and values.view(np.uint8).max() > 1:
        raise fail("has booleans that are neither 0 nor 1")


def array(
    spec: Spec, buffer: Any, offset: int = 0, strides: tuple[int, ...] | None = None
) -> np.ndarray:
    """Returns a read-only array over a buffer; `offset` and `strides` are in bytes."""
    if not spec.size:
        view = np.empty(spec.shape, spec.dtype)
    else:
        view = np.ndarray(spec.shape, spec.dtype, buffer, offset, strides)
    view.flags.writeable = False
    return view


FLOAT8 = {
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
