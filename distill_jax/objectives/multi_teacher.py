"""Distillation from several teachers: averaged, with fixed weights, or weighted by confidence.

`L = label_weight CE + distillation_weight sum_m w_m T^2 KL(teacher_m || student)`, each teacher
softened by T. For weights that sum to 1, `sum_m w_m KL(p_m || q) = KL(sum_m w_m p_m || q) + const`.
Equal weights are therefore the average of the teachers' probabilities (You et al. 2017, "Learning
from Multiple Teacher Networks"; Hinton et al. 2015, arXiv:1503.02531, section 1), but with a
separate loss term for each teacher.

* "probabilities": w as given.
* "logits": one term, against the softmax of the weighted mean of the teachers' logits.
* "confidence": for each example, `w_m = (1 - exp(L_m) / sum_j exp(L_j)) / (M - 1)` with `L_m` the
  cross-entropy of teacher m with the label (CA-MKD; Zhang, Chen, Wang 2022, arXiv:2201.00007).

With several labels, the terms are those of sigmoids, label by label, and L_m is the label loss of
teacher m; for real values they are distances, and there is no "confidence" (`_tasks.OfTask`).

Deviation: the second part of CA-MKD, matching of intermediate features, is left out. Its first part
uses the cross-entropy with the teachers, which has the same gradient.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array, Batch, Nets, PyTree, Terms
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.losses import multilabel
from distill_jax.objectives._distillation import (
    ask_teacher,
    check_not_negative,
    check_positive,
    check_same_classes,
)
from distill_jax.objectives._labels import label_loss, shown
from distill_jax.objectives._tasks import OfTask

COMBINATIONS = ("probabilities", "logits", "confidence")


def confidence_weights(losses: Array) -> Array:
    """Returns teacher weights from losses, `[b, m] -> [b, m]`; rows sum to 1, m is at least 2."""
    return (1 - jax.nn.softmax(losses)) / (losses.shape[-1] - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiTeacher(OfTask):
    """Distillation of logits from several frozen teachers with the same classes.

    Other arguments are those of `OfTask`. Terms: that of the labels, and `distillation/<role>` for
    each teacher, which a weighting can reweight; one term `distillation` if logits are averaged.
    The "teacher" passed to a weighting is the mixture of the teachers' probabilities, or the mean
    of their values.

    Attributes:
      teachers: roles of the teachers.
      combination: one of `COMBINATIONS`.
      weights: weights of the teachers, in their order, 0 or more; scaled to sum to 1. Equal where
        left out. Not with "confidence".
      distillation_weight: coefficient of distillation, 0 or more; 1 in CA-MKD.
      label_weight: coefficient of the label loss, 0 or more; 1 in CA-MKD.
      temperature: T of all softmaxes, positive; 4 in CA-MKD.
    """

    teachers: tuple[str, ...] = ("teacher1", "teacher2")
    combination: str = "probabilities"
    weights: tuple[float, ...] = ()
    distillation_weight: float = 1.0
    label_weight: float = 1.0
    temperature: float = 4.0

    def __post_init__(self):
        super().__post_init__()
        check_positive(temperature=self.temperature)
        check_not_negative(
            distillation_weight=self.distillation_weight, label_weight=self.label_weight
        )
        if self.combination not in COMBINATIONS:
            raise ArgumentError(
                f"unknown combination {self.combination!r}",
                where="combination",
                hint=nearest(self.combination, COMBINATIONS),
            )
        by_confidence = self.combination == "confidence"
        if by_confidence and self.task == "regression":
            raise ArgumentError(
                "the confidence of a teacher is a cross-entropy, and the task is regression",
                where="combination",
                hint="'probabilities' or 'logits'",
            )
        names = set(self.teachers) - {"student"}
        if len(names) < len(self.teachers) or len(names) < 1 + by_confidence:
            raise ArgumentError(
                f"the teachers are {self.teachers}",
                where="teachers",
                hint="name each role once; confidence compares at least two",
            )
        if self.weights and (
            by_confidence
            or len(self.weights) != len(self.teachers)
            or min(self.weights) < 0
            or sum(self.weights) <= 0
        ):
            raise ArgumentError(
                f"weights are {self.weights}",
                where="weights",
                hint="one number for each teacher, 0 or more; none with combination 'confidence'",
            )

    @property
    def roles(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("student", *self.teachers)

    @property
    def shares(self) -> tuple[float, ...]:
        """Fixed weights of the teachers, summing to 1."""
        weights = self.weights or (1.0,) * len(self.teachers)
        return tuple(w / sum(weights) for w in weights)

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        student, state = nets("student", batch["input"], train=True)
        own = student["logits"]
        said = {role: ask_teacher(nets, batch, role=role)["logits"] for role in self.teachers}
        for role, logits in said.items():
            check_same_classes(own, logits, role=role)
        t, shares = self.temperature, dict(zip(said, self.shares, strict=True))
        name, value = self.label_term(own, batch)
        values, coef = {name: value}, {name: self.label_weight}
        weights = {}
        if self.combination == "logits":
            mean: Any = sum(shares[role] * logits for role, logits in said.items())
            values["distillation"] = self.distillation(own, mean, temperature=t)
            coef["distillation"] = self.distillation_weight
        else:
            for role, logits in said.items():
                values[f"distillation/{role}"] = self.distillation(own, logits, temperature=t)
                coef[f"distillation/{role}"] = self.distillation_weight * shares[role]
        if self.combination == "confidence":
            losses = [self._loss_of(logits, batch) for logits in said.values()]
            confidence = confidence_weights(jnp.stack(losses, axis=1))
            for m, role in enumerate(said):
                weights[f"distillation/{role}"] = confidence[:, m]
                coef[f"distillation/{role}"] = self.distillation_weight
        return Terms(
            values=values,
            coef=coef,
            state={"student": state},
            weights=weights,
            logits={"student": own, "teacher": self._mixture(said), **said},
        )

    def _loss_of(self, logits: Array, batch: Batch) -> Array:
        """Returns a teacher's label loss `[b]`, in nats for any share of labels; 0 without one."""
        if self.task == "multilabel":
            return multilabel.binary_cross_entropy(
                logits, batch["label"], known=batch.get("labelled")
            )
        plain = {name: x for name, x in batch.items() if name != "labelled"}
        return shown(batch) * label_loss(logits, plain, smoothing=0.0)

    def _mixture(self, said: Mapping[str, Array]) -> Array:
        """Returns logits of the mixture of probabilities, or the mean of values, `[b, k]`."""

        def mean(values: Callable[[Array], Array]) -> Array:
            mixed: Any = sum(self.shares[m] * values(z) for m, z in enumerate(said.values()))
            return mixed

        if self.task == "regression":
            return mean(lambda z: z)
        tiny = lambda p: jnp.maximum(p, jnp.finfo(p.dtype).tiny)  # noqa: E731
        if self.task == "classification":
            return jnp.log(tiny(mean(jax.nn.softmax)))
        present, absent = mean(jax.nn.sigmoid), mean(lambda z: jax.nn.sigmoid(-z))
        return jnp.log(tiny(present)) - jnp.log(tiny(absent))


make = MultiTeacher
