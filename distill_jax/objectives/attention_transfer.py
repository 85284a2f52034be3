"""Attention transfer (Zagoruyko and Komodakis 2017, arXiv:1612.03928), eq. 2.

`L = label_weight CE + weight sum_stages mean((q_s / |q_s| - q_t / |q_t|)^2)` where q is the mean of
the squared activations over the channels, as a vector over positions.

Deviations: the squared distance and the mean over positions, for which the weight 1000 was
published (the paper's coefficient is 1000 over the number of elements). If two maps differ in size,
the larger is average-pooled first. Stages need not have the same number of channels.
"""

import dataclasses

from distill_jax.core.api import Array, Batch, Nets, Outputs, PyTree
from distill_jax.losses.features import attention_distance, match_sizes
from distill_jax.objectives._distillation import Signals
from distill_jax.objectives._features import StageDistillation


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionTransfer(StageDistillation):
    """Distance between the attention maps of student and teacher, over several stages.

    Attributes:
      weight: of the distance; 100 to 10000, published 1000.
    """

    weight: float = 1000.0

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
        distances = [attention_distance(*match_sizes(s, t, where=where)) for s, t in pairs]
        return Signals(values={"attention": sum(distances[1:], start=distances[0])})


make = AttentionTransfer
