"""Synthesis of discovered features (RFC / Bonsai, Zhang, Lopez-Paz, Bottou 2022, arXiv:2203.15516).

A new network with one head for each round of discovery learns the hard predictions of the rounds'
networks, `L = mean_j CE(head_j, argmax teacher_j)` (algorithm 1, synthesis). Half of the weight is
on examples on which all rounds are right or all are wrong, half on the others; the authors sample
such examples more often instead. Later training starts from the features of all rounds and from the
mean of the heads.

Here head j is the student's own classifier plus `heads_j - mean_j heads_j`. Any r heads can be
written in this form, and the student's classifier is their mean, ready for later training.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from distill_jax.core import ranges
from distill_jax.core.api import Array, Batch, Nets, Objective, PyTree, Role, Terms
from distill_jax.core.errors import ArgumentError
from distill_jax.losses.classification import cross_entropy
from distill_jax.losses.groups import balanced_weights
from distill_jax.objectives._distillation import ask_teacher, endpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardLabelHeads(Objective):
    """Term `synthesis`. Network `heads` maps the student's `feature` to `[b, rounds * k]`.

    Attributes:
      rounds: r, at least 2; the networks of the rounds are `teacher1` to `teacher<r>`.
      feature: the output of the student that is the input of its classifier.
    """

    rounds: int = 2
    feature: str = "embedding"

    couples_batch: ClassVar[bool] = True

    def __post_init__(self):
        ranges.depths(rounds=self.rounds)
        if self.rounds < 2:
            raise ArgumentError(
                f"rounds is {self.rounds}",
                where="rounds",
                hint="at least 2: one round has nothing to be compared with",
            )

    @property
    def roles(self) -> tuple[Role, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("student", *(f"teacher{j + 1}" for j in range(self.rounds)), "heads")

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        student, state = nets("student", batch["input"], train=True)
        logits = student["logits"]
        feature = endpoint(student, self.feature, role="student", where="feature")
        outputs, heads_state = nets("heads", feature, train=True)
        b, k = logits.shape
        if outputs["output"].shape != (b, self.rounds * k):
            raise ArgumentError(
                f"heads gives {outputs['output'].shape[1:]} numbers an example",
                where="heads.kwargs.features",
                hint=f"{self.rounds} rounds times {k} classes: {self.rounds * k}",
            )
        apart = outputs["output"].reshape(b, self.rounds, k)
        heads = logits[:, None] + apart - apart.mean(1, keepdims=True)
        values, right = [], []
        for j in range(self.rounds):
            said = ask_teacher(nets, batch, role=f"teacher{j + 1}")["logits"].argmax(-1)
            values.append(cross_entropy(heads[:, j], said))
            right.append(said == batch["label"])
        agree = jnp.stack(right).all(0) | ~jnp.stack(right).any(0)
        weights = balanced_weights(jnp.stack([agree, ~agree], axis=1), batch["mask"])
        return Terms(
            values={"synthesis": sum(values[1:], values[0]) / self.rounds},
            weights={"synthesis": weights},
            state={"student": state, "heads": heads_state},
            logits={"student": logits},
        )


make = HardLabelHeads
