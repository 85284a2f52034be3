"""Fashion-MNIST, complete: 60,000 training and 10,000 test images, from local files.

Xiao, Rasul, Vollgraf (2017), arXiv:1708.07747; MIT licence, Zalando SE.
"""

import os
from pathlib import Path

from distill_jax.core.api import Dataset
from distill_jax.core.errors import DataUnavailable
from distill_jax.data import idx_folder, shapes, source
from distill_jax.data.fashion_mnist_5k import CLASSES

SYSTEM_FOLDER = "/usr/share/datasets/fashion-mnist"
HINT = (
    "on Debian and Ubuntu: apt-get install dataset-fashion-mnist; elsewhere put the four original "
    "files (github.com/zalandoresearch/fashion-mnist) into $DISTILL_JAX_DATA/fashion-mnist or name "
    "their folder with the argument root. data.name = 'fashion_mnist_5k' needs no files"
)
# Of {"input": images [n, h, w, 1], "label": labels [n]} of the original release.
DIGESTS = {
    "train": "294085875d5451cc3ec612b9ca54132313937a917dca1a906ed98de204ef590d",
    "test": "2c9186184d02e4ff156708677adae8f83489e90b0642de9c56e6de3089196abd",
}


def folders() -> list[Path]:
    """Returns the folders searched for the files when no root is given, in order of preference."""
    data = os.environ.get("DISTILL_JAX_DATA")
    return [*([Path(data, "fashion-mnist")] if data else []), Path(SYSTEM_FOLDER)]


def make(*, root: str = "", held_out: float = 0.1, split_seed: int = 0) -> Dataset:
    """Reads the four original files and checks that they are the original release.

    Args:
      root: their folder; by default $DISTILL_JAX_DATA/fashion-mnist, then the system's folder.
      held_out: share of the training set held out.
      split_seed: seed of that split.

    Raises:
      DataUnavailable: files are missing, damaged, or other data than Fashion-MNIST.
    """
    candidates = [Path(root)] if root else folders()
    folder = next((path for path in candidates if path.expanduser().is_dir()), candidates[-1])
    parts = []
    for part, (images, labels) in idx_folder.read_folder(folder, hint=HINT).items():
        sha256 = source.checksum({"input": images[..., None], "label": labels})
        if sha256 != DIGESTS[part]:
            raise DataUnavailable(
                f"the {part} files are not those of Fashion-MNIST",
                where=str(folder),
                hint="read other data of this layout with the data set idx_folder",
            )
        name = f"Fashion-MNIST ({part})"
        parts.append(
            source.make_array_source(
                images, labels, name=name, origin=str(folder), licence="MIT", sha256=sha256
            )
        )
    train, test = parts
    return source.make_dataset(
        train, test, held_out=held_out, split_seed=split_seed, classes=CLASSES
    )


def spec(*, root: str = "", held_out: float = 0.1, split_seed: int = 0) -> Dataset:
    """Returns the sizes and shapes of `make` without reading a file."""
    del root, split_seed
    return shapes.make_shapes(
        per_class=[6000] * 10, n_test=10000, shape=(28, 28, 1), held_out=held_out, classes=CLASSES
    )
