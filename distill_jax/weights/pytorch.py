"""Readers of what `torch.save` writes: zip archives, and the pickles of before PyTorch 1.6.

https://github.com/pytorch/pytorch/blob/main/torch/serialization.py
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from distill_jax.weights import archives, common, containers, pickles
from distill_jax.weights.common import File, Spec, Weights, shown, size_of

_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
_PROTOCOL = 1001
_TORCHSCRIPT = (
    "a TorchScript archive holds a program",
    "the state dict alone: torch.save(torch.jit.load(path).state_dict(), other)",
)

Buffer = Callable[[], memoryview]
"""Gives the bytes of a storage, little-endian."""


def is_archive(names: Mapping[str, Any]) -> bool:
    return any(name.endswith("/data.pkl") and name.count("/") == 1 for name in names)


def read_archive(file: File, members: Mapping[str, archives.Member]) -> Weights:
    """Reads a zip archive of `torch.save`.

    Raises:
      WeightsError: it is damaged, or holds anything but tensors in containers and plain values.
    """
    roots = [n.partition("/")[0] for n in members if n.endswith("/data.pkl") and n.count("/") == 1]
    if len(roots) > 1:
        raise file.error("has several pickles, where torch.save writes one")
    root = roots[0]
    if f"{root}/constants.pkl" in members:
        raise file.error(*_TORCHSCRIPT)
    order = "little"
    if f"{root}/byteorder" in members:
        order = bytes(members[f"{root}/byteorder"].head(16))
        if order not in (b"little", b"big"):
            raise file.error(f"has the byte order {shown(order)}", "little or big")
        order = order.decode()
    data = members[f"{root}/data.pkl"].content()
    value, used = pickles.Machine(data, file.error).run()
    if used < len(data):
        raise file.error(f"has {len(data) - used} bytes behind its pickle")

    def buffer(storage: pickles.Storage) -> Buffer:
        if storage.root is not None:
            raise file.error(f"storage {shown(storage.key)} is a view, which zip archives lack")
        member = members.get(f"{root}/data/{storage.key}")
        nbytes = storage.numel * storage.itemsize
        if member is None:
            if nbytes:
                raise file.error(f"has no entry {shown(f'{root}/data/{storage.key}')}")
            return lambda: memoryview(b"")
        if not nbytes <= member.size < nbytes + storage.itemsize:
            raise member.error(f"has {member.size} bytes, its storage takes {nbytes}")
        return functools.cache(member.content)

    return _weights(
        file,
        "torch (zip)",
        containers.flatten(value, len(data), file.error),
        buffer,
        swapped=order == "big",
    )


def recognised(file: File) -> bool:
    head = file.bytes(0, 2 + len(_MAGIC))
    return head[:1] == b"\x80" and head[2:] == _MAGIC


def read_legacy(file: File) -> Weights:
    """Reads the format before PyTorch 1.6: pickles, one behind the other, then the storages.

    Raises:
      WeightsError: it is damaged, or holds anything but tensors in containers and plain values.
    """
    at = 0

    def load() -> tuple[Any, int]:
        nonlocal at
        value, used = pickles.Machine(file.view[at:], file.error).run()
        at += used
        return value, used

    load()
    if load()[0] != _PROTOCOL:
        raise file.error("is of an unknown version of the format before PyTorch 1.6")
    info, _ = load()
    if not isinstance(info, dict) or info.get("little_endian") is not True:
        raise file.error(
            "was written on a big-endian machine in the format before PyTorch 1.6",
            "saved again by PyTorch 1.6 or later",
        )
    value, used = load()
    keys, _ = load()
    leaves = containers.flatten(value, used, file.error)
    declared: dict[str, tuple[int, int]] = {}
    for leaf in leaves.values():
        if isinstance(leaf, pickles.Tensor):
            s = leaf.storage
            numel = s.numel if s.root is None else s.root
            if declared.setdefault(s.key, (numel, s.itemsize)) != (numel, s.itemsize):
                raise file.error(f"storage {shown(s.key)} is described in two ways")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise file.error("its list of storages is none")
    if len(set(keys)) < len(keys) or set(keys) - set(declared) or set(declared) - set(keys):
        raise file.error("its list of storages is not that of its tensors")
    starts = {}
    for key in keys:
        numel, itemsize = declared[key]
        if at + 8 + numel * itemsize > file.size:
            raise file.error(
                f"storage {shown(key)} reaches beyond the end of the file",
                "a file that is not truncated",
            )
        if int.from_bytes(file.bytes(at, at + 8), "little") != numel:
            raise file.error(f"storage {shown(key)} has two sizes")
        starts[key] = at + 8
        at += 8 + numel * itemsize
    if at < file.size:
        raise file.error(f"has {file.size - at} bytes behind its storages")

    def buffer(storage: pickles.Storage) -> Buffer:
        start = starts[storage.key] + storage.offset * storage.itemsize
        return lambda: file.view[start : start + storage.numel * storage.itemsize]

    return _weights(file, "torch (legacy)", leaves, buffer, swapped=False)


def _weights(
    file: File,
    format: str,
    leaves: Mapping[str, Any],
    buffer: Callable[[pickles.Storage], Buffer],
    *,
    swapped: bool,
) -> Weights:
    entries: dict[str, common.Entry] = {}
    metadata: dict[str, Any] = {}
    storages: dict[str, pickles.Storage] = {}
    buffers: dict[tuple, Buffer] = {}
    total = 0
    for name, leaf in leaves.items():
        if not isinstance(leaf, pickles.Tensor):
            metadata[name] = leaf
            continue
        storage = leaf.storage

        def fail(what: str, hint: str = "", name: str = name) -> common.WeightsError:
            return file.error(f"tensor {shown(name)} {what}", hint)

        known = storages.setdefault(storage.key, storage)
        if (known.dtype, known.root or known.numel) != (
            storage.dtype,
            storage.root or storage.numel,
        ):
            raise fail(f"describes storage {shown(storage.key)} in another way than before")
        spec = common.check_shape(leaf.shape, leaf.dtype, fail)
        room = storage.numel * storage.itemsize // leaf.dtype.itemsize
        _check_place(leaf, spec, room, fail)
        total += spec.nbytes
        if total > common.VIEWS * file.size + common.SLACK:
            raise file.error(
                f"its tensors add up to more than {size_of(total)} of {size_of(file.size)}",
                "tensors saved after .contiguous()",
            )
        place = (storage.key, storage.offset, storage.numel)
        key = (*place, leaf.dtype.itemsize)
        if key not in buffers:
            buffers[key] = buffer(storage)
            if swapped and leaf.dtype.itemsize > 1:
                buffers[key] = functools.cache(
                    functools.partial(_swapped, buffers[key], _part(leaf.dtype))
                )
        load = functools.partial(_load, spec, buffers[key], leaf)
        if leaf.dtype == bool:
            common.check_booleans(load(), fail)
        source = (*place, leaf.offset, leaf.shape, leaf.strides, leaf.dtype)
        entries[name] = common.Entry(spec, load, source)
    return Weights(file.path, format, entries, metadata)


def _check_place(
    leaf: pickles.Tensor, spec: Spec, room: int, fail: Callable[..., common.WeightsError]
) -> None:
    if not spec.size:
        return
    last = leaf.offset + sum((n - 1) * s for n, s in zip(leaf.shape, leaf.strides, strict=True))
    if last >= room:
        raise fail(
            f"reaches element {last} of storage {shown(leaf.storage.key)}, which has {room}",
            "a file that is not damaged",
        )


def _part(dtype: np.dtype) -> int:
    """Returns the bytes of a number of a dtype: a complex one has two."""
    return dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize


def _swapped(buffer: Buffer, size: int) -> memoryview:
    data = buffer()
    whole = np.frombuffer(data, f">u{size}", len(data) // size).astype(f"<u{size}")
    return whole.view(np.uint8).data.toreadonly()


def _load(spec: Spec, buffer: Buffer, leaf: pickles.Tensor) -> np.ndarray:
    size = spec.dtype.itemsize
    strides = tuple(s * size if n > 1 else 0 for n, s in zip(leaf.shape, leaf.strides, strict=True))
    return common.array(spec, buffer(), leaf.offset * size, strides)
