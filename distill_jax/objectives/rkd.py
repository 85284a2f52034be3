"""Relational distillation (Park, Kim, Lu, Cho 2019, arXiv:1904.05068).

The student's embeddings of a batch match the teacher's geometry, for any width. The loss is the
Huber loss of all pairwise distances, each divided by the mean distance of the batch (section
3.2.1), and of the cosines of the angles of all triplets (section 3.2.2):

`L = CE + weight (distance_weight L_D + angle_weight L_A)`.

Deviations: sums over pairs and triplets are means over all n^2 and n^3 of them, repetitions of an
example included; the usual weights are for these means. Pairs of equal embeddings count in the mean
distance and have no gradient. `L_A` takes O(b^3) time.
"""

import dataclasses
from typing import ClassVar

from distill_jax.core.api import TASKS, Array, Batch, Nets, Outputs, PyTree
from distill_jax.losses import relations
from distill_jax.objectives._distillation import Distillation, Signals, check_not_negative
from distill_jax.objectives._embeddings import flat_pair


@dataclasses.dataclass(frozen=True, kw_only=True)
class RKD(Distillation):
    """Distances and angles among the examples of a batch, terms `distance` and `angle`.

    Attributes:
      distance_weight: coefficient of distances, 0 or more; usually 25, in the paper 1 to 25.
      angle_weight: coefficient of angles, 0 or more; usually 50, in the paper 2 to 50.
      feature: output of both networks that is compared.
    """

    distance_weight: float = 25.0
    angle_weight: float = 50.0
    feature: str = "embedding"

    couples_batch: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = TASKS

    def __post_init__(self):
        super().__post_init__()
        check_not_negative(distance_weight=self.distance_weight, angle_weight=self.angle_weight)

    def loss_terms(
        self,
        nets: Nets,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        memory: PyTree,
        step: Array,
    ) -> Signals:
        pair, mask = flat_pair(student, teacher, self.feature), batch["mask"]
        values, coef = {}, {}
        if self.distance_weight:
            values["distance"] = relations.distance_share(*pair, mask)
            coef["distance"] = self.weight * self.distance_weight
        if self.angle_weight:
            values["angle"] = relations.angle_share(*pair, mask)
            coef["angle"] = self.weight * self.angle_weight
        return Signals(values=values, coef=coef)


make = RKD
