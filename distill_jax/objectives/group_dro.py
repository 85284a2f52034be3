"""A round of feature discovery (RFC / Bonsai, Zhang, Lopez-Paz, Bottou 2022, arXiv:2203.15516).

Networks of earlier rounds split the examples into those that they classify correctly and those that
they do not. A new network minimizes the largest of the mean losses of these 2r groups (algorithm 1,
by group DRO; Sagawa et al. 2020, arXiv:1911.08731). A network that uses the features of an earlier
round fails on the errors of that round, so it must find other features. Round 0 is
`objectives.supervised`; every round starts from scratch.

Groups are assigned per batch, and the largest mean is that of the batch; the authors use the whole
training set as one batch. Their L2 term is `optim.weight_decay`.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from distill_jax.core import ranges
from distill_jax.core.api import Array, Batch, Nets, Objective, PyTree, Role, Terms
from distill_jax.losses.classification import cross_entropy
from distill_jax.losses.groups import worst_group
from distill_jax.objectives._distillation import ask_teacher


def check_rounds(rounds: int) -> None:
    ranges.depths(rounds=rounds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupDRO(Objective):
    """The loss term `cross_entropy`, whose mean is over the worst group.

    Attributes:
      rounds: r, the number of earlier rounds, whose networks are `teacher1` to `teacher<r>`.
    """

    rounds: int = 1

    couples_batch: ClassVar[bool] = True

    def __post_init__(self):
        check_rounds(self.rounds)

    @property
    def roles(self) -> tuple[Role, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("student", *(f"teacher{j + 1}" for j in range(self.rounds)))

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        student, state = nets("student", batch["input"], train=True)
        value = cross_entropy(student["logits"], batch["label"])
        right = []
        for role in self.roles[1:]:
            logits = ask_teacher(nets, batch, role=role)["logits"]
            right.append(logits.argmax(-1) == batch["label"])
        member = jnp.stack([*right, *(~r for r in right)], axis=1)
        worst = worst_group(jax.lax.stop_gradient(value), member, batch["mask"])
        return Terms(
            values={"cross_entropy": worst * value},
            counts={"cross_entropy": worst},
            state={"student": state},
            logits={"student": student["logits"]},
        )


make = GroupDRO
