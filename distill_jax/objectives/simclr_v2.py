"""Distillation of a fine-tuned encoder on unlabelled images (SimCLRv2, Chen et al. 2020b).

`L = (1 - alpha) CE(student(x), y; labelled x) + alpha T^2 KL(teacher_T(x) || student_T(x); all x)`,
arXiv:2006.10029, eq. 2 and 3; alpha is 1 as published. The cross-entropy with the teacher and the
divergence from it differ by a constant.

The teacher is a network trained by `finetune`: an encoder, a head and, with `projector`, the first
layers of its projector. The student is a classifier of any kind.
"""

import dataclasses
from typing import ClassVar

import jax

from distill_jax.core.api import Array, Batch, Nets, Objective, PyTree, Terms
from distill_jax.core.errors import ArgumentError
from distill_jax.losses.classification import distillation_kl
from distill_jax.objectives._distillation import (
    check_positive,
    check_same_classes,
    damaged,
    endpoint,
)
from distill_jax.objectives._labels import label_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimCLRv2(Objective):
    """The terms "distillation" and, where alpha is below 1, "cross_entropy".

    Attributes:
      alpha: share of the distillation term, above 0 and at most 1.
      temperature: T of both softmaxes, positive.
      projector: whether the teacher includes layers of the projector.
      output: output of the teacher's encoder that is the input of these layers or of the head.
    """

    alpha: float = 1.0
    temperature: float = 1.0
    projector: bool = False
    output: str = "embedding"

    couples_batch: ClassVar[bool] = False

    def __post_init__(self):
        check_positive(temperature=self.temperature)
        if not 0 < self.alpha <= 1:
            raise ArgumentError(f"alpha is {self.alpha}", where="alpha", hint="0 < alpha <= 1")

    @property
    def roles(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        middle = ("teacher_projector",) if self.projector else ()
        return ("student", "teacher", *middle, "teacher_head")

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        del memory, step
        student, state = nets("student", batch["input"], train=True)
        encoded, _ = nets("teacher", batch.get("teacher_input", batch["input"]))
        x = endpoint(encoded, self.output, role="teacher", where="output")
        if self.projector:
            x = nets("teacher_projector", x)[0]["output"]
        teacher = jax.lax.stop_gradient(nets("teacher_head", x)[0]["logits"])
        teacher = damaged(teacher, batch)
        check_same_classes(student["logits"], teacher, role="teacher_head")
        divergence = distillation_kl(student["logits"], teacher, temperature=self.temperature)
        values, coef = {"distillation": divergence}, {"distillation": self.alpha}
        if self.alpha < 1:
            values["cross_entropy"] = label_loss(student["logits"], batch, smoothing=0.0)
            coef["cross_entropy"] = 1 - self.alpha
        return Terms(
            values=values,
            coef=coef,
            state={"student": state},
            logits={"student": student["logits"], "teacher": teacher},
        )


make = SimCLRv2
