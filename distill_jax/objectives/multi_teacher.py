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

Deviation: the second part of CA-MKD, matching of intermediate features, is left out. Its first part
uses the cross-entropy with the teachers, which has the same gradient.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array, Batch, Nets, Objective, PyTree, Terms
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.losses.classification import distillation_kl
from distill_jax.objectives._distillation import (
    ask_teacher,
    check_not_negative,
    check_positive,
    check_same_classes,
)
from distill_jax.objectives._labels import check_smoothing, label_loss, shown

COMBINATIONS = ("probabilities", "logits", "confidence")


def confidence_weights(losses: Array) -> Array:
    """Returns teacher weights from losses, `[b, m] -> [b, m]`; rows sum to 1, m is at least 2."""
    return (1 - jax.nn.softmax(losses)) / (losses.shape[-1] - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiTeacher(Objective):
    """Distillation of logits from several frozen teachers with the same classes.

    Terms: `cross_entropy`, and `distillation/<role>` for each teacher, which a weighting can
    reweight; one term `distillation` if logits are averaged. The "teacher" passed to a weighting is
    the mixture of the teachers' probabilities.

    Attributes:
      teachers: roles of the teachers.
      combination: one of `COMBINATIONS`.
      weights: weights of the teachers, in their order, 0 or more; scaled to sum to 1. Equal where
        left out. Not with "confidence".
      distillation_weight: coefficient of distillation, 0 or more; 1 in CA-MKD.
      label_weight: coefficient of the cross-entropy with the labels, 0 or more; 1 in CA-MKD.
      temperature: T of all softmaxes, positive; 4 in CA-MKD.
      label_smoothing: of the label term, in [0, 1).
    """

    teachers: tuple[str, ...] = ("teacher1", "teacher2")
    combination: str = "probabilities"
    weights: tuple[float, ...] = ()
    distillation_weight: float = 1.0
    label_weight: float = 1.0
    temperature: float = 4.0
    label_smoothing: float = 0.0

    def __post_init__(self):
        check_smoothing(self.label_smoothing)
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
        values = {"cross_entropy": label_loss(own, batch, smoothing=self.label_smoothing)}
        coef: dict[str, Any] = {"cross_entropy": self.label_weight}
        weights = {}
        if self.combination == "logits":
            mean: Any = sum(shares[role] * logits for role, logits in said.items())
            values["distillation"] = distillation_kl(own, mean, temperature=t)
            coef["distillation"] = self.distillation_weight
        else:
            for role, logits in said.items():
                values[f"distillation/{role}"] = distillation_kl(own, logits, temperature=t)
                coef[f"distillation/{role}"] = self.distillation_weight * shares[role]
        if self.combination == "confidence":
            # In nats, for any share of labels; equal weights where there is no label.
            plain = {name: x for name, x in batch.items() if name != "labelled"}
            losses = [label_loss(logits, plain, smoothing=0.0) for logits in said.values()]
            confidence = confidence_weights(shown(batch)[:, None] * jnp.stack(losses, axis=1))
            for m, role in enumerate(said):
                weights[f"distillation/{role}"] = confidence[:, m]
                coef[f"distillation/{role}"] = self.distillation_weight
        mixture: Any = sum(shares[role] * jax.nn.softmax(z) for role, z in said.items())
        log_mixture = jnp.log(jnp.maximum(mixture, jnp.finfo(mixture.dtype).tiny))
        return Terms(
            values=values,
            coef=coef,
            state={"student": state},
            weights=weights,
            logits={"student": own, "teacher": log_mixture, **said},
        )


make = MultiTeacher
