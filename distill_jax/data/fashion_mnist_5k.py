"""Fashion-MNIST-5k/1k: a stratified part of Fashion-MNIST that ships with the package.

The first 500 images of each class of the training set and the first 100 of each class of the test
set, in the original order (tools/build_assets.py). Figures on it are not figures on Fashion-MNIST.
Licence and origin: DATA_LICENSES.md. Xiao, Rasul, Vollgraf (2017), arXiv:1708.07747.
"""

import hashlib
import io
from importlib import resources

import numpy as np

from distill_jax.core.api import Dataset
from distill_jax.core.errors import DataUnavailable
from distill_jax.data import shapes, source

NAME = "Fashion-MNIST-5k/1k"
ASSET = "fashion_mnist_5k1k.npz"
SHA256 = "5de05f4efcbb2713f7dbeeb1ba7286288c73937220f24d8e0c5b9212aa3732cb"
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def make(*, held_out: float = 0.1, split_seed: int = 0) -> Dataset:
    """Returns 5,000 training (less the held-out share) and 1,000 test images, 28x28x1, 10 classes.

    Raises:
      DataUnavailable: the asset is absent from the installation or damaged.
    """
    asset = resources.files("distill_jax.data") / "assets" / ASSET
    hint = "install the package again, or rebuild the asset with tools/build_assets.py"
    if not asset.is_file():
        raise DataUnavailable("the embedded data set is missing", where=str(asset), hint=hint)
    content = asset.read_bytes()
    if (sha256 := hashlib.sha256(content).hexdigest()) != SHA256:
        raise DataUnavailable("the embedded data set is damaged", where=str(asset), hint=hint)
    with np.load(io.BytesIO(content)) as arrays:
        train, test = (
            source.make_array_source(
                arrays[f"x_{part}"],
                arrays[f"y_{part}"],
                name=f"{NAME} ({part})",
                origin=f"distill_jax/data/assets/{ASSET}",
                licence="MIT",
                sha256=sha256,
            )
            for part in ("train", "test")
        )
    return source.make_dataset(
        train, test, held_out=held_out, split_seed=split_seed, classes=CLASSES
    )


def spec(*, held_out: float = 0.1, split_seed: int = 0) -> Dataset:
    """Returns the sizes and shapes of `make` without reading the asset."""
    del split_seed
    return shapes.make_shapes(
        per_class=[500] * 10, n_test=1000, shape=(28, 28, 1), held_out=held_out, classes=CLASSES
    )
