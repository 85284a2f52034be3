"""Knowledge distillation (Hinton, Vinyals, Dean 2015, arXiv:1503.02531).

`L = (1 - alpha) CE(student, label) + alpha T^2 KL(teacher_T || student_T)`, section 2.1. The
teacher is a frozen network in evaluation mode; its input is the same augmented view as the
student's.

With several labels, both terms use sigmoids, label by label. For real values, both are distances,
from the label and from the teacher's output (`_tasks.OfTask`).
"""

import dataclasses
from typing import ClassVar

from distill_jax.core.api import Array, Batch, Nets, PyTree, Terms
from distill_jax.core.errors import ArgumentError
from distill_jax.objectives._distillation import ask_teacher, check_positive, check_same_classes
from distill_jax.objectives._tasks import OfTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class KD(OfTask):
    """Classical distillation of logits with a constant ratio; see `OfTask` for other arguments.

    Attributes:
      temperature: T of both softmaxes in the distillation term or, with several labels, of both
        sigmoids, positive. Not for regression.
      alpha: weight of the distillation term, in [0, 1]; the label term gets `1 - alpha`.
    """

    temperature: float = 4.0
    alpha: float = 0.9

    roles: ClassVar[tuple[str, ...]] = ("student", "teacher")
    couples_batch: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        check_positive(temperature=self.temperature)
        if not 0 <= self.alpha <= 1:
            raise ArgumentError(
                f"alpha is {self.alpha}",
                where="alpha",
                hint="the teacher's share in [0, 1]; labels get 1 - alpha",
            )

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        student, state = nets("student", batch["input"], train=True)
        target = ask_teacher(nets, batch)["logits"]
        check_same_classes(student["logits"], target)
        distillation = self.distillation(student["logits"], target, temperature=self.temperature)
        name, value = self.label_term(student["logits"], batch)
        return Terms(
            values={"distillation": distillation, name: value},
            coef={"distillation": self.alpha, name: 1 - self.alpha},
            state={"student": state},
            logits={"student": student["logits"], "teacher": target},
        )


make = KD
