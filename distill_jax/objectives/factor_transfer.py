"""Factor transfer (Kim et al. 2018, arXiv:1802.04977).

`L = label_weight CE + weight mean(|f_s / |f_s| - f_t / |f_t||)
   + reconstruction_weight mean((t - P(t))^2)`

A paraphraser P is an auto-encoder of the teacher's feature t; its bottleneck is the factor f_t. A
translator maps the student's feature to f_s.

Deviations: the paper trains the paraphraser first. Here it is trained in the same run, by its own
reconstruction loss only, and its factor is a target without gradient. Two runs reproduce the paper:
one with `weight=0, label_weight=0`, then one with `reconstruction_weight=0` in which
`roles.paraphraser` is frozen and starts from `<the first run>#paraphraser`. The distance is a mean
over the elements of the factors, where the paper has a sum. If two factors differ in size, the
larger is average-pooled first.

There is no published weight for this mean. The default, 200 from Tian et al. 2020
(arXiv:1910.10699), is for factors that were squared and averaged over their channels before
normalization. These have h w numbers, and their mean distance is larger than that of h w c numbers.

Networks: student; teacher; paraphraser and translator, models of these names.
"""

import dataclasses
from typing import ClassVar

import jax

from distill_jax.core.api import TASKS, Array, Batch, Nets, Outputs, PyTree
from distill_jax.losses.features import factor_distance, mean_square
from distill_jax.objectives._distillation import Distillation, Signals, check_not_negative
from distill_jax.objectives._features import connect, feature


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactorTransfer(Distillation):
    """Distance between translated and paraphrased features.

    Attributes:
      weight: coefficient of the distance of factors; 50 to 1000.
      reconstruction_weight: coefficient of the paraphraser's own loss, 0 or more; 0 for a frozen
        paraphraser.
      student_stage: output of the student; empty takes its last `stage<i>`.
      teacher_stage: output of the teacher; empty takes its last `stage<i>`.
    """

    weight: float = 200.0
    reconstruction_weight: float = 1.0
    student_stage: str = ""
    teacher_stage: str = ""

    roles: ClassVar[tuple[str, ...]] = ("student", "teacher", "paraphraser", "translator")
    tasks: ClassVar[tuple[str, ...]] = TASKS

    def __post_init__(self):
        super().__post_init__()
        check_not_negative(reconstruction_weight=self.reconstruction_weight)

    def loss_terms(
        self,
        nets: Nets,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        memory: PyTree,
        step: Array,
    ) -> Signals:
        own = feature(student, self.student_stage, role="student", where="student_stage")
        target = feature(teacher, self.teacher_stage, role="teacher", where="teacher_stage")
        learned = self.reconstruction_weight > 0
        paraphrased, state = nets("paraphraser", target, train=learned)
        factor = jax.lax.stop_gradient(paraphrased["factor"])
        _, translated, factors, translator = connect(nets, "translator", [own], [factor])
        values = {"factor": factor_distance(translated[0], factors[0])}
        if not learned:
            return Signals(values=values, state={"translator": translator})
        values["reconstruction"] = mean_square(target - paraphrased["output"])
        return Signals(
            values=values,
            coef={"reconstruction": self.reconstruction_weight},
            state={"translator": translator, "paraphraser": state},
        )


make = FactorTransfer
