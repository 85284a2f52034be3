"""The 8x8 handwritten digits included in scikit-learn: 1,797 images, 10 classes.

They are the test part of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin, Kaynak 1998,
CC BY 4.0). There is no published split of them. Here every fifth example of a class, in
scikit-learn's order, is a test example: 1,440 train, 357 test. Writers occur in both parts.
"""

from typing import Any

import numpy as np

from distill_jax.core.api import Dataset
from distill_jax.core.errors import DataUnavailable
from distill_jax.data import shapes, source

COUNTS = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)
"""Examples of each class, training and test part together."""


def is_test(labels: np.ndarray) -> np.ndarray:
    """Returns bool `[n]`: the fifth, tenth, ... example of each class."""
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        mask[np.flatnonzero(labels == label)[4::5]] = True
    return mask


def pooled(images: np.ndarray) -> np.ndarray:
    """Returns the means of squares of 2 x 2 pixels, float64 `[n, 16]` in [0, 1]."""
    x = np.asarray(images, np.float64).reshape(len(images), 4, 2, 4, 2)
    return x.mean((2, 4)).reshape(len(x), 16) / 255


def make(*, held_out: float = 0.1, split_seed: int = 0) -> Dataset:
    """Returns uint8 images 8x8x1; the grey levels 0..16 are stretched to 0..255.

    Raises:
      DataUnavailable: scikit-learn is not installed.
    """
    try:
        import sklearn
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataUnavailable(
            "the digits come with scikit-learn, which is not installed",
            where="dataset",
            hint="pip install scikit-learn",
        ) from error
    digits: Any = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int32)
    test = is_test(labels)
    parts = [
        source.make_array_source(
            images[mask],
            labels[mask],
            name=f"scikit-learn digits ({part})",
            origin=f"scikit-learn {sklearn.__version__}",
            licence="CC-BY-4.0",
        )
        for part, mask in (("train", ~test), ("test", test))
    ]
    return source.make_dataset(*parts, held_out=held_out, split_seed=split_seed)


def spec(*, held_out: float = 0.1, **unused: int) -> Dataset:
    """Returns the sizes and shapes of `make` without reading anything."""
    del unused
    return shapes.make_shapes(
        per_class=[count - count // 5 for count in COUNTS],
        n_test=sum(count // 5 for count in COUNTS),
        shape=(8, 8, 1),
        held_out=held_out,
    )
