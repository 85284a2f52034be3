"""Knowledge review (Chen et al. 2021, arXiv:2104.09044).

`L = label_weight CE + weight sum_stages HCL(fused_i, t_i)`. Each stage of the student is fused, by
learned gates, with the result of its deeper stages. It is compared with the teacher's stage by the
hierarchical context loss, the mean squared error at several pooled sizes.

The pyramid has the full size and 4x4, 2x2 and 1x1, where these are smaller than the map. `warmup`
increases the weight over the first epochs, as in public programs of the method.

Networks: student; teacher; fusion, model `review_fusion`. The published stages end with the pooled
feature, and the teacher's are taken before the activation:
`student_stages=("stage1", "stage2", "stage3", "embedding")`,
`teacher_stages=("stage1_pre", "stage2_pre", "stage3_pre", "embedding")`.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp

from distill_jax.core.api import Array, Batch, Nets, Outputs, PyTree
from distill_jax.core.durations import steps
from distill_jax.losses.features import hierarchical_distance
from distill_jax.objectives._distillation import Signals, check_durations
from distill_jax.objectives._features import StageDistillation, connected


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReviewKD(StageDistillation):
    """Distance of stages of the teacher from a review of the student's stages.

    Attributes:
      weight: coefficient of the distance; 0.5 to 10.
      warmup: duration over which the weight grows linearly to its value; 0 to 20 epochs.
      steps_per_epoch: length of an epoch; set by a run, required for durations in epochs.
    """

    weight: float = 1.0
    warmup: float | str = 0
    steps_per_epoch: float | None = None

    schedules: ClassVar[Mapping[str, str]] = {"warmup": "ramp"}
    roles: ClassVar[tuple[str, ...]] = ("student", "teacher", "fusion")

    def __post_init__(self):
        super().__post_init__()
        check_durations(self, "warmup")

    def loss_terms(
        self,
        nets: Nets,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        memory: PyTree,
        step: Array,
    ) -> Signals:
        maps, targets = self.maps(student, teacher)
        outputs, state = nets("fusion", *maps, *targets, train=True)
        fused = connected(outputs, targets, role="fusion")
        distances = [hierarchical_distance(s, t) for s, t in zip(fused, targets, strict=True)]
        coef: dict[str, float | Array] = {}
        if warmup := steps(self.warmup, "warmup", steps_per_epoch=self.steps_per_epoch):
            coef["review"] = self.weight * jnp.minimum((step + 1) / warmup, 1.0)
        return Signals(
            values={"review": sum(distances[1:], start=distances[0])},
            coef=coef,
            state={"fusion": state},
        )


make = ReviewKD
