"""The folder of stored outputs of a role: chunks of rows, written atomically, verified on read."""

import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core.api import Role
from distill_jax.core.errors import ArgumentError, CheckpointError
from distill_jax.trainer.io import peers
from distill_jax.trainer.io.files import DamagedFile, MissingFile, read_json, write_text
from distill_jax.trainer.io.paths import check_folder
from distill_jax.trainer.io.step_folder import seal, verify
from distill_jax.trainer.io.teacher_cache.plan import StoredOutputs

CHUNK_BYTES = 2**25
"""Approximate size of a chunk."""


CLEAR = "delete this folder; the next run fills it again"

_ABSENT = object()


class Store:
    """The rows of one role on disk.

    Args:
      folder: of the role.
      fields: shapes of a stored batch.
      n: examples.
      chunk: rows of a chunk.
    """

    def __init__(self, folder: pathlib.Path, fields: Mapping[str, Any], *, n: int, chunk: int):
        self.folder, self.fields, self.n, self.chunk = folder, fields, n, chunk
        self._open: dict[tuple[int, int], StoredOutputs] = {}

    @property
    def chunks(self) -> int:
        return -(-self.n // self.chunk)

    def missing(self, views: int) -> list[tuple[int, int]]:
        """Returns (view, chunk) of the missing chunks."""
        every = [(view, chunk) for view in range(views) for chunk in range(self.chunks)]
        return [place for place in every if not self.path(*place).exists()]

    def path(self, view: int, chunk: int) -> pathlib.Path:
        return self.folder / f"{view:05d}-{chunk:05d}"

    def positions(self, chunk: int) -> np.ndarray:
        """Returns the examples of a chunk."""
        return np.arange(chunk * self.chunk, min(self.n, (chunk + 1) * self.chunk))

    def write(self, view: int, chunk: int, rows: StoredOutputs) -> None:
        """Writes a chunk atomically."""
        path = self.path(view, chunk)
        beside = pathlib.Path(tempfile.mkdtemp(prefix=f"{path.name}.", dir=self.folder))
        for name, values in rows.items():
            np.save(beside / f"{name}.npy", values.view(_stored(values.dtype)))
        seal(beside)
        if path.exists():  # another run wrote the same rows first
            shutil.rmtree(beside)
        else:
            os.replace(beside, path)

    def read(self, view: int, position: np.ndarray) -> dict[str, np.ndarray]:
        """Returns rows of a view, in the order of `position`.

        Raises:
          CheckpointError: a file has changed since it was written.
        """
        chunk, offset = np.divmod(position, self.chunk)
        if len(position) and (chunk == chunk[0]).all():
            return {n: np.asarray(x[offset]) for n, x in self._load(view, int(chunk[0])).items()}
        rows = {n: np.empty((len(position), *s.shape[1:]), s.dtype) for n, s in self.fields.items()}
        for c in np.unique(chunk):
            here = chunk == c
            for name, values in self._load(view, int(c)).items():
                rows[name][here] = values[offset[here]]
        return rows

    def _load(self, view: int, chunk: int) -> StoredOutputs:
        if (view, chunk) not in self._open:
            path = self.path(view, chunk)
            try:
                verify(path)
            except CheckpointError as error:
                raise CheckpointError(error.what, where=str(path), hint=CLEAR) from None
            rows = len(self.positions(chunk))
            self._open[view, chunk] = {n: self._array(path, n, rows) for n in self.fields}
        return self._open[view, chunk]

    def _array(self, path: pathlib.Path, name: str, rows: int) -> np.ndarray:
        wanted = self.fields[name]
        try:
            array = np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            what = f"{name}.npy cannot be read: {error}"
            raise CheckpointError(what, where=str(path), hint=CLEAR) from error
        expected = jax.ShapeDtypeStruct((rows, *wanted.shape[1:]), _stored(wanted.dtype))
        if (array.shape, array.dtype) != (expected.shape, expected.dtype):
            what = f"{name}.npy holds {array.dtype}{array.shape}, not {expected}"
            raise CheckpointError(what, where=str(path), hint=CLEAR)
        return array.view(wanted.dtype)


def _stored(dtype: np.dtype) -> np.dtype:
    """The type of a file: .npy has no bfloat16."""
    return np.dtype(np.uint16) if dtype == jnp.bfloat16 else dtype


class TeacherOutputs:
    """Stored outputs of all cached roles, for the loaders; `views` of each example."""

    def __init__(self, stores: Mapping[Role, Store], *, views: int):
        self._stores, self.views = stores, views

    def view(self, epoch: Any) -> Any:
        """Returns the view that an epoch uses."""
        return epoch % self.views

    def read(self, epoch: np.ndarray, position: np.ndarray) -> dict[Role, dict[str, np.ndarray]]:
        """Returns fields `[b, ...]` by role for examples of one or more epochs, int `[b]` both."""
        views = self.view(epoch)
        present = np.unique(views)
        outputs: dict[Role, dict[str, np.ndarray]] = {}
        for role, store in self._stores.items():
            outputs[role] = rows = store.read(int(present[0]), position)
            for view in present[1:]:
                later = views == view
                for name, values in store.read(int(view), position[later]).items():
                    rows[name][later] = values
        return outputs


def open_store(
    folder: pathlib.Path,
    key: Mapping[str, Any],
    fields: Mapping[str, Any],
    n: int,
    *,
    where: str = "folder",
) -> Store:
    """Opens or creates the folder of a role.

    Args:
      folder: folder of the role.
      key: everything that determines the outputs, JSON-like.
      fields: shapes of a stored batch.
      n: examples.
      where: the argument or config path to name in errors.

    Raises:
      ArgumentError: it contains outputs for a different key; the message lists the differences.
    """
    path = folder / "key.json"
    row = sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in fields.values())
    fresh = {"key": key, "chunk": max(1, CHUNK_BYTES // row)}
    try:
        stored = read_json(path, shape={"key": dict, "chunk": int}, hint=CLEAR)
        if stored["chunk"] < 1:
            raise DamagedFile(f"'chunk' is {stored['chunk']}", where=str(path), hint=CLEAR)
    except MissingFile:
        check_folder(folder, where=where)
        stored = fresh
    if changes := _differences(stored["key"], key):
        raise ArgumentError(
            f"{folder} holds other teacher outputs:\n    " + "\n    ".join(changes),
            where=where,
            hint='another folder, one for each seed with "{seed}" in its name, or delete this one',
        )
    if peers.is_main() and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(fresh, indent=1))
    peers.barrier("teacher_cache_open")
    return Store(folder, fields, n=n, chunk=stored["chunk"])


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Returns `"path: old -> new"` for every leaf in which two keys differ."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return [] if old == new else [f"{path}: {_show(old)} -> {_show(new)}"]
    lines = []
    for name in sorted(old.keys() | new.keys()):
        inner = f"{path}.{name}" if path else name
        lines += _differences(old.get(name, _ABSENT), new.get(name, _ABSENT), inner)
    return lines


def _show(value: Any) -> str:
    return "(absent)" if value is _ABSENT else repr(value)
