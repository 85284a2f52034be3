"""PG-RANK: policy gradients for ranking (Gao et al. 2023, "Policy-Gradient Training of Language
Models for Ranking", arXiv:2310.04407).

The scores of n candidates give a Plackett-Luce distribution of rankings, and training maximizes the
expected nDCG. Of K sampled rankings, `(1/K) sum_k (U_k - mean_(l != k) U_l) grad log pi(r_k)` is an
unbiased estimate of its gradient. Rankings are drawn by sorting scores with the Gumbel noise that
the transform `gumbel_noise` puts into the batch, so that they are a function of seed, epoch and
example.

An example is a list: the student returns a score for each candidate as `logits` `[b, n]`, labels
are their relevances `[b, n]`, 0 or more, and `labelled` is 0 for candidates that are absent.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from distill_jax.core import ranges
from distill_jax.core.api import Array, Batch, Nets, Objective, PyTree, Terms
from distill_jax.core.errors import ArgumentError
from distill_jax.losses import listwise


@dataclasses.dataclass(frozen=True, kw_only=True)
class PGRank(Objective):
    """Term `policy_gradient`; `utility`, the nDCG of the sampled rankings, is logged.

    Attributes:
      cutoff: number of ranks that count in the nDCG.
      baseline: whether the mean utility of the other rankings of a list is subtracted from that of
        each. Without it the estimate is unbiased too, and varies more.
    """

    cutoff: int = 10
    baseline: bool = True

    roles: ClassVar[tuple[str, ...]] = ("student",)
    tasks: ClassVar[tuple[str, ...]] = ("multilabel", "regression")

    def __post_init__(self):
        ranges.sizes(cutoff=self.cutoff)

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        outputs, state = nets("student", batch["input"], train=True)
        scores, label, noise = outputs["logits"], batch["label"], batch.get("gumbel")
        if noise is None or noise.ndim != 3 or noise.shape[1] < 1 + self.baseline:
            drawn = "none" if noise is None else f"noise of shape {noise.shape}"
            raise ArgumentError(
                f"rankings need noise [b, k, n], and the batch has {drawn}",
                where="batch",
                hint="the transform gumbel_noise; its rankings are 2 or more with a baseline",
            )
        if scores.shape != label.shape or noise.shape[::2] != scores.shape:
            raise ArgumentError(
                f"scores of shape {scores.shape}, relevances {label.shape}, noise {noise.shape}",
                where="student",
                hint="one score for each candidate of a list, [b, n]",
            )
        relevance = label.astype(scores.dtype)
        mask = jnp.broadcast_to(batch.get("labelled", jnp.ones_like(relevance)), scores.shape)
        rankings = listwise.plackett_luce_rankings(scores, noise, mask)
        utility = listwise.ndcg(relevance, rankings, mask, cutoff=self.cutoff)
        advantage = listwise.leave_one_out(utility) if self.baseline else utility
        log_prob = listwise.plackett_luce_log_prob(scores, rankings, mask)
        return Terms(
            values={
                "policy_gradient": -(advantage * log_prob).mean(-1),
                "utility": utility.mean(-1),
            },
            coef={"utility": 0.0},
            state={"student": state},
            logits={"student": scores},
        )


make = PGRank
