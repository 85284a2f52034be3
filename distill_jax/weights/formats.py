"""The door: recognises a file by its content, and hands it to the reader of its format."""

import os
import pathlib
from collections.abc import Mapping

from distill_jax.core.errors import nearest
from distill_jax.weights import archives, checks, common, gguf, npz, pytorch, safetensors
from distill_jax.weights.common import Entry, File, Weights, WeightsError, shown

INDEX = "model.safetensors.index.json"
_ORBAX = ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt")

_OTHERS: Mapping[bytes, tuple[str, str]] = {
    b"\x89HDF": ("an HDF5 file (Keras)", "its arrays saved by numpy.savez"),
    b"\x93NUMPY": ("a single array (.npy)", "numpy.savez(path, name=array)"),
    b"\x1f\x8b": ("a gzip file", "the file decompressed"),
    b"BZh": ("a bzip2 file", "the file decompressed"),
    b"\xfd7zXZ": ("an xz file", "the file decompressed"),
    b"(\xb5/\xfd": ("a zstd file", "the file decompressed"),
    b"7z\xbc\xaf": ("a 7z archive", "the file decompressed"),
    b"version https://git-lfs": ("a pointer of Git LFS, not the file itself", "git lfs pull"),
    b"<!DOCTYPE": ("a web page, not a file of weights", "another link to download from"),
    b"<html": ("a web page, not a file of weights", "another link to download from"),
    b"PK\5\6": ("an empty zip archive", "a file of weights"),
    b"\x80": ("a pickle that torch.save did not write", "tensors saved as safetensors or npz"),
}
_READ = "safetensors (a file, a folder or an index), .pth, .pt and .bin of PyTorch, or .npz"


def read(
    path: str | os.PathLike[str],
    *,
    sha256: str | Mapping[str, str] = "",
    check_finite: bool = False,
) -> Weights:
    """Reads a file or folder of weights. The format is recognised by the content.

    Nothing of a file is run. What is not compressed is memory-mapped.

    Args:
      path: a file of safetensors, PyTorch, NumPy (`.npz`) or llama.cpp (`.gguf`), an index of
        shards (`model.safetensors.index.json`), or a folder with an index or `.safetensors` files.
      sha256: the checksum that the file must have, in hexadecimal; for several files, one by each
        of their names.
      check_finite: whether NaN and infinite values are refused, see `checks.check_finite`.

    Returns:
      the tensors by name.

    Raises:
      WeightsError: the file is absent, damaged or refused; the message names it.
    """
    place = pathlib.Path(os.path.expanduser(path))
    if place.is_dir():
        weights = _read_folder(place, sha256)
    else:
        file = File(place)
        if _is_json(file):
            weights = _read_index(file, sha256)
        else:
            if not isinstance(sha256, str):
                sha256 = _of(place.name, sha256, place)
            weights = _read_file(file, sha256)
    if check_finite:
        checks.check_finite(weights)
    return weights


def _is_json(file: File) -> bool:
    """Whether a file is JSON, and not safetensors whose length begins with the byte of a brace."""
    return file.view[0] == ord("{") and int.from_bytes(file.bytes(0, 8), "little") > file.size


def _of(name: str, sha256: Mapping[str, str], place: pathlib.Path) -> str:
    if name not in sha256:
        what, hint = f"has no checksum for {shown(name)}", nearest(name, sha256)
        raise WeightsError(what, where=common.place(place), hint=hint)
    return sha256[name]


def _read_file(file: File, sha256: str) -> Weights:
    if sha256:
        file.check_sha256(sha256)
    if safetensors.recognised(file):
        return safetensors.read(file)
    if archives.recognised(file):
        members = archives.members(file)
        if pytorch.is_archive(members):
            return pytorch.read_archive(file, members)
        if npz.is_archive(members):
            return npz.read(file, members)
        raise file.error("is a zip archive, but neither of torch.save nor of numpy.savez", _READ)
    if gguf.recognised(file):
        return gguf.read(file)
    if pytorch.recognised(file):
        return pytorch.read_legacy(file)
    head = file.bytes(0, 32)
    for magic, (what, hint) in _OTHERS.items():
        if head.startswith(magic):
            raise file.error(f"is {what}", hint)
    if b"ustar" in file.bytes(0, 512):
        raise file.error("is a tar archive, which PyTorch wrote before 0.1.10", "the files in it")
    raise file.error("is of no format that is read", _READ)


def _read_folder(folder: pathlib.Path, sha256: str | Mapping[str, str]) -> Weights:
    def fail(what: str, hint: str) -> WeightsError:
        return WeightsError(what, where=common.place(folder), hint=hint)

    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise fail(f"cannot be read: {error}", "a folder that you may read") from error
    indices = [name for name in names if name.endswith(".safetensors.index.json")]
    shards = [name for name in names if name.endswith(".safetensors")]
    if len(indices) > 1 or (indices and INDEX.removesuffix(".index.json") in shards):
        whole = [name for name in shards if name == INDEX.removesuffix(".index.json")]
        raise fail(f"has several models: {', '.join(indices + whole)}", "the path of one of them")
    if indices:
        return _read_index(File(folder / indices[0]), sha256)
    if shards:
        return _merged(folder, {name: None for name in shards}, sha256, {})
    if any(name in names for name in _ORBAX) or "checkpoints" in names:
        raise fail(
            "is a checkpoint of Orbax or a run of distill_jax, which this reader leaves alone",
            "distill_jax.load(path), or the run as `init` of a role",
        )
    files = [name for name in names if name.endswith((".pth", ".pt", ".bin", ".npz", ".json"))]
    hint = f"the path of a file: {', '.join(files[:5])}" if files else _READ
    raise fail("is a folder without safetensors", hint)


def _read_index(file: File, sha256: str | Mapping[str, str]) -> Weights:
    """Reads the shards that an index names, each tensor from the one that it names for it."""
    if file.size > safetensors.MAX_HEADER:
        raise file.error("is too large for an index of shards")
    index = safetensors.parse_json(file, file.bytes(0, file.size), "the index")
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise file.error("is JSON without a weight_map", f"an index like {INDEX}")
    shards: dict[str, list[str]] = {}
    for name, shard in index["weight_map"].items():
        if not _is_name(shard):
            raise file.error(
                f"puts tensor {shown(name)} into {shown(shard)}", "names of files beside the index"
            )
        shards.setdefault(shard, []).append(name)
    if not shards:
        raise file.error("has an empty weight_map")
    metadata = index.get("metadata")
    return _merged(file.path, shards, sha256, metadata if isinstance(metadata, dict) else {})


def _refuse_link(folder: pathlib.Path, shard: str) -> None:
    """Refuses a shard that is a link out of its folder, other than in the cache of Hugging Face.

    There, `snapshots/<revision>/<file>` are links into `blobs`.
    """
    path, inside = folder / shard, folder.resolve()
    places = [inside]
    if inside.parent.name == "snapshots":
        places.append(inside.parent.parent / "blobs")
    try:
        if path.resolve().parent not in places:
            raise WeightsError(
                f"is a link out of its folder, to {shown(str(path.resolve()))}",
                where=common.place(path),
                hint="the file itself in place of the link",
            )
    except (OSError, RuntimeError, ValueError):  # a loop of links, or no path: opening it says so
        return


def _is_name(shard: object) -> bool:
    """Whether a value names a file of the same folder."""
    return (
        isinstance(shard, str)
        and shard not in ("", ".", "..")
        and len(shard) <= 255
        and not set(shard) & set("/\\\0")
    )


def _merged(
    place: pathlib.Path,
    shards: Mapping[str, list[str] | None],
    sha256: str | Mapping[str, str],
    metadata: dict,
) -> Weights:
    """Reads shards and checks that they have exactly the tensors that they should."""
    folder = place if place.is_dir() else place.parent
    if sha256 and isinstance(sha256, str) and len(shards) > 1:
        raise WeightsError(
            f"is of {len(shards)} files; one checksum cannot be that of all",
            where=common.place(place),
            hint=f"a checksum for each name: {', '.join(map(shown, [*shards][:3]))}",
        )
    entries: dict[str, Entry] = {}
    owners: dict[str, str] = {}
    format = ""
    for shard, names in shards.items():
        wanted = sha256 if isinstance(sha256, str) else _of(shard, sha256, place)
        _refuse_link(folder, shard)
        weights = _read_file(File(folder / shard), wanted)
        if len(entries) + len(weights) > common.MAX_TENSORS:
            what = f"has more than {common.MAX_TENSORS:,} tensors"
            raise WeightsError(what, where=common.place(place))
        listed = set(weights if names is None else names)
        extra = [name for name in weights if name not in listed]
        missing = [name for name in names or () if name not in weights]
        for what, which in (("lacks", missing), ("has, unlike the index,", extra)):
            if which:
                more = f" and {len(which) - 3} more" if len(which) > 3 else ""
                raise WeightsError(
                    f"{what} {', '.join(map(shown, which[:3]))}{more}",
                    where=common.place(folder / shard),
                    hint=f"the tensors that {place.name} names",
                )
        for name, entry in weights.entries.items():
            if name in entries:
                raise WeightsError(
                    f"tensor {shown(name)} is in {shown(owners[name])} and in {shown(shard)}",
                    where=common.place(place),
                    hint="an index that says which one counts, or the path of one file",
                )
            source = (shard, *entry.source) if entry.source is not None else None
            entries[name] = entry._replace(source=source)
            owners[name] = shard
        metadata = {**weights.metadata, **metadata}
        format = weights.format
    return Weights(place, format, entries, metadata)
