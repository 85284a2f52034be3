"""Similarity-preserving distillation (Tung and Mori 2019, arXiv:1907.09682).

`L = CE + weight / n^2 sum_layers |G_t - G_s|_F^2`, where `G` holds the products of the flattened
features of all pairs of examples of a batch, with rows of unit length (section 3). Features may
have any shape. No deviation.
"""

import dataclasses
from typing import Any, ClassVar

from distill_jax.core.api import Array, Batch, Nets, Outputs, PyTree
from distill_jax.losses.relations import similarity_share
from distill_jax.objectives._distillation import Signals
from distill_jax.objectives._features import StageDistillation, feature


@dataclasses.dataclass(frozen=True, kw_only=True)
class Similarity(StageDistillation):
    """Matches the pairwise similarities between examples of a batch, term `similarity`.

    Attributes:
      weight: usually 3000.
      student_stages: outputs of the student; empty takes the last stage, as is usual.
      teacher_stages: as many outputs of the teacher; empty takes its last stage.
    """

    weight: float = 3000.0

    couples_batch: ClassVar[bool] = True

    def maps(self, student: Outputs, teacher: Outputs) -> tuple[list[Array], list[Array]]:
        if self.student_stages or self.teacher_stages:
            return super().maps(student, teacher)
        ours = feature(student, "", role="student", where="student_stages")
        return [ours], [feature(teacher, "", role="teacher", where="teacher_stages")]

    def loss_terms(
        self,
        nets: Nets,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        memory: PyTree,
        step: Array,
    ) -> Signals:
        value: Any = sum(
            similarity_share(s.reshape(s.shape[0], -1), t.reshape(t.shape[0], -1), batch["mask"])
            for s, t in zip(*self.maps(student, teacher), strict=True)
        )
        return Signals(values={"similarity": value})


make = Similarity
