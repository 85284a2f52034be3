"""Training of a language model on the next token.

`L = sum_bt m_bt (-log p(x_b,t+1 | x_b,..t)) / sum_bt m_bt`: the mean over all targets of a batch,
so that a row with few of them counts as little. The network is asked for the log-probabilities of
the targets alone (`core.sequences.log_probs_of`), and never holds all logits of a large vocabulary.
"""

import dataclasses
from typing import ClassVar

from distill_jax.core.api import TASKS, Array, Batch, Nets, Objective, PyTree, Terms
from distill_jax.objectives._tokens import ask_student


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken(Objective):
    """Cross-entropy of the targets, in nats."""

    roles: ClassVar[tuple[str, ...]] = ("student",)
    auxiliary: ClassVar[tuple[str, ...]] = ("student",)
    tasks: ClassVar[tuple[str, ...]] = TASKS

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        _, state, log_prob, _ = ask_student(nets, batch)
        mask = batch["target_mask"]
        return Terms(
            values={"cross_entropy": -log_prob * mask},
            counts={"cross_entropy": mask},
            state={"student": state},
        )


make = NextToken
