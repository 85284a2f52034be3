"""A harmonizer of conflicting label sources (Zhao et al. 2023, arXiv:2306.16564, section 3).

The student learns from all sources at once, by an aggregate of its losses against each of them
(`losses.votes`). `1 - p(vote)` is then the risk that a vote of one source is wrong (POLAR, section
4; `evaluators.vote_risk`). Examples without any vote count in no mean. A batch has `votes`, int
`[b, m]`, below 0 where a source abstains.

Deviation: with one source alone its loss is divided by 1 for every aggregate; the released program
sums there.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from distill_jax.core import ranges
from distill_jax.core.api import Array, Batch, Nets, Objective, PyTree, Terms
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.losses.classification import soft_cross_entropy
from distill_jax.losses.votes import AGGREGATES, majority, scalarized, vote_losses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pareto(Objective):
    """The loss term `votes`.

    Attributes:
      aggregate: "linear", "square", "norm" or "max"; or "majority", the cross-entropy with the
        majority vote, a baseline.
      source: number of the only source to learn from, from 0; all of them by default.
    """

    aggregate: str = "square"
    source: int | None = None

    roles: ClassVar[tuple[str, ...]] = ("student",)
    couples_batch: ClassVar[bool] = False

    def __post_init__(self):
        known = (*AGGREGATES, "majority")
        if self.aggregate not in known:
            hint = nearest(self.aggregate, known)
            raise ArgumentError(
                f"unknown aggregate {self.aggregate!r}", where="aggregate", hint=hint
            )
        ranges.counts(source=self.source)

    def votes(self, batch: Batch) -> Array:
        """Returns the votes that count, int `[b, m]`."""
        if "votes" not in batch:
            hint = "data of label sources, such as weak_rules"
            raise ArgumentError("the data have no votes", where="batch", hint=hint)
        votes = batch["votes"]
        if self.source is None:
            return votes
        if self.source >= votes.shape[1]:
            what = f"source is {self.source}, and there are {votes.shape[1]} sources"
            raise ArgumentError(what, where="source", hint="they are counted from 0")
        return votes[:, self.source : self.source + 1]

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        student, state = nets("student", batch["input"], train=True)
        logits, votes = student["logits"], self.votes(batch)
        losses, voted = vote_losses(logits, votes)
        if self.aggregate == "majority":
            value = soft_cross_entropy(logits, majority(votes, k=logits.shape[1]))
        else:
            value = scalarized(losses, aggregate=self.aggregate)
        some = voted.any(1)
        return Terms(
            values={"votes": jnp.where(some, value, 0)},
            counts={"votes": some.astype(logits.dtype)},
            state={"student": state},
            logits={"student": logits},
        )


make = Pareto
