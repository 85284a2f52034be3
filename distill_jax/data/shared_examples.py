"""Examples that occur in two parts of a data set."""

from typing import Any, NamedTuple

import jax
import numpy as np

from distill_jax.core.api import Dataset
from distill_jax.data.moments import root, spread

LOOKED_AT_BYTES = 2**28
"""Data up to this size are searched for examples that occur in two parts."""


COMPARED = 64
"""Examples of larger data that are compared at equal positions instead."""


class Overlap(NamedTuple):
    """Number of examples of a part that are also in the training part.

    Attributes:
      repeated: examples found there.
      of: examples that were compared.
      whole: whether that is the whole part; otherwise equal positions of both were compared.
    """

    repeated: int
    of: int
    whole: bool

    def spell(self, name: str) -> str:
        """Returns a sentence about the part of that name."""
        if self.whole:
            return (
                f"{self.repeated} of {self.of} examples of the {name} part are in the training "
                "part too"
            )
        return (
            f"the {name} part looks like a copy of the training data: {self.repeated} of {self.of} "
            "examples compared at equal positions are equal"
        )


def overlaps(dataset: Dataset) -> dict[str, Overlap]:
    """Returns the examples of other parts that also occur in the training part, by content.

    Parts in memory up to `LOOKED_AT_BYTES` are searched in full. Of larger ones some examples at
    equal positions are compared, which finds a part that is a copy.
    """
    parts = {name: part for name, part in dataset.parts.items() if len(part)}
    others = [name for name in dataset.parts if name != "train"]
    roots = {name: root(part) for name, part in parts.items()}
    if any(getattr(part, "shapes_only", False) for part in roots.values()):
        return {}
    arrays = [getattr(part, "inputs", None) for part in roots.values()]
    in_memory = all(x is not None for x in arrays)
    shared: dict[str, Overlap] = {}
    if in_memory and sum(x.nbytes for x in jax.tree.leaves(arrays)) <= LOOKED_AT_BYTES:
        seen = set(_digests(parts["train"], np.arange(len(parts["train"]))))
        for name in others:
            if name in parts:
                rows = _digests(parts[name], np.arange(len(parts[name])))
                shared[name] = Overlap(sum(row in seen for row in rows), len(rows), True)
        return shared
    for name in others:
        other = name in parts and roots[name] is not roots["train"]
        if other and len(roots[name]) == len(roots["train"]):
            at = spread(len(roots[name]), COMPARED)
            pairs = zip(*(_digests(roots[x], at) for x in (name, "train")), strict=True)
            shared[name] = Overlap(sum(a == b for a, b in pairs), len(at), False)
    return shared


def _digests(source: Any, indices: np.ndarray) -> list[int]:
    leaves = [np.ascontiguousarray(x) for x in jax.tree.leaves(source.read(indices)["input"])]
    return [hash(b"".join(x[i].tobytes() for x in leaves)) for i in range(len(indices))]
