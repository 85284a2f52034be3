"""Decoupled knowledge distillation (Zhao et al. 2022, arXiv:2203.08679).

The divergence of Hinton et al. 2015 is the sum of a part between the target class and the rest and
a part among the other classes, weighted by `1 - t_target`. Here each part has its own weight (eq.
7), so that the second part is not suppressed for a confident teacher:

`L = CE(student, label) + T^2 (alpha TCKD + beta NCKD)`.

Deviation: the warm-up is linear in steps rather than in whole epochs.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp

from distill_jax.core.api import Array, Batch, Nets, Outputs, PyTree
from distill_jax.core.durations import steps
from distill_jax.losses.logits import decoupled_kl, standardize
from distill_jax.objectives._distillation import (
    Distillation,
    Signals,
    check_durations,
    check_not_negative,
    check_same_classes,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DKD(Distillation):
    """Terms `tckd` and `nckd`, with coefficients `weight alpha` and `weight beta`.

    The target class is the label or, with mixed labels (`label_probs`), the largest of them.

    Attributes:
      alpha: weight of the target part, 0 or more; 1 throughout the paper.
      beta: weight of the other part, 0 or more. On CIFAR-100 from 1 to 8 with T = 4, larger for a
        larger gap between teacher and student; on ImageNet 0.5 with T = 1.
      warmup: duration over which the coefficients of both parts rise linearly to their values; 20
        epochs in the paper, of 240 on CIFAR-100.
      standardize: whether logits are standardised first (Sun et al. 2024, arXiv:2403.01427).
      steps_per_epoch: length of an epoch; set by a run, required for durations in epochs.
    """

    alpha: float = 1.0
    beta: float = 8.0
    warmup: float | str = "20 epochs"
    standardize: bool = False
    steps_per_epoch: float | None = None

    schedules: ClassVar[Mapping[str, str]] = {"warmup": "ramp"}

    def __post_init__(self):
        super().__post_init__()
        check_not_negative(alpha=self.alpha, beta=self.beta)
        check_durations(self, "warmup")

    def loss_terms(
        self,
        nets: Nets,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        memory: PyTree,
        step: Array,
    ) -> Signals:
        logits = student["logits"], teacher["logits"]
        check_same_classes(*logits)
        if self.standardize:
            logits = standardize(logits[0]), standardize(logits[1])
        mixed = batch.get("label_probs")
        target = batch["label"] if mixed is None else mixed.argmax(-1)
        tckd, nckd = decoupled_kl(*logits, target, temperature=self.temperature)
        warmup = steps(self.warmup, "warmup", steps_per_epoch=self.steps_per_epoch)
        ramp = jnp.minimum((step + 1) / max(warmup, 1), 1) * self.weight
        return Signals(
            values={"tckd": tckd, "nckd": nckd},
            coef={"tckd": self.alpha * ramp, "nckd": self.beta * ramp},
        )


make = DKD
