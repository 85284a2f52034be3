"""Ranking with known relevances, with a curriculum or without (MacAvaney et al. 2020, "Training
Curricula for Open Domain Answer Re-Ranking", arXiv:2004.14269).

A list has n candidates with scores s and relevances r. Losses: `pointwise`, the mean over
candidates of the binary cross-entropy of s and r / grades; `pairwise`, the mean over pairs with
r_i > r_j of `log(1 + exp(s_j - s_i))`; `listwise`, the cross-entropy of the softmax of s and the
gains `2^r - 1`, divided by their sum.

In a curriculum of length m, a candidate or pair of the ease d in [0, 1] has the weight
`w = d (1 - t / m) + t / m` at step t, and 1 from m on (section 3). The transform `ranking_ease`
makes d from the scores of a first-stage ranker. `level="batch"` weights the mean loss of a batch by
its mean weight, as the released program does; it is a schedule of the learning rate.

Deviations: t counts steps, the paper's epochs. Weights are not rescaled to a mean of 1: each arm of
a comparison needs its own learning rate.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from distill_jax.core import durations, ranges
from distill_jax.core.api import Array, Batch, Nets, Objective, PyTree, Terms
from distill_jax.core.errors import ArgumentError, nearest

LOSSES = ("pointwise", "pairwise", "listwise")
LEVELS = ("example", "batch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking(Objective):
    """Term `ranking`; with a curriculum the mean weight of a list is logged as `ease_weight`.

    An example is a list: the student returns `logits` `[b, n]`, labels are relevances `[b, n]`, 0
    or more, and `labelled` is 0 for candidates that are absent.

    Attributes:
      rank_loss: "pointwise", "pairwise" or "listwise".
      grades: the relevance that counts as certain in the pointwise loss.
      ramp: m, a duration; 0 is no curriculum.
      level: "example" or "batch".
      total_steps: length of training, for durations in percent.
      steps_per_epoch: length of an epoch, for durations in epochs.
    """

    rank_loss: str = "pairwise"
    grades: float = 1.0
    ramp: int | float | str = 0
    level: str = "example"
    total_steps: int | None = None
    steps_per_epoch: float | None = None

    roles: ClassVar[tuple[str, ...]] = ("student",)
    tasks: ClassVar[tuple[str, ...]] = ("multilabel", "regression")
    schedules: ClassVar[Mapping[str, str]] = {"ramp": "ramp"}

    def __post_init__(self):
        ranges.within("(0, inf)", grades=self.grades)
        for name, known in (("rank_loss", LOSSES), ("level", LEVELS)):
            if (value := getattr(self, name)) not in known:
                raise ArgumentError(f"no {name} {value!r}", where=name, hint=nearest(value, known))
        if self._steps() and self.rank_loss == "listwise":
            raise ArgumentError(
                "a curriculum weights candidates or pairs, and the loss is of lists",
                where="ramp",
                hint="rank_loss pairwise or pointwise, or ramp 0",
            )

    @property
    def couples_batch(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.level == "batch" and bool(self._steps())

    def _steps(self) -> float:
        lengths: Any = {"total_steps": self.total_steps, "steps_per_epoch": self.steps_per_epoch}
        return durations.steps(self.ramp, "ramp", **lengths)

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        outputs, state = nets("student", batch["input"], train=True)
        scores, label = outputs["logits"], batch["label"]
        if scores.shape != label.shape or scores.ndim != 2:
            raise ArgumentError(
                f"scores of shape {scores.shape}, relevances {label.shape}",
                where="student",
                hint="one score for each candidate of a list, [b, n]",
            )
        relevance = label.astype(scores.dtype)
        mask = jnp.broadcast_to(batch.get("labelled", jnp.ones_like(relevance)), scores.shape)
        if self.rank_loss == "listwise":
            value = listwise(scores, relevance, mask)
            return Terms(
                values={"ranking": value}, state={"student": state}, logits={"student": scores}
            )
        if self.rank_loss == "pointwise":
            losses = optax.sigmoid_binary_cross_entropy(scores, relevance / self.grades)
            counted = (mask > 0).astype(scores.dtype)
        else:
            losses = jax.nn.softplus(scores[:, None] - scores[:, :, None])
            both = (mask[:, :, None] > 0) & (mask[:, None] > 0)
            ordered = both & (relevance[:, :, None] > relevance[:, None])
            losses, counted = (
                x.reshape(len(scores), -1) for x in (losses, ordered.astype(scores.dtype))
            )
        total = jnp.maximum(counted.sum(1), 1)
        values, coef = {}, {}
        if ramp := self._steps():
            weights = self._weights(batch, losses, step / ramp)
            mean = (counted * weights).sum(1) / total
            values, coef = {"ease_weight": mean}, {"ease_weight": 0.0}
            if self.level == "batch":
                real = batch["mask"]
                weights = ((real * mean).sum() / jnp.maximum(real.sum(), 1))[None, None]
            losses = weights * losses
        values["ranking"] = (counted * losses).sum(1) / total
        return Terms(values=values, coef=coef, state={"student": state}, logits={"student": scores})

    def _weights(self, batch: Batch, losses: Array, share: Array) -> Array:
        """Returns `d (1 - t / m) + t / m`, of the shape of the losses."""
        ease = batch.get("ease")
        pairs = self.rank_loss == "pairwise"
        if ease is None or ease.ndim != 2 + pairs:
            given = "none" if ease is None else f"one of shape {ease.shape}"
            raise ArgumentError(
                f"a curriculum needs the ease of {'pairs' if pairs else 'candidates'}, and the "
                f"batch has {given}",
                where="ramp",
                hint=f"the transform ranking_ease with pairs={pairs}",
            )
        done = jnp.minimum(share, 1).astype(losses.dtype)
        return ease.reshape(losses.shape) * (1 - done) + done


def listwise(scores: Array, relevance: Array, mask: Array) -> Array:
    """Returns the cross-entropy of the softmax of scores and the normalized gains, `[b]`.

    It is 0 for a list without a relevant candidate.

    Args:
      scores: `[b, n]`.
      relevance: `[b, n]`, 0 or more.
      mask: `[b, n]`, 0 for candidates that are absent.
    """
    gains = jnp.where(mask > 0, jnp.exp2(relevance) - 1, 0)
    total = gains.sum(1, keepdims=True)
    target = gains / jnp.where(total > 0, total, 1)
    logs = jax.nn.log_softmax(jnp.where(mask > 0, scores, -1e30))
    return -jnp.where(mask > 0, target * logs, 0).sum(1)


make = Ranking
