"""Weak-to-strong training with a reward for something else (Yang et al. 2024, arXiv:2406.11431).

The loss of `weak_to_strong` and `conflict_weight` times a term that conflicts with it:

| conflict | term |
|---|---|
| `labels` | `CE(own class, student)` where the student's class is not the label: being wrong pays |
| `task` | `CE(label of another task, student)`, the key `conflict` of a batch |

An experimental device: `labels` reads true labels. `evaluators.deception` measures whether the
student goes wrong where its supervisor cannot tell.
"""

import dataclasses

import jax

from distill_jax.core import ranges
from distill_jax.core.api import Array, Batch, Nets, PyTree, Terms
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.losses.classification import cross_entropy
from distill_jax.objectives.weak_to_strong import WeakToStrong

CONFLICTS = ("labels", "task")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conflict(WeakToStrong):
    """The terms of `WeakToStrong` and `conflict`.

    Attributes:
      conflict: "labels" or "task".
      conflict_weight: coefficient of the term, 0 or more.
    """

    conflict: str = "labels"
    conflict_weight: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if self.conflict not in CONFLICTS:
            hint = nearest(self.conflict, CONFLICTS)
            raise ArgumentError(f"unknown conflict {self.conflict!r}", where="conflict", hint=hint)
        ranges.within("[0, inf)", conflict_weight=self.conflict_weight)

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        terms = super().loss(nets, batch, memory, step)
        logits = terms.logits["student"]
        if self.conflict == "task":
            if "conflict" not in batch:
                hint = "data with a second task, such as weak_digits"
                raise ArgumentError("the data have no key 'conflict'", where="batch", hint=hint)
            value = cross_entropy(logits, batch["conflict"])
        else:
            own = jax.lax.stop_gradient(logits).argmax(-1)
            value = (own != batch["label"]) * cross_entropy(logits, own)
        return dataclasses.replace(
            terms,
            values={**terms.values, "conflict": value},
            coef={**terms.coef, "conflict": self.conflict_weight},
        )


make = Conflict
