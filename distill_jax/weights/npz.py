"""Reader of `.npz` archives, without pickles.

https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

import functools
import re
from collections.abc import Mapping

import numpy as np

from distill_jax.weights import archives, common
from distill_jax.weights.common import File, Spec, Weights, shown

_MAGIC = b"\x93NUMPY"
_HEADER = re.compile(
    r"\{'descr': '([^']*)', 'fortran_order': (True|False), 'shape': \(([\dL, ]*)\),? *\}\s*"
)
_MAX_HEADER = 4096
_DTYPE = re.compile(r"[<>|=]?([fiucb])(\d+)")
_SIZES = {"f": (2, 4, 8), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "c": (8, 16), "b": (1,)}


def is_archive(names: Mapping[str, archives.Member]) -> bool:
    return bool(names) and all(name.endswith(".npy") for name in names)


def read(file: File, members: Mapping[str, archives.Member]) -> Weights:
    """Reads an archive of arrays.

    Two-byte void arrays are bfloat16: NumPy stores it so, and big_vision reads it so.

    Raises:
      WeightsError: an array is damaged, of another dtype than numbers and booleans, or a pickle.
    """
    entries = {}
    for member in members.values():
        name = member.name.removesuffix(".npy")
        spec, stored, order, start = _header(member)
        load = functools.partial(_load, member, spec, stored, order, start)
        if spec.dtype == bool:
            common.check_booleans(
                load(), lambda what, name=name: file.error(f"array {shown(name)} {what}")
            )
        entries[name] = common.Entry(spec, load)
    return Weights(file.path, "npz", entries)


def _header(member: archives.Member) -> tuple[Spec, np.dtype, str, int]:
    """Returns the spec of an array, its dtype as stored, its order, and where its data begins."""
    head = member.head(12 + _MAX_HEADER)
    if head[:6] != _MAGIC or len(head) < 10 or head[6] not in (1, 2):
        raise member.error("is no array of NumPy (.npy, version 1 or 2)")
    start = 10 if head[6] == 1 else 12
    length = int.from_bytes(head[8:start], "little")
    if length > _MAX_HEADER or start + length > len(head):
        raise member.error(f"has a header that claims {length} bytes")
    text = head[start : start + length].decode("latin1")
    if "'|O'" in text or "'O'" in text:
        raise member.error(
            "is an array of objects: a pickle, which is refused", "arrays of numbers"
        )
    match = _HEADER.fullmatch(text)
    if match is None:
        raise member.error(f"has the header {shown(text)}", "an array of numbers saved by NumPy")
    stored, dtype = _dtype(match[1], member)
    sizes = [size.strip().removesuffix("L") for size in match[3].split(",")]
    if sizes[-1] == "":
        sizes.pop()
    if not all(re.fullmatch(r"\d{1,20}", size) for size in sizes):
        raise member.error(f"has the shape ({shown(match[3])[1:-1]})")
    spec = common.check_shape(list(map(int, sizes)), dtype, member.error)
    if start + length + spec.nbytes != member.size:
        raise member.error(
            f"has {member.size - start - length} bytes of data, its shape {spec.shape} of "
            f"{dtype} takes {spec.nbytes}"
        )
    return spec, stored, "F" if match[2] == "True" else "C", start + length


def _dtype(text: str, member: archives.Member) -> tuple[np.dtype, np.dtype]:
    """Returns a dtype as stored and as read."""
    if text in ("|V2", "<V2", "V2"):
        return common.BFLOAT16, common.BFLOAT16
    match = _DTYPE.fullmatch(text)
    if match is None or int(match[2]) not in _SIZES[match[1]]:
        raise member.error(f"has the dtype {shown(text)}, which is not read", "numbers or booleans")
    stored = np.dtype(text)
    return stored, stored.newbyteorder("<")


def _load(
    member: archives.Member, spec: Spec, stored: np.dtype, order: str, start: int
) -> np.ndarray:
    shape = spec.shape if order == "C" else spec.shape[::-1]
    loaded = common.array(Spec(shape, stored), member.content(), start)
    loaded = loaded if order == "C" else loaded.T
    if stored != spec.dtype:
        loaded = loaded.astype(spec.dtype)
        loaded.flags.writeable = False
    return loaded
