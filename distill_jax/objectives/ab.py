"""Activation boundaries (Heo et al. 2019, arXiv:1811.03233).

`L = label_weight CE + weight sum_stages mean(relu(margin - y r(s))^2)`, where r(s) is the student's
feature before the activation, mapped by a connector, and y = +-1 is the sign of the teacher's.

The paper initializes a student with this loss, then trains the student with labels (and logits).
Two runs do the same. The first uses this objective with `label_weight=0` and no checkpoint
selection, since the classifier is not trained (`eval.metric=""`, `data.held_out=0`). The second
uses any other objective with `roles.student.init=<the first run>`. With labels, the default, both
are learned at once.

Deviations: the mean over the elements in place of their sum, and the same weight for every stage.
If two maps differ in size, the larger is average-pooled first. There is no published weight for
this mean: Tian et al. 2020 (arXiv:1910.10699) use 3/1000 of the sum, and half of it for each stage
further from the last.

Networks: student and teacher with outputs `stage<i>_pre`; regressor, model `regressor` with
`batch_norm=True` as published.
"""

import dataclasses
from typing import ClassVar

from distill_jax.core.api import Array, Batch, Nets, Outputs, PyTree
from distill_jax.losses.features import boundary_distance
from distill_jax.objectives._distillation import Signals, check_positive
from distill_jax.objectives._features import StageDistillation, connect


@dataclasses.dataclass(frozen=True, kw_only=True)
class AB(StageDistillation):
    """Squared hinge on the signs of the teacher's values before the activation.

    Attributes:
      weight: coefficient of the hinge; 0.1 to 100.
      margin: required distance of the student's values from zero, positive; published 1.
    """

    weight: float = 1.0
    margin: float = 1.0

    roles: ClassVar[tuple[str, ...]] = ("student", "teacher", "regressor")
    suffix: ClassVar[str] = "_pre"

    def __post_init__(self):
        super().__post_init__()
        check_positive(margin=self.margin)

    def loss_terms(
        self,
        nets: Nets,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        memory: PyTree,
        step: Array,
    ) -> Signals:
        maps = self.maps(student, teacher)
        _, mapped, targets, state = connect(nets, "regressor", *maps)
        distances = [
            boundary_distance(s, t, margin=self.margin)
            for s, t in zip(mapped, targets, strict=True)
        ]
        return Signals(
            values={"boundary": sum(distances[1:], start=distances[0])},
            state={"regressor": state},
        )


make = AB
