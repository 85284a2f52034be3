"""SALT: a small language model teaches a larger one at the beginning (Rawat et al. 2024,
arXiv:2410.18779).

In the first stage `L = (1 - omega) CE(student, target) + omega KL(p_T || p_S)`, with
`p_T = softmax(z_T / rho)` of a frozen, smaller teacher, means over all targets; later the loss is
the cross-entropy alone (section 3). A teacher that returns its k most probable tokens (`top=k`) is
compared on these and on all others as one entry, with rho 1.

Controls: `labels="uniform"` puts the uniform distribution in the teacher's place and needs none
(label smoothing of weight omega in the first stage); `teaching="100 %"` distils throughout.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp

from distill_jax.core import durations, ranges
from distill_jax.core.api import TASKS, Array, Batch, Nets, Objective, PyTree, Terms
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.losses.sequence import softmax_divergence, sparse_divergence
from distill_jax.objectives import _tokens
from distill_jax.objectives.next_token import NextToken

LABELS = ("teacher", "uniform")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Salt(Objective):
    """Distillation in the first stage, next-token training in the second.

    Attributes:
      omega: weight of the distillation term in the first stage, in [0, 1].
      rho: temperature of the teacher's softmax, positive.
      teaching: length of the first stage, a duration.
      ramp: duration over which omega falls to 0 after it; 0 is a sudden end.
      labels: "teacher", or "uniform" for the control.
      total_steps: length of training, for durations in percent.
      steps_per_epoch: length of an epoch, for durations in epochs.
    """

    omega: float = 2 / 3
    rho: float = 1.0
    teaching: int | float | str = "20 %"
    ramp: int | float | str = 0
    labels: str = "teacher"
    total_steps: int | None = None
    steps_per_epoch: float | None = None

    tasks: ClassVar[tuple[str, ...]] = TASKS
    auxiliary: ClassVar[tuple[str, ...]] = ("student", "teacher")
    couples_batch: ClassVar[bool] = False
    schedules: ClassVar[Mapping[str, str]] = {"teaching": "ramp", "ramp": "ramp"}

    def __post_init__(self):
        ranges.within("[0, 1]", omega=self.omega)
        ranges.within("(0, inf)", rho=self.rho)
        if self.labels not in LABELS:
            hint = nearest(self.labels, LABELS)
            raise ArgumentError(f"labels is {self.labels!r}", where="labels", hint=hint)
        for name in self.schedules:
            self._steps(name)

    @property
    def roles(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("student", "teacher") if self.labels == "teacher" else ("student",)

    def _steps(self, name: str) -> float:
        lengths: Any = {"total_steps": self.total_steps, "steps_per_epoch": self.steps_per_epoch}
        return durations.steps(getattr(self, name), name, **lengths)

    def weight(self, step: Array) -> Array:
        """Returns the weight of the distillation term at a step, a scalar."""
        taught, ramp = self._steps("teaching"), self._steps("ramp")
        left = (step < taught) if not ramp else jnp.clip((taught + ramp - step) / ramp, 0, 1)
        return self.omega * jnp.asarray(left, jnp.float32)

    def phases(self) -> Sequence[tuple[int | float | str, Objective]]:
        """Returns the two stages; the steps of the second have no teacher."""
        end = self._steps("teaching") + self._steps("ramp")
        if not end or (self.total_steps is not None and end >= self.total_steps):
            return ((0, self),)
        return ((0, self), (math.ceil(end), NextToken()))

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        teacher = _tokens.ask_teacher(nets, batch) if self.labels == "teacher" else {}
        top = _tokens.top_of(teacher)
        asked = () if top is None else (top.index,)
        student, state, log_prob, others = _tokens.ask_student(nets, batch, *asked, teacher=teacher)
        if top is not None:
            if self.rho != 1:
                raise ArgumentError(
                    f"rho is {self.rho}, and the teacher's log-probabilities of its top tokens are "
                    "those of rho 1",
                    where="rho",
                    hint="rho=1, or a teacher of all logits, with top=0",
                )
            value = sparse_divergence("forward", top, others)
        else:
            _tokens.check_dense(student, teacher)
            own = student["logits"]
            logits = teacher["logits"] / self.rho if teacher else jnp.zeros_like(own)
            value = softmax_divergence("forward", logits, own)
        mask, weight = batch["target_mask"], self.weight(step)
        return Terms(
            values={"distillation": value * mask, "cross_entropy": -log_prob * mask},
            counts={"distillation": mask, "cross_entropy": mask},
            coef={"distillation": weight, "cross_entropy": 1 - weight},
            state={"student": state},
        )


make = Salt
