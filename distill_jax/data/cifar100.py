"""CIFAR-100: 50,000 training and 10,000 test images of 32x32, 100 classes, from local files.

Krizhevsky (2009), "Learning multiple layers of features from tiny images". The binary version of
the original release is read (`train.bin`, `test.bin`), or else what TensorFlow Datasets prepared.
"""

import os
from pathlib import Path

import numpy as np

from distill_jax.core.api import Dataset
from distill_jax.core.errors import DataUnavailable
from distill_jax.data import shapes, source, tfds

FOLDER = "cifar-100-binary"
SIZES = {"train": 50_000, "test": 10_000}
ROW = 2 + 32 * 32 * 3
HINT = (
    f"unpack {FOLDER} (the binary version of www.cs.toronto.edu/~kriz/cifar.html) into "
    "$DISTILL_JAX_DATA or name its folder with the argument root; or prepare 'cifar100' with "
    "TensorFlow Datasets"
)


def make(*, root: str = "", held_out: float = 0.1, split_seed: int = 0) -> Dataset:
    """Reads CIFAR-100 with its fine labels.

    Args:
      root: folder of `train.bin` and `test.bin`; by default $DISTILL_JAX_DATA/cifar-100-binary,
        and where that is absent the prepared data set "cifar100" of TensorFlow Datasets.
      held_out: share of the training set held out.
      split_seed: seed of that split.

    Raises:
      DataUnavailable: files are missing, cut short, or other data than CIFAR-100.
    """
    folder = Path(root or Path(os.environ.get("DISTILL_JAX_DATA", ""), FOLDER)).expanduser()
    if not root and not folder.is_dir():
        try:
            return tfds.make(name="cifar100", held_out=held_out, split_seed=split_seed)
        except DataUnavailable as error:
            raise DataUnavailable(error.what, where=error.where, hint=HINT) from error
    train, test = (_read(folder / f"{part}.bin", part) for part in SIZES)
    names = folder / "fine_label_names.txt"
    with source.reading(names):
        text = names.read_text("utf-8") if names.is_file() else ""
    classes = text.split() or [str(k) for k in range(100)]
    return source.make_dataset(
        train, test, held_out=held_out, split_seed=split_seed, classes=classes
    )


def _read(path: Path, part: str) -> source.ArraySource:
    """Reads rows of coarse label, fine label and 3x32x32 bytes."""
    with source.reading(path, hint=HINT):
        data = np.frombuffer(source.existing(path, hint=HINT).read_bytes(), np.uint8)
    n = SIZES[part]
    if data.size != n * ROW:
        raise DataUnavailable(f"holds {data.size} bytes, not {n * ROW}", where=str(path), hint=HINT)
    rows = data.reshape(n, ROW)
    labels = rows[:, 1]
    if (np.bincount(labels, minlength=100) != n // 100).any():
        raise DataUnavailable(
            f"has not {n // 100} images of each of 100 classes", where=str(path), hint=HINT
        )
    images = np.ascontiguousarray(rows[:, 2:].reshape(n, 3, 32, 32).transpose(0, 2, 3, 1))
    return source.make_array_source(images, labels, name=f"CIFAR-100 ({part})", origin=str(path))


def spec(*, root: str = "", held_out: float = 0.1, split_seed: int = 0) -> Dataset:
    """Returns the sizes and shapes of `make` without reading a file."""
    del root, split_seed
    return shapes.make_shapes(
        per_class=[500] * 100, n_test=SIZES["test"], shape=(32, 32, 3), held_out=held_out
    )
