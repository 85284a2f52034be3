"""Neuron selectivity transfer (Huang and Wang 2017, arXiv:1707.01219).

`L = CE + weight sum_layers MMD^2`. The channels of a feature map, as unit vectors over positions,
are samples of a distribution. Student and teacher are compared by the maximum mean discrepancy with
the polynomial kernel `(x . y)^2` (section 4), separately for each example. The numbers of channels
may differ.

Deviations: the paper halves its weight. If two maps differ in size, the larger is average-pooled,
where the paper interpolates.
"""

import dataclasses
from typing import Any

from distill_jax.core.api import Array, Batch, Nets, Outputs, PyTree
from distill_jax.losses.features import match_sizes
from distill_jax.losses.relations import selectivity
from distill_jax.objectives._distillation import Signals
from distill_jax.objectives._features import StageDistillation


@dataclasses.dataclass(frozen=True, kw_only=True)
class NST(StageDistillation):
    """Matches the distributions of channel responses over positions, term `selectivity`.

    Attributes:
      weight: usually 50, for all stages.
    """

    weight: float = 50.0

    def loss_terms(
        self,
        nets: Nets,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        memory: PyTree,
        step: Array,
    ) -> Signals:
        where = "student_stages"
        pairs = zip(*self.maps(student, teacher), strict=True)
        value: Any = sum(selectivity(*match_sizes(s, t, where=where)) for s, t in pairs)
        return Signals(values={"selectivity": value})


make = NST
