"""The folder of one saved step: sealed with checksums, verified before it is read, removed whole.

    meta/            JSON beside the state, and the step
    role.<name>/     a network, as Orbax writes it
    optimizer/       step and state of the optimizer
    memory/          of the objective, where there is any
    digest.json      checksums of every file, written last

Networks are separate items, so that a teacher or a backbone is read without knowing the optimizer
that trained it. Orbax loads flipped bytes without an error, so every file has a checksum. A folder
without `digest.json` does not count: it was interrupted, or has lost it where `index.json` lists
the step among those that were saved to their end. Needs no JAX.
"""

import contextlib
import hashlib
import json
import math
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

from distill_jax.core.errors import CheckpointError
from distill_jax.trainer.io.files import (
    NUMBER,
    NUMBERS,
    DamagedFile,
    MissingFile,
    Shape,
    mismatch,
    parse_json,
    read_bytes,
    read_json,
)

CHECKSUMS = "digest.json"
META = "meta/metadata"
ROLE = "role."

_STEP_ITEM = re.compile(
    r"(role\..+|optimizer|memory|meta|_CHECKPOINT_METADATA|commit_success\.txt|digest\.json)"
    r"(\.tmp.*|\.orbax-checkpoint-tmp.*)?"
)

_TEXT = (str, type(None))
SIGNATURE: Shape = {
    "networks": {"*": {"model": str, "kwargs": Mapping}},
    "classes": [str],
    "cardinalities": list,
    "statistics?": (list, type(None)),
    "cards?": {"*": Mapping},
    "task?": str,
    "image_size": object,
    "input": object,
}
"""Configuration of a network and its inputs; only the types that are read."""

INPUTS: Shape = {
    "data?": {"*": {"n?": NUMBER, "sha256?": _TEXT, "origin?": _TEXT}},
    "networks?": {"*": _TEXT},
}
"""Checksums of the data and of the initial networks of a run."""

META_PARTS: Shape = {
    "metric": (*NUMBER, type(None)),
    "config": Mapping,
    "inputs": (Mapping, type(None)),
    "signature": SIGNATURE,
    "environment": (Mapping, type(None)),
    "seconds": NUMBER,
    "skipped": int,
    "metrics": NUMBERS,
    "unlogged": list,
    "first_spread": NUMBERS,
}
"""Metadata that may be stored with the state of a step and its number."""


def _hash_files(folder: pathlib.Path) -> dict[str, str]:
    checksums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != CHECKSUMS:
            with path.open("rb") as f:
                checksum = hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16))
            checksums[str(path.relative_to(folder))] = checksum.hexdigest()
    return checksums


def seal(folder: pathlib.Path) -> None:
    """Writes the checksum of every file of a finished folder, for `verify`."""
    temporary = folder / (CHECKSUMS + ".tmp")
    temporary.unlink(missing_ok=True)
    temporary.write_text(json.dumps(_hash_files(folder), indent=1))
    temporary.rename(folder / CHECKSUMS)


def verify(folder: pathlib.Path) -> None:
    """Raises `CheckpointError` unless every file of a step is unchanged and inside its folder."""
    _check_layout(folder)
    try:
        stored = read_json(folder / CHECKSUMS)
    except MissingFile as e:
        raise CheckpointError("was not written completely", where=str(folder)) from e
    except DamagedFile as e:
        raise CheckpointError(f"{CHECKSUMS} is damaged: {e.what}", where=str(folder)) from e
    files = _hash_files(folder)
    bad = sorted(n for n in stored.keys() | files.keys() if stored.get(n) != files.get(n))
    if bad:
        raise CheckpointError(
            f"{len(bad)} of {len(stored)} files differ from what was written: {bad[0]}",
            where=str(folder),
        )


def _check_layout(folder: pathlib.Path) -> None:
    """Raises `CheckpointError` if arrays would be read from outside a step.

    Symbolic links may lead out of it. So may the names of arrays, which are stored, where each
    array is a folder of that name. In an OCDBT database, which `save` writes, they are keys, and
    TensorStore refuses references with ".." or an absolute path.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(
                f"{path.relative_to(folder)} is a symbolic link that leads out of the step",
                where=str(folder),
                hint="put a copy of the file in place of the link",
            )
    for path in sorted(folder.glob("*/_METADATA")):
        try:
            in_database = read_json(path, shape={"use_ocdbt": bool})["use_ocdbt"]
        except DamagedFile as e:
            raise CheckpointError(f"cannot be read: {e}", where=str(folder)) from e
        if not in_database:
            raise CheckpointError(
                f"{path.relative_to(folder)}: arrays are not stored as this program stores them",
                where=str(folder),
            )


def read_meta(step: pathlib.Path) -> Mapping[str, Any]:
    """Returns the metadata of a step.

    Raises:
      CheckpointError: the metadata has changed since it was written, or is of another step.
    """
    try:
        data = read_bytes(step / META)
        written = read_json(step / CHECKSUMS).get(META)
        if hashlib.blake2b(data, digest_size=16).hexdigest() != written:
            raise CheckpointError(f"{META} differs from what was written", where=str(step))
        meta = parse_json(data, step / META, shape={"step": int}, optional=META_PARTS)
        if what := wrong_values(meta):
            raise DamagedFile(what, where=str(step / META))
    except DamagedFile as e:
        raise CheckpointError(f"cannot be read: {e}", where=str(step)) from e
    if step_number(step.name) not in (None, meta["step"]):
        raise CheckpointError(f"holds the state of step {meta['step']}", where=str(step))
    return meta


def wrong_values(meta: Mapping[str, Any]) -> str:
    """Returns a description of invalid values in metadata of the right types, empty if none."""
    metric, signature = meta.get("metric"), meta.get("signature", {})
    statistics = signature.get("statistics")
    checks = {
        "metric": metric is None or not math.isnan(metric),
        "skipped": meta.get("skipped", 0) >= 0,
        "unlogged": all(map(_is_row, meta.get("unlogged", ()))),
        "signature.cardinalities": _are_numbers(signature.get("cardinalities", [])),
        "signature.statistics": statistics is None
        or (len(statistics) == 2 and _are_numbers(statistics)),
    }
    wrong = [f"{name!r} holds no such values" for name, is_valid in checks.items() if not is_valid]
    return wrong[0] if wrong else mismatch(meta.get("inputs") or {}, INPUTS, "inputs")


def _is_row(value: Any) -> bool:
    """Whether a value is `[name, [number, ...]]`."""
    return (
        isinstance(value, list)
        and [type(part) for part in value] == [str, list]
        and not mismatch(value[1], [NUMBER])
    )


def _are_numbers(value: Any) -> bool:
    """Whether a value is a number or nested lists of numbers."""
    if isinstance(value, list):
        return all(map(_are_numbers, value))
    return not mismatch(value, NUMBER)


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the config of the run that wrote a step, with the groups `roles` and `data`.

    Raises:
      CheckpointError: it is not as it was written, or of another shape.
    """
    config = read_meta(folder).get("config")
    for name in ("roles", "data"):
        if not isinstance(config, dict) or not isinstance(config.get(name), dict):
            raise CheckpointError(f"{META} holds no config with {name!r}", where=str(folder))
    return config


def step_number(name: str) -> int | None:
    """Returns the step number in the name of a folder, None for any other name."""
    return int(name) if re.fullmatch(r"0|[1-9][0-9]{0,17}", name) else None


def not_of_step(path: pathlib.Path) -> pathlib.Path | None:
    """Returns a file in the folder of a step not written by this program, None if there is none."""
    if not path.is_dir() or path.is_symlink():
        return path
    others = (p for p in sorted(path.iterdir()) if not _STEP_ITEM.fullmatch(p.name))
    return next(others, None)


def is_step(path: pathlib.Path) -> bool:
    """Whether a folder is a step of this program, finished or not, and nothing else."""
    return not_of_step(path) is None


def remove_step(path: pathlib.Path) -> None:
    """Deletes a step; if interrupted, the remains do not count as a step.

    Files not written by this program are kept, and so is the folder that contains them.
    """
    (path / CHECKSUMS).unlink(missing_ok=True)
    for item in path.iterdir() if path.is_dir() else ():
        if _STEP_ITEM.fullmatch(item.name):
            if item.is_dir():
                shutil.rmtree(item, ignore_errors=True)
            else:
                item.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.rmdir()
