"""Digits whose colour predicts the label better than their form, but only in training.

ColoredMNIST (Arjovsky et al. 2019, arXiv:1907.02893, section 5.1) on the digits of scikit-learn
(see `digits`). The label is whether the digit is 5 or more, flipped for a quarter of the examples.
The colour agrees with that label for 90 % of the examples of one training environment and 80 % of
the other, and for 10 % of the test examples.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from distill_jax.core.api import Dataset, Source
from distill_jax.core.errors import ArgumentError
from distill_jax.data import digits, shapes, source
from distill_jax.data.corruption import Corrupted

CLASSES = ("below 5", "5 or more")


def make(
    *,
    wrong: float = 0.25,
    agree: Sequence[float] = (0.9, 0.8),
    test_agree: float = 0.1,
    seed: int = 0,
    held_out: float = 0.1,
    split_seed: int = 0,
) -> Dataset:
    """Returns uint8 images 8x8x2, one channel for each colour, and `domain` int32.

    Args:
      wrong: share of labels that are flipped.
      agree: for each training environment, how often the colour is that of the label. Domain e is
        the e-th of them; the training examples are dealt out in turn.
      test_agree: the same for the test part, whose domain is the number of environments.
      seed: seed of the flipped labels and the colours.
      held_out: share of the training part held out, from the training environments.
      split_seed: seed of that split.

    Raises:
      ArgumentError: a share outside [0, 1], or no environment.
      DataUnavailable: scikit-learn is not installed.
    """
    for share in (wrong, test_agree, *agree):
        if not 0 <= share <= 1:
            raise ArgumentError(f"{share} is no share", hint="from 0 to 1")
    if not agree:
        raise ArgumentError("no environment", where="agree", hint="(0.9, 0.8)")
    grey = digits.make(held_out=0.0)

    def one(part: str, origin: Source, rates: Sequence[float], first: int) -> Source:
        rows: Any = origin.read(np.arange(len(origin)))
        n, image = len(origin), rows["input"]
        random = np.random.Generator(np.random.Philox(key=[seed, first]))
        domain = np.arange(n, dtype=np.int32) % len(rates)
        label = (rows["label"] >= 5) ^ (random.random(n) < wrong)
        colour = label ^ (random.random(n) >= np.asarray(rates)[domain])
        coloured = np.where(colour[:, None, None, None] == np.arange(2, dtype=bool), image, 0)
        made = source.make_array_source(
            coloured.astype(np.uint8),
            label.astype(np.int32),
            name=f"coloured digits ({part})",
            origin=origin.provenance.origin,
            licence=origin.provenance.licence,
        )
        return Corrupted(made, key="domain", flag=domain + np.int32(first))

    return source.make_dataset(
        one("train", grey.train, agree, 0),
        one("test", grey.test, (test_agree,), len(agree)),
        held_out=held_out,
        split_seed=split_seed,
        classes=CLASSES,
    )


def spec(*, held_out: float = 0.1, **unused: Any) -> Dataset:
    """Returns the sizes and shapes of `make`, up to a few examples, without reading anything."""
    del unused
    n = sum(count - count // 5 for count in digits.COUNTS)
    dataset = shapes.make_shapes(
        per_class=(n // 2, n - n // 2),
        n_test=sum(digits.COUNTS) - n,
        shape=(8, 8, 2),
        held_out=held_out,
        classes=CLASSES,
    )
    return with_domains(dataset)


def with_domains(dataset: Dataset) -> Dataset:
    """Returns a data set of shapes whose examples have a `domain`."""

    def one(part: Source) -> Source:
        return Corrupted(part, key="domain", flag=np.zeros(len(part), np.int32))

    return dataset._replace(
        train=one(dataset.train), held_out=one(dataset.held_out), test=one(dataset.test)
    )
