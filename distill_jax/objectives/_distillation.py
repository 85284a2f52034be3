"""Base class of the distillation methods: labels, softened logits, and further loss terms."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from distill_jax.core import durations, ranges
from distill_jax.core.api import Array, Batch, Nets, Outputs, PyTree, Role, State, Terms
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.losses.classification import shift_logits
from distill_jax.objectives._tasks import OfTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(OfTask):
    """`label_weight CE + distillation_weight T^2 KL(teacher_T || student_T) + weight * signal`.

    A method adds its signal in `loss_terms`. Each signal is a separate loss term, which a weighting
    can reweight. For several labels or real values, the other two terms are those of the task; a
    method whose signal does not depend on classes names these tasks in `tasks`.

    Attributes:
      weight: coefficient of the method's own loss term, 0 or more.
      label_weight: coefficient of the label loss, 0 or more.
      distillation_weight: coefficient of the term of Hinton et al. 2015. At 0 the term is left out.
      temperature: T of both softmaxes, positive.
    """

    weight: float = 1.0
    label_weight: float = 1.0
    distillation_weight: float = 0.0
    temperature: float = 4.0

    roles: ClassVar[tuple[Role, ...]] = ("student", "teacher")
    couples_batch: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ("classification",)

    def __post_init__(self):
        super().__post_init__()
        check_positive(temperature=self.temperature)
        check_not_negative(
            weight=self.weight,
            label_weight=self.label_weight,
            distillation_weight=self.distillation_weight,
        )

    def loss_terms(
        self,
        nets: Nets,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        memory: PyTree,
        step: Array,
    ) -> "Signals":
        """Returns the loss terms of the method.

        Args:
          nets: the networks, for connectors.
          student: outputs of the student in training mode.
          teacher: outputs of the teacher, without gradient.
          batch: the batch.
          memory: the objective's memory.
          step: int32 scalar, the number of finished steps.
        """
        raise NotImplementedError

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        student, state = nets("student", batch["input"], train=True)
        teacher = ask_teacher(nets, batch)
        signals = self.loss_terms(nets, student, teacher, batch, memory, step)
        values = dict(signals.values)
        coef: dict[str, Any] = {name: self.weight for name in signals.values}
        if self.label_weight:
            name, value = self.label_term(student["logits"], batch)
            values[name], coef[name] = value, self.label_weight
        if self.distillation_weight:
            check_same_classes(student["logits"], teacher["logits"])
            values["distillation"] = self.distillation(
                student["logits"], teacher["logits"], temperature=self.temperature
            )
            coef["distillation"] = self.distillation_weight
        logits = {"student": student["logits"]}
        if "logits" in teacher:  # a teacher of features alone has none
            logits["teacher"] = teacher["logits"]
        return Terms(
            values=values,
            coef={**coef, **signals.coef},
            state={"student": state, **signals.state},
            memory=signals.memory,
            weights=signals.weights,
            logits=logits,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signals:
    """The loss terms and new states that a method adds to the base loss.

    Attributes:
      values: per-example losses `[b]` by name.
      coef: coefficients by name. A missing name takes the objective's `weight`.
      state: new state of connectors.
      memory: the new memory; None keeps the old one.
      weights: per-example weights `[b]` by name, 1 where left out.
    """

    values: Mapping[str, Array]
    coef: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    state: Mapping[Role, State] = dataclasses.field(default_factory=dict)
    memory: PyTree = None
    weights: Mapping[str, Array] = dataclasses.field(default_factory=dict)


def ask_teacher(nets: Nets, batch: Batch, *, role: Role = "teacher") -> Outputs:
    """Returns a frozen teacher's outputs for a batch, without gradient, in evaluation mode.

    The teacher's input is `teacher_input` where a transform provides one, else the student's input.
    Its logits are rolled by `teacher_shift` where the batch has it.
    """
    outputs, _ = nets(role, batch.get("teacher_input", batch["input"]))
    outputs = dict(jax.lax.stop_gradient(outputs))
    if "teacher_shift" in batch:
        outputs["logits"] = damaged(outputs["logits"], batch)
    return outputs


def damaged(logits: Array, batch: Batch) -> Array:
    """Returns a teacher's logits `[b, k]`, rolled by `teacher_shift` of the batch."""
    return shift_logits(logits, batch["teacher_shift"]) if "teacher_shift" in batch else logits


def check_same_classes(student: Array, teacher: Array, *, role: Role = "teacher") -> None:
    """Raises `ArgumentError` unless both networks have the same number of classes."""
    if student.shape != teacher.shape:
        raise ArgumentError(
            f"the {role} has {teacher.shape[-1]} classes and the student {student.shape[-1]}",
            where=role,
            hint="distillation of logits needs the same classes in the same order; `classes` of a "
            "role maps others to them",
        )


def endpoint(outputs: Outputs, name: str, *, role: Role, where: str) -> Array:
    """Returns a named output of a network.

    Raises:
      ArgumentError: the network has no such output.
    """
    if name not in outputs:
        raise ArgumentError(
            f"{role} has no output {name!r}",
            where=where,
            hint=nearest(name, outputs),
        )
    return outputs[name]


def check_positive(**values: Any) -> None:
    """Raises `ArgumentError` for a hyperparameter that is not above 0."""
    ranges.within("(0, inf)", **values)


def check_not_negative(**values: Any) -> None:
    """Raises `ArgumentError` for a hyperparameter below 0."""
    ranges.within("[0, inf)", **values)


def check_durations(objective: Any, *names: str) -> None:
    """Raises `ArgumentError` for an invalid duration, or one that needs a length not given."""
    if objective.steps_per_epoch is not None:
        check_positive(steps_per_epoch=objective.steps_per_epoch)
    for name in names:
        durations.steps(getattr(objective, name), name, steps_per_epoch=objective.steps_per_epoch)
