"""Distillation of language models token by token.

`L = (1 - alpha) CE(student, target) + alpha T^2 D(teacher_T || student_T)`, means over all targets
(Hinton et al. 2015, arXiv:1503.02531, at each token; Kim and Rush 2016, arXiv:1606.07947, section
3.1). D is one of `losses.sequence.DIVERGENCES`.

A teacher that returns its k most probable tokens (`top=k` of a transformer) is compared on these
and on all others as one entry. Then neither network holds all logits, and k tokens and the rest are
what `cache` stores. A teacher that returns `logits` is compared on all tokens.
"""

import dataclasses
from typing import ClassVar

from distill_jax.core import ranges
from distill_jax.core.api import TASKS, Array, Batch, Nets, Objective, PyTree, Terms
from distill_jax.core.errors import ArgumentError
from distill_jax.losses.sequence import softmax_divergence, sparse_divergence
from distill_jax.objectives import _tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenKD(Objective):
    """Distillation and next-token loss with a constant ratio.

    Attributes:
      alpha: weight of the distillation term, in [0, 1]; the label term gets `1 - alpha`.
      temperature: T of both softmaxes, positive; 1 for a teacher of top tokens.
      divergence: one of `losses.sequence.DIVERGENCES`.
      share: s of the skew and Jensen-Shannon divergences, in (0, 1).
    """

    alpha: float = 0.5
    temperature: float = 1.0
    divergence: str = "forward"
    share: float = 0.5

    roles: ClassVar[tuple[str, ...]] = ("student", "teacher")
    auxiliary: ClassVar[tuple[str, ...]] = ("student", "teacher")
    tasks: ClassVar[tuple[str, ...]] = TASKS

    def __post_init__(self):
        ranges.within("[0, 1]", alpha=self.alpha)
        ranges.within("(0, inf)", temperature=self.temperature)
        _tokens.check_divergence(self.divergence, self.share)

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        teacher = _tokens.ask_teacher(nets, batch)
        top, logits = _tokens.top_of(teacher), {}
        if top is None:
            student, state, log_prob, _ = _tokens.ask_student(nets, batch, teacher=teacher)
            logits = {"student": student["logits"], "teacher": teacher["logits"]}
            _tokens.check_dense(student, teacher)
            softened = (logits[role] / self.temperature for role in ("teacher", "student"))
            value = softmax_divergence(self.divergence, *softened, share=self.share)
            value *= self.temperature**2
        else:
            if self.temperature != 1:
                raise ArgumentError(
                    f"temperature is {self.temperature}, and the teacher's log-probabilities of "
                    "its top tokens are those of temperature 1",
                    where="temperature",
                    hint="temperature=1, or a teacher of all logits, with top=0",
                )
            _, state, log_prob, asked = _tokens.ask_student(nets, batch, top.index, teacher=teacher)
            value = sparse_divergence(self.divergence, top, asked, share=self.share)
        mask = batch["target_mask"]
        return Terms(
            values={"distillation": value * mask, "cross_entropy": -log_prob * mask},
            counts={"distillation": mask, "cross_entropy": mask},
            coef={"distillation": self.alpha, "cross_entropy": 1 - self.alpha},
            state={"student": state},
            logits=logits,
        )


make = TokenKD
