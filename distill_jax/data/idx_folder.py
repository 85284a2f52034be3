"""A folder in the layout of MNIST: four idx files, plain or gzipped."""

import gzip
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distill_jax.core.api import Dataset
from distill_jax.core.errors import DataUnavailable
from distill_jax.data import source

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
LAYOUT = f"it should hold {', '.join(sum(FILES.values(), ()))}, each plain or with .gz"


def read_idx(path: Path) -> np.ndarray:
    """Reads an idx file of unsigned bytes (`.gz` or plain) into a uint8 array.

    Layout: two zero bytes, 0x08, the rank, one big-endian uint32 a dimension, then the bytes.

    Raises:
      DataUnavailable: the file is damaged or of another kind.
    """
    with source.reading(path):
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or len(data) < 4 + 4 * data[3]:
        raise DataUnavailable("is not an idx file of unsigned bytes", where=str(path))
    shape = tuple(np.frombuffer(data, ">u4", count=data[3], offset=4).tolist())
    start = 4 + 4 * data[3]
    if len(data) - start != math.prod(shape):
        raise DataUnavailable(
            f"holds {len(data) - start} bytes, its header {list(shape)} says {math.prod(shape)}",
            where=str(path),
            hint="the file is damaged or cut short: get it again",
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_folder(root: str | Path, *, hint: str = LAYOUT) -> dict[str, tuple[np.ndarray, ...]]:
    """Returns `{"train": (images [n, h, w], labels [n]), "test": ...}`, uint8.

    Raises:
      DataUnavailable: a file is missing or damaged; `hint` explains how to get it.
    """
    root = source.existing(root, hint=hint)

    def find(stem: str) -> Path:
        for path in (root / stem, root / f"{stem}.gz"):
            if path.is_file():
                return path
        raise DataUnavailable(f"no {stem} or {stem}.gz", where=str(root), hint=hint)

    return {part: tuple(read_idx(find(stem)) for stem in stems) for part, stems in FILES.items()}


def make(
    *,
    root: str,
    name: str = "",
    licence: str = "",
    classes: Sequence[str] = (),
    held_out: float = 0.1,
    split_seed: int = 0,
) -> Dataset:
    """Reads any data set in MNIST's layout (MNIST, KMNIST, QMNIST's main parts, ...).

    Args:
      root: the folder.
      name: name in the provenance; the folder's name by default.
      licence: licence of the data, for the provenance.
      classes: class names in label order, or one string with commas between; by default numbers.
      held_out: share of the training part held out.
      split_seed: seed of that split.

    Raises:
      DataUnavailable: files are missing or damaged.
    """
    name = name or Path(root).expanduser().name
    train, test = (
        source.make_array_source(
            *arrays, name=f"{name} ({part})", origin=str(root), licence=licence
        )
        for part, arrays in read_folder(root).items()
    )
    return source.make_dataset(
        train, test, held_out=held_out, split_seed=split_seed, classes=classes
    )
