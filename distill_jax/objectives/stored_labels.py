"""Stored soft labels of single crops, and their weights: FKD and FerKD.

FKD (Shen, Xing 2022, "A Fast Knowledge Distillation Framework for Visual Recognition",
arXiv:2112.01528): `L = -sum_c q_c log p_c` without temperature or label term, where q is a
teacher's output on one of M stored crops. The crops are `data.views=M`, their labels a cache of the
teacher with M views (`cache.dir`), and its codecs `cache.top_k` and `cache.rest`:

    hard                   top_k=1, rest=drop
    smoothing              top_k=1, rest=spread
    marginal smoothing     top_k=5, rest=spread
    marginal renormalised  top_k=5, rest=drop

FerKD (Shen 2023, "FerKD: Surgical Label Adaptation for Efficient Distillation",
arXiv:2312.17473): crops are distinguished by the teacher's confidence
(`losses.stored_labels.adapt_labels`), and `L = sum_b w_b CE(q'_b, p_b) / sum_b w_b`.

Deviations: the paper's thresholds could not be confirmed, so none is a default. The upper threshold
is part of the method according to a second-hand source. A teacher may also be called in every step;
if gradients are accumulated and crops discarded, it is then called twice, first to count the crops.
"""

import dataclasses
from typing import ClassVar

import jax

from distill_jax.core.api import Array, Batch, Nets, Objective, PyTree, Terms
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.losses.classification import soft_cross_entropy
from distill_jax.losses.stored_labels import adapt_labels
from distill_jax.objectives._distillation import ask_teacher, check_same_classes
from distill_jax.objectives._labels import check_smoothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredLabels(Objective):
    """Cross-entropy with a teacher's label for each crop, kept, calibrated or discarded.

    By default every label is kept (FKD). The mean is over the crops that are used; `kept` is logged
    and is not part of the loss.

    Attributes:
      low: crops below this confidence are discarded; in [0, 1], 0 discards none.
      mid: crops below this confidence get the softened true label; 0 calibrates none, above 1 all.
      high: crops above this confidence are discarded; 1 discards none.
      smoothing: label smoothing of the true label, in [0, 1).
      score: definition of confidence: "max", the teacher's largest probability, or "label", that of
        the true class, which does not penalize crops that show two objects.
    """

    low: float = 0.0
    mid: float = 0.0
    high: float = 1.0
    smoothing: float = 0.1
    score: str = "max"

    roles: ClassVar[tuple[str, ...]] = ("student", "teacher")

    def __post_init__(self):
        check_smoothing(self.smoothing)
        if self.score not in ("max", "label"):
            raise ArgumentError(
                f"unknown score {self.score!r}",
                where="score",
                hint=nearest(self.score, ("max", "label")),
            )
        if not (0 <= self.low <= self.high <= 1 and self.mid >= 0):
            raise ArgumentError(
                f"low {self.low}, mid {self.mid}, high {self.high}",
                where="low",
                hint="0 <= low <= high <= 1 and mid 0 or more",
            )

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        outputs, state = nets("student", batch["input"], train=True)
        probs = teacher_probs(nets, batch)
        check_same_classes(outputs["logits"], probs)
        target, used = adapt_labels(
            probs,
            batch["label"],
            low=self.low,
            mid=self.mid,
            high=self.high,
            smoothing=self.smoothing,
            score=self.score,
        )
        loss = soft_cross_entropy(outputs["logits"], target)
        discards = self.low > 0 or self.high < 1
        return Terms(
            values={"stored_labels": loss * used, "kept": used},
            counts={"stored_labels": used} if discards else {},
            coef={"kept": 0.0},
            state={"student": state},
            logits={"student": outputs["logits"]},
        )


def teacher_probs(nets: Nets, batch: Batch) -> Array:
    """Returns the teacher's label `[b, k]` of each input; for a mixture, that of its two crops."""
    if "mix" not in batch:
        return jax.nn.softmax(ask_teacher(nets, batch)["logits"])
    first, second = (
        jax.nn.softmax(
            ask_teacher(nets, {**batch, "teacher_input": batch["crops"][:, i]})["logits"]
        )
        for i in (0, 1)
    )
    share = batch["mix"][:, None]
    return share * first + (1 - share) * second


make = StoredLabels
