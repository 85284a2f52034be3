"""Data sets with sizes and shapes but no data, for `--mode=describe` and for tests.

A data module whose shapes are known without reading defines `spec`, with the keywords of `make`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.core.api import Dataset, Provenance
from distill_jax.core.errors import ArgumentError


class ZeroSource:
    """`n` examples of zeros.

    Args:
      n: number of examples.
      shape: shape of one input, or a dict of them.
      dtype: type of the inputs, or a dict of them with the same keys.

    Raises:
      ArgumentError: a negative number of examples, or an example that is too large.
    """

    shapes_only = True

    def __init__(self, n: int, shape: Sequence[int] | Mapping[str, Sequence[int]], dtype: Any):
        if n < 0:
            raise ArgumentError(f"a part of {n} examples", hint="0 or more")
        sizes = list(shape.values()) if isinstance(shape, Mapping) else [shape]
        if (values := max(math.prod(size) for size in sizes)) >= 2**31:
            raise ArgumentError(
                f"an example of {values:,} values",
                hint="below 2**31: the shapes of inputs are wrong",
            )
        self._n, self._shape, self._dtype = n, shape, dtype
        self.provenance = Provenance("shapes only", "none", n, "")

    def __len__(self) -> int:
        return self._n

    def read(self, indices: np.ndarray) -> Mapping[str, Any]:
        """Returns `input` `[b, ...]`, or a dict of such, and `label` int32 `[b]`, all zero."""
        b, shape = len(indices), self._shape
        if isinstance(shape, Mapping):
            inputs = {key: np.zeros((b, *shape[key]), self._dtype[key]) for key in shape}
        else:
            inputs = np.zeros((b, *shape), self._dtype)
        return {"input": inputs, "label": np.zeros(b, np.int32)}


def make_shapes(
    *,
    per_class: Sequence[int],
    n_test: int,
    shape: Sequence[int] | Mapping[str, Sequence[int]],
    held_out: float,
    classes: Sequence[str] = (),
    dtype: Any = np.uint8,
    cardinalities: Sequence[int] = (),
) -> Dataset:
    """Returns a data set of zeros with the sizes that `source.make_dataset` would give.

    Args:
      per_class: training examples of each class, before the held-out share is taken.
      n_test: test examples.
      shape: shape of one input, or a dict of them.
      held_out: share of the training examples held out, class by class.
      classes: class names; by default the numbers.
      dtype: type of the inputs, or a dict of them with the same keys.
      cardinalities: of the categorical columns of a table.
    """
    held = sum(int(held_out * count + 0.5) for count in per_class)
    sizes = {"train": sum(per_class) - held, "held_out": held, "test": n_test}
    names = tuple(classes) or tuple(str(label) for label in range(len(per_class)))
    parts = {part: ZeroSource(n, shape, dtype) for part, n in sizes.items()}
    return Dataset(
        train=parts["train"],
        held_out=parts["held_out"],
        test=parts["test"],
        classes=names,
        cardinalities=tuple(cardinalities),
    )
