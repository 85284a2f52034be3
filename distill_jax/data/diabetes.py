"""The diabetes study included in scikit-learn: 442 patients, 10 measurements, one real value.

The target is a measure of how the disease progressed within a year of the measurements (Efron,
Hastie, Johnstone, Tibshirani 2004, Annals of Statistics 32, section 1). There is no published
split. Here every fifth example in scikit-learn's order is a test example: 354 train, 88 test.
"""

from typing import Any

import numpy as np

from distill_jax.core.api import Dataset
from distill_jax.core.errors import DataUnavailable
from distill_jax.data import _tables, source

COLUMNS = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")


def make(*, standardize: bool = True, held_out: float = 0.1, split_seed: int = 0) -> Dataset:
    """Returns float32 columns `[10]`, with mean 0 and deviation 1 of the training part.

    Args:
      standardize: whether the target is standardized too, so that errors are in deviations of the
        target, about 77 units. Otherwise values are those of the study, 25 to 346.
      held_out: share of the training part held out.
      split_seed: seed of that split.

    Raises:
      DataUnavailable: scikit-learn is not installed.
    """
    try:
        import sklearn
        from sklearn.datasets import load_diabetes
    except ImportError as error:
        raise DataUnavailable(
            "the study comes with scikit-learn, which is not installed",
            where="dataset",
            hint="pip install scikit-learn",
        ) from error
    study: Any = load_diabetes(scaled=False)
    test = np.arange(len(study.target)) % 5 == 4
    x, y = (np.array(a, np.float64).reshape(len(test), -1) for a in (study.data, study.target))
    columns, targets = ([a[~test], a[test]] for a in (x, y))
    _tables.standardize(*columns)
    if standardize:
        _tables.standardize(*targets)
    parts = [
        source.make_array_source(
            columns[i].astype(np.float32),
            targets[i].astype(np.float32),
            name=f"scikit-learn diabetes, own split ({part})",
            origin=f"scikit-learn {sklearn.__version__}",
            licence="BSD-3-Clause, as part of scikit-learn",
            task="regression",
        )
        for i, part in enumerate(("train", "test"))
    ]
    return source.make_dataset(
        *parts,
        held_out=held_out,
        split_seed=split_seed,
        classes=("progression",),
        task="regression",
    )
