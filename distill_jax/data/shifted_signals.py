"""Generated periodic signals of ten forms, with different shifts in the test part.

After MNIST-1D (Greydanus 2020, arXiv:2011.14439) as Nix et al. 2022 use it ("Can Functional
Transfer Methods Capture Simple Inductive Biases?", AISTATS): signals of 40 numbers, circular
shifts, training on 30 of the 40 positions. A form here is a random smooth curve of twelve numbers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from distill_jax.core.api import Dataset
from distill_jax.core.errors import ArgumentError
from distill_jax.data import shapes, source

FORM = 12


def make(
    *,
    n_train: int = 2000,
    n_test: int = 1000,
    length: int = 40,
    num_classes: int = 10,
    shifts: Sequence[int] = (0, 30),
    test_shifts: Sequence[int] = (30, 40),
    noise: float = 0.1,
    seed: int = 0,
    held_out: float = 0.1,
    split_seed: int = 0,
) -> Dataset:
    """Returns float32 inputs `[1, length, 1]`: a form, stretched in height, shifted, with noise.

    Args:
      n_train: training examples, before the held-out share is split off.
      n_test: test examples.
      length: of a signal, the period of its shifts; at least 12.
      num_classes: number of forms.
      shifts: first and one past the last shift of training examples.
      test_shifts: the same for test examples.
      noise: standard deviation of the noise of each number; forms have deviation 1.
      seed: of forms and examples.
      held_out: share of the training part held out.
      split_seed: seed of that split.

    Raises:
      ArgumentError: an impossible size or range of shifts.
    """
    for key, (first, stop) in (("shifts", shifts), ("test_shifts", test_shifts)):
        if not 0 <= first < stop <= length:
            raise ArgumentError(
                f"shifts from {first} to below {stop}",
                where=key,
                hint=f"a first and one past the last, from 0 to {length}",
            )
    if min(n_train, n_test, num_classes) < 1 or length < FORM:
        raise ArgumentError("a size is too small", hint="see shifted_signals")

    def generator(purpose: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[seed, purpose]))

    rough = generator(0).normal(size=(num_classes, FORM + 2))
    forms = rough[:, :-2] + 2 * rough[:, 1:-1] + rough[:, 2:]
    forms -= forms.mean(1, keepdims=True)
    forms /= forms.std(1, keepdims=True)

    def part(name: str, n: int, purpose: int, where: Sequence[int]) -> source.ArraySource:
        random, labels = generator(purpose), np.arange(n, dtype=np.int32) % num_classes
        signals = np.zeros((n, length))
        signals[:, :FORM] = forms[labels] * random.uniform(0.75, 1.25, (n, 1))
        places = (np.arange(length)[None] - random.integers(where[0], where[1], (n, 1))) % length
        signals = np.take_along_axis(signals, places, axis=1)
        signals += noise * random.normal(size=signals.shape)
        return source.make_array_source(
            signals[:, None, :, None].astype(np.float32),
            labels,
            name=f"shifted signals ({name})",
            origin=f"generated, seed {seed}",
            licence="CC0-1.0",
        )

    return source.make_dataset(
        part("train", n_train, 1, shifts),
        part("test", n_test, 2, test_shifts),
        held_out=held_out,
        split_seed=split_seed,
        classes=[f"form {label}" for label in range(num_classes)],
    )


def spec(
    *,
    n_train: int = 2000,
    n_test: int = 1000,
    length: int = 40,
    num_classes: int = 10,
    held_out: float = 0.1,
    **unused: Any,
) -> Dataset:
    """Returns the sizes and shapes of `make` without drawing a number."""
    del unused
    return shapes.make_shapes(
        per_class=[len(range(label, n_train, num_classes)) for label in range(num_classes)],
        n_test=n_test,
        shape=(1, length, 1),
        held_out=held_out,
        classes=[f"form {label}" for label in range(num_classes)],
        dtype=np.float32,
    )
