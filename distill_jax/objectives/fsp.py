"""Flow of the solution procedure (Yim et al. 2017, CVPR, "A Gift from Knowledge Distillation").

`L = label_weight CE + weight sum_pairs mean((G_s - G_t)^2)` over pairs of consecutive stages, with
`G_ij = 1/(h w) sum_positions f1_i f2_j` (eqs. 1 and 2).

Deviations: the mean over the entries of G in place of their sum, for which the weight 50 was
published (Tian et al. 2020, arXiv:1910.10699). The larger of two stages is average-pooled to the
size of the smaller, where the paper uses max pooling. The paper trains on the flows first and on
the labels afterwards: set `label_weight=0`, then start another run from this student.

Both networks need the same number of channels in the stages that are compared.
"""

import dataclasses
import itertools

from distill_jax.core.api import Array, Batch, Nets, Outputs, PyTree
from distill_jax.core.errors import ArgumentError
from distill_jax.losses.features import check_same_shape, flow, match_sizes, mean_square
from distill_jax.objectives._distillation import Signals
from distill_jax.objectives._features import StageDistillation


@dataclasses.dataclass(frozen=True, kw_only=True)
class FSP(StageDistillation):
    """Distance between channel products of consecutive stages.

    Attributes:
      weight: coefficient of the distance; 1 to 100, published 50.
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
        flows = [
            [flow(*match_sizes(a, b, where=where)) for a, b in itertools.pairwise(maps)]
            for maps in self.maps(student, teacher)
        ]
        if not flows[0]:
            raise ArgumentError("a flow needs two stages", where=where, hint="name at least two")
        distances = []
        for s, t in zip(*flows, strict=True):
            hint = "flows need stages of the same channels: a teacher of the student's widths"
            check_same_shape(s, t, where=where, hint=hint)
            distances.append(mean_square(s - t))
        return Signals(values={"fsp": sum(distances[1:], start=distances[0])})


make = FSP
