"""Generated tables for smoke runs, benchmarks of speed, and tests. They measure no method."""

from collections.abc import Sequence

import numpy as np

from distill_jax.core.api import Dataset, Provenance
from distill_jax.core.errors import ArgumentError
from distill_jax.data import _tables, source


def class_counts(n: int, *, num_classes: int, imbalance: float) -> list[int]:
    """Returns how many of `n` examples each class has: shares fall geometrically, the first class
    having `imbalance` times that of the last.

    Raises:
      ArgumentError: a class would have none.
    """
    shares = imbalance ** (-np.arange(num_classes) / max(num_classes - 1, 1))
    counts = np.diff(np.rint(n * np.cumsum(shares) / shares.sum()), prepend=0).astype(int)
    if counts.min() < 1:
        raise ArgumentError(
            f"{n} examples leave a class of {num_classes} empty",
            where="n_train",
            hint="more examples, or less imbalance",
        )
    return counts.tolist()


def make(
    *,
    n_train: int = 1024,
    n_test: int = 256,
    cardinalities: Sequence[int] = (4, 9, 40),
    numeric: int = 5,
    num_classes: int = 3,
    noise: float = 0.5,
    imbalance: float = 1.0,
    seed: int = 0,
    held_out: float = 0.1,
    split_seed: int = 0,
) -> Dataset:
    """Returns rows whose columns are independent given the class, so that naive Bayes is optimal.

    Each categorical column has, for each class, log probabilities of its ids 1, 2, ... drawn from
    a normal of deviation 2 (id 0 does not occur); a share `noise` of the cells is drawn uniformly
    instead. Numeric columns are normal around means of the class drawn from a normal of deviation
    1 - noise, and standardized by the training part.

    Args:
      n_train: training examples, before the held-out share is split off.
      n_test: test examples.
      cardinalities: ids of each categorical column, at least 2.
      numeric: number of numeric columns.
      num_classes: classes.
      noise: from 0 to 1; at 1 the labels cannot be predicted from the columns.
      imbalance: size of the first class over that of the last, at least 1; in both parts.
      seed: of distributions and rows.
      held_out: share of the training part held out.
      split_seed: seed of that split.

    Raises:
      ArgumentError: an impossible size or share, or a class without examples.
    """
    cardinalities = tuple(cardinalities)
    _check(cardinalities, numeric, num_classes, noise, imbalance)

    def generator(purpose: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[seed, purpose]))

    laws = generator(0)
    tables = []
    for size in cardinalities:
        p = np.exp(2 * laws.normal(size=(num_classes, size - 1)))
        p = (1 - noise) * p / p.sum(1, keepdims=True) + noise / (size - 1)
        tables.append(np.cumsum(p, 1))
    means = (1 - noise) * laws.normal(size=(num_classes, numeric))

    def part(n: int, purpose: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        draws = generator(purpose)
        counts = class_counts(n, num_classes=num_classes, imbalance=imbalance)
        y = draws.permutation(np.repeat(np.arange(num_classes, dtype=np.int32), counts))
        ids = np.zeros((n, len(cardinalities)), np.int32)
        for j, table in enumerate(tables):
            below = table[y][:, :-1] < draws.random((n, 1))
            ids[:, j] = 1 + below.sum(1)
        x = means[y] + draws.normal(size=(n, numeric))
        return {"categorical": ids, "numeric": x.astype(np.float32)}, y

    parts = {"train": part(n_train, 1), "test": part(n_test, 2)}
    _tables.standardize(*(inputs["numeric"] for inputs, _ in parts.values()))
    sources = []
    for title, (inputs, y) in parts.items():
        name = f"synthetic table of {len(cardinalities)}+{numeric} columns, {num_classes} classes"
        sha256 = source.checksum({"input": inputs, "label": y})
        origin = f"generated, seed {seed}"
        provenance = Provenance(f"{name} ({title})", origin, len(y), sha256, "CC0-1.0")
        sources.append(source.ArraySource(inputs, y, provenance))
    return source.make_dataset(
        *sources,
        held_out=held_out,
        split_seed=split_seed,
        classes=[f"class {k}" for k in range(num_classes)],
        cardinalities=cardinalities,
    )


def spec(
    *,
    n_train: int = 1024,
    n_test: int = 256,
    cardinalities: Sequence[int] = (4, 9, 40),
    numeric: int = 5,
    num_classes: int = 3,
    imbalance: float = 1.0,
    held_out: float = 0.1,
    **unused: float,
) -> Dataset:
    """Returns the sizes and shapes of `make` without drawing a row."""
    del unused
    cardinalities = tuple(cardinalities)
    _check(cardinalities, numeric, num_classes, 0.0, imbalance)
    return _tables.make_spec(
        per_class=class_counts(n_train, num_classes=num_classes, imbalance=imbalance),
        n_test=n_test,
        cardinalities=cardinalities,
        numeric=numeric,
        held_out=held_out,
        classes=[f"class {k}" for k in range(num_classes)],
    )


def _check(
    cardinalities: tuple[int, ...], numeric: int, num_classes: int, noise: float, imbalance: float
) -> None:
    for key, good, hint in (
        ("cardinalities", all(size >= 2 for size in cardinalities), "at least 2 each"),
        ("numeric", numeric >= (0 if cardinalities else 1), "a table has at least one column"),
        ("num_classes", num_classes >= 2, "at least 2"),
        ("noise", 0 <= noise <= 1, "from 0 to 1"),
        ("imbalance", imbalance >= 1, "at least 1"),
    ):
        if not good:
            raise ArgumentError(f"{key} cannot be used", where=key, hint=hint)
