"""Distillation by a chosen divergence; labels are optional.

With `s` and `t` the probabilities of student and teacher at temperature T:

| kind | `value / T^2` |
|---|---|
| `forward` | `KL(t || s)` (Hinton et al. 2015, arXiv:1503.02531) |
| `reverse` | `KL(s || t)` |
| `jeffreys` | `(KL(t || s) + KL(s || t)) / 2` (SSLD, Cui et al. 2021, arXiv:2103.05959) |
| `js` | `(KL(s || m) + KL(t || m)) / 2`, `m = (s + t) / 2` |
| `cross_entropy` | `-sum_c t_c log s_c`: the gradient of `forward`, plus the teacher's entropy |

SSLD calls its loss a Jensen-Shannon divergence, but its definition is half of Jeffreys' divergence.
It has no temperature and no label term. The defaults here are the same, so unlabelled data can be
used.
"""

import dataclasses
from typing import Any, ClassVar

from distill_jax.core.api import Array, Batch, Nets, Outputs, PyTree
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.losses.classification import distillation_kl
from distill_jax.losses.logits import jensen_shannon, reverse_kl, teacher_cross_entropy
from distill_jax.objectives._distillation import Distillation, Signals, check_same_classes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divergence(Distillation):
    """The loss term `divergence`.

    Attributes:
      kind: "forward", "reverse", "jeffreys", "js" or "cross_entropy".
      label_weight: coefficient of the label term, 0 or more. SSLD has no label term; without it,
        turn off label smoothing and mixed labels.
      temperature: T of both softmaxes, positive; 1 in SSLD.
      floor: lower bound, below 0, of the teacher's log-probability in `KL(s || t)`, which is
        otherwise unbounded where the teacher's probability of a class approaches 0. A deviation
        from SSLD.
    """

    kind: str = "jeffreys"
    label_weight: float = 0.0
    temperature: float = 1.0
    floor: float | None = None

    kinds: ClassVar[tuple[str, ...]] = ("forward", "reverse", "jeffreys", "js", "cross_entropy")

    def __post_init__(self):
        super().__post_init__()
        if self.kind not in self.kinds:
            raise ArgumentError(
                f"there is no divergence {self.kind!r}",
                where="kind",
                hint=nearest(self.kind, self.kinds),
            )
        if self.floor is not None and (self.kind not in ("reverse", "jeffreys") or self.floor >= 0):
            raise ArgumentError(
                f"floor is {self.floor} and kind is {self.kind!r}",
                where="floor",
                hint="a log-probability below 0, for kind 'reverse' or 'jeffreys'",
            )

    def loss_terms(
        self,
        nets: Nets,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        memory: PyTree,
        step: Array,
    ) -> Signals:
        s, t = student["logits"], teacher["logits"]
        check_same_classes(s, t)
        at: dict[str, Any] = {"temperature": self.temperature}
        match self.kind:
            case "forward":
                value = distillation_kl(s, t, **at)
            case "reverse":
                value = reverse_kl(s, t, floor=self.floor, **at)
            case "jeffreys":
                value = 0.5 * (
                    distillation_kl(s, t, **at) + reverse_kl(s, t, floor=self.floor, **at)
                )
            case "js":
                value = jensen_shannon(s, t, **at)
            case _:
                value = teacher_cross_entropy(s, t, **at)
        return Signals(values={"divergence": value})


make = Divergence
