"""Factor transfer (Kim et al. 2018, arXiv:1802.04977).

`L = label_weight CE + weight mean(|f_s / |f_s| - f_t / |f_t||)
   + reconstruction_weight mean((t - P(t))^2)`

A paraphraser P, an auto-encoder of the teacher's feature t, has the factor f_t in its middle; a
translator turns the student's feature into f_s.

Deviations: the paper trains the paraphraser first; here it learns in the same run, from its own
reconstruction alone, and its factor is a target without gradient. Two runs do as the paper does:
one with `weight=0, label_weight=0`, then one with `reconstruction_weight=0` in which
`roles.paraphraser` is frozen and starts from `<the first run>#paraphraser`. The distance is a mean
over the elements of the factors, where the paper has a sum; of two factors of different size the
larger is averaged first.

No published weight belongs to this mean. The 200 of Tian et al. 2020 (arXiv:1910.10699), which is
the default, is for factors that were squared and averaged over their channels before they were
normalized, h w numbers, whose mean distance is larger than that of h w c.

Networks: student; teacher; paraphraser and translator, models of these names.
"""

import dataclasses
from typing import ClassVar

import jax

from distill_jax.core.api import Array, Batch, Nets, Outputs, PyTree
from distill_jax.losses.features import factor_distance, mean_square
from distill_jax.objectives._distillation import Distillation, Signals, check_not_negative
from distill_jax.objectives._features import connect, feature


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactorTransfer(Distillation):
    """Distance of translated from paraphrased features.

    Attributes:
      weight: of the distance of factors; 50 to 1000.
      reconstruction_weight: of the paraphraser's own loss, 0 or more; 0 for a frozen paraphraser.
      student_stage: output of the student; empty takes its last `stage<i>`.
      teacher_stage: output of the teacher; empty takes its last `stage<i>`.
    """

    weight: float = 200.0
    reconstruction_weight: float = 1.0
    student_stage: str = ""
    teacher_stage: str = ""

    roles: ClassVar[tuple[str, ...]] = ("student", "teacher", "paraphraser", "translator")

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
