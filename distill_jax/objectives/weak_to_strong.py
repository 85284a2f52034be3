"""Weak-to-strong generalization (Burns et al. 2023, arXiv:2312.09390, section 4.3, appendix A.4).

A weak teacher labels the examples; the student, usually a pretrained network, learns from these
labels and, by a growing share, from its own predictions:

| target | loss |
|---|---|
| `confidence` | `(1 - a) CE(weak, student) + a CE(hardened(student), student)` |
| `product` | `CE(student^a weak, student)`, the target normalized over the classes |

`hardened` is the student's own class, with the threshold at that quantile of the batch which makes
classes as frequent as the weak labels do (`losses.targets`). The share a rises linearly from 0. The
threshold counts over the batch, so the method refuses accumulation. Bootstrapping is a chain of
such runs, from a small student to a large one, each the teacher of the next.

Deviation: the rise is linear, where the released program jumps from a tenth of the way to the end.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from distill_jax.core import durations, ranges
from distill_jax.core.api import Array, Batch, Nets, Objective, PyTree, Role, Terms
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.losses.classification import soft_cross_entropy
from distill_jax.losses.targets import hardened, product
from distill_jax.objectives._distillation import ask_teacher, check_same_classes
from distill_jax.objectives._labels import label_loss

TARGETS = ("confidence", "product")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeakToStrong(Objective):
    """The terms `weak_labels` and `confidence`, or `product`, and `cross_entropy` with the labels.

    If the data hide labels (`labelled`), the terms without labels are of the others alone, so that
    a few clean labels can stand beside many weak ones.

    Attributes:
      target: "confidence" or "product".
      alpha: final a, in [0, 1]; 0 is plain training on the weak labels.
      ramp: duration over which a rises to `alpha`; 0 for a constant.
      hard: whether weak labels are one-hot, the teacher's top class.
      label_weight: coefficient of the cross-entropy with labels, 0 or more.
      beside: frozen networks that evaluators read and that teach nothing, such as a ceiling.
      total_steps: length of training; set by a run, required for a `ramp` in percent.
      steps_per_epoch: set by a run, required for a `ramp` in epochs.
    """

    target: str = "confidence"
    alpha: float = 0.5
    ramp: float | str = "20 %"
    hard: bool = False
    label_weight: float = 0.0
    beside: tuple[Role, ...] = ()
    total_steps: int | None = None
    steps_per_epoch: float | None = None

    schedules: ClassVar[Mapping[str, str]] = {"ramp": "ramp"}

    def __post_init__(self):
        if self.target not in TARGETS:
            hint = nearest(self.target, TARGETS)
            raise ArgumentError(f"unknown target {self.target!r}", where="target", hint=hint)
        ranges.within("[0, 1]", alpha=self.alpha)
        ranges.within("[0, inf)", label_weight=self.label_weight)
        ranges.within("(0, inf)", total_steps=self.total_steps)
        ranges.within("(0, inf)", steps_per_epoch=self.steps_per_epoch)
        self._ramp()

    @property
    def roles(self) -> tuple[Role, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("student", "teacher", *self.beside)

    @property
    def couples_batch(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.target == "confidence"

    def _ramp(self) -> float:
        lengths: Any = {"total_steps": self.total_steps, "steps_per_epoch": self.steps_per_epoch}
        return durations.steps(self.ramp, "ramp", **lengths)

    def share(self, step: Array) -> Array:
        """Returns a at a step."""
        return self.alpha * jnp.minimum((step + 1) / jnp.maximum(self._ramp(), 1), 1)

    def weak_labels(self, nets: Nets, batch: Batch) -> tuple[Array, Array]:
        """Returns the weak labels `[b, k]` and the teacher's logits `[b, k]`."""
        logits = ask_teacher(nets, batch)["logits"]
        k = logits.shape[-1]
        soft = jax.nn.softmax(logits)
        return jax.nn.one_hot(logits.argmax(-1), k, dtype=soft.dtype) if self.hard else soft, logits

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        student, state = nets("student", batch["input"], train=True)
        logits = student["logits"]
        weak, teacher = self.weak_labels(nets, batch)
        check_same_classes(logits, teacher)
        for role in self.beside:
            nets(role, batch["input"])
        a, probs = self.share(step), jax.nn.softmax(logits)
        coef: dict[str, Any] = {"cross_entropy": self.label_weight}
        if self.target == "product":
            values = {"product": soft_cross_entropy(logits, product(probs, weak, own=a, power=1))}
        else:
            own = hardened(probs, weak, batch["mask"])
            values = {
                "weak_labels": soft_cross_entropy(logits, weak),
                "confidence": soft_cross_entropy(logits, own),
            }
            coef |= {"weak_labels": 1 - a, "confidence": a}
        weights: dict[str, Array] = {}
        if "labelled" in batch:
            hidden = (batch["labelled"] == 0).astype(logits.dtype)
            weights = {name: hidden for name in values}
        return Terms(
            values={**values, "cross_entropy": label_loss(logits, batch, smoothing=0.0)},
            coef=coef,
            weights=weights,
            state={"student": state},
            logits={"student": logits, "teacher": teacher},
        )


make = WeakToStrong
