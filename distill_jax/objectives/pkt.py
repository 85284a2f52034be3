"""Probabilistic knowledge transfer (Passalis and Tefas 2018, arXiv:1803.10837).

`L = CE + weight / n^2 sum_i KL(p_i || q_i)`: `p_ij` is the probability that example j is a
neighbour of example i for the teacher, proportional to `(cos + 1) / 2` of their embeddings; `q_ij`
is the same for the student (section 3). Widths may differ.

Deviation: each example is among its own neighbours, which is the form that the usual weight is for;
the paper leaves it out.
"""

import dataclasses
from typing import ClassVar

from distill_jax.core.api import TASKS, Array, Batch, Nets, Outputs, PyTree
from distill_jax.losses.relations import probability_share
from distill_jax.objectives._distillation import Distillation, Signals
from distill_jax.objectives._embeddings import flat_pair


@dataclasses.dataclass(frozen=True, kw_only=True)
class PKT(Distillation):
    """Matches conditional probabilities among the examples of a batch, term `neighbours`.

    Attributes:
      weight: usually 30000.
      feature: output of both networks that is compared.
    """

    weight: float = 30000.0
    feature: str = "embedding"

    couples_batch: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = TASKS

    def loss_terms(
        self,
        nets: Nets,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        memory: PyTree,
        step: Array,
    ) -> Signals:
        pair = flat_pair(student, teacher, self.feature)
        return Signals(values={"neighbours": probability_share(*pair, batch["mask"])})


make = PKT
