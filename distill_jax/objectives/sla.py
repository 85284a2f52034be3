"""Self-supervised label augmentation (SLA; Lee, Hwang, Shin 2020, arXiv:1910.05872).

The identity of M transformations of the image (rotations, colour permutations) is known. A joint
head classifies class and transformation, k * M classes, so that features need not be invariant:

* "sla": `L = 1/M sum_j CE(joint(f(x_j)), (y, j))`, eq. 4.
* "sla_sd": the plain head learns from the aggregated prediction of the joint one,
  `L + T^2 KL(P_agg || softmax(z / T)) + beta CE(z, y)`, eq. 6, for inference by a single pass.
  `P_agg = softmax(1/M sum_j joint_(c, j)(x_j) / T)` is without gradient.
* "da": `1/M sum_j CE(z(x_j), y)`, data augmentation.
* "mt": `1/M sum_j [CE(z(x_j), y) + CE(transformation head(f(x_j)), j)]`, eq. 2, two tasks.

Deviation: none in the losses. The published runs use one of the two sets of transformations; here a
product of both is one set.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array, Batch, Nets, Objective, Outputs, PyTree, Terms
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.losses import view_bank
from distill_jax.losses.classification import cross_entropy, distillation_kl
from distill_jax.objectives._distillation import check_not_negative, check_positive, endpoint
from distill_jax.objectives._labels import label_loss

MODES = ("sla", "sla_sd", "da", "mt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SLA(Objective):
    """Joint labels of classes and transformations, and the baselines of the paper.

    A step runs the student on M views of each example. The role "joint" is a map of the embedding,
    e.g. `projector`: k * M features, or M in mode "mt"; mode "da" has none. In mode "sla" the
    student's own logits are not used: set `num_classes=0` where the model allows it.

    Predictions: "single", for the untransformed image, and "aggregated", the mean over views of the
    logits of their own transformation (of the plain logits in modes "da" and "mt").

    Attributes:
      mode: one of `MODES`.
      rotations: 1, 2 (by 180 degrees) or 4.
      permutations: of three colour channels, 1, 3 (cyclic) or 6. M is the product of both.
      temperature: T of the distillation term, positive; 1 as published.
      label_weight: beta of the plain head, 0 or more; 1 as published.
      num_classes: k, from the data.
    """

    mode: str = "sla_sd"
    rotations: int = 4
    permutations: int = 1
    temperature: float = 1.0
    label_weight: float = 1.0
    num_classes: int

    def __post_init__(self):
        if self.mode not in MODES:
            raise ArgumentError(
                f"unknown mode {self.mode!r}",
                where="mode",
                hint=nearest(self.mode, MODES),
            )
        for name, sizes in (
            ("rotations", view_bank.ROTATIONS),
            ("permutations", view_bank.PERMUTATIONS),
        ):
            if getattr(self, name) not in sizes:
                raise ArgumentError(
                    f"{name} is {getattr(self, name)}",
                    where=name,
                    hint=f"one of {', '.join(map(str, sizes))}",
                )
        check_positive(temperature=self.temperature)
        check_not_negative(label_weight=self.label_weight)

    @property
    def roles(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("student",) if self.mode == "da" else ("student", "joint")

    @property
    def auxiliary(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.roles[1:]

    @property
    def views(self) -> int:
        """M, the number of transformations."""
        return self.rotations * self.permutations

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        m, x = self.views, self._views(batch)
        student, state = nets("student", x, train=True)
        states = {"student": state}
        joint: Any = None
        if self.mode != "da":
            joint, states["joint"] = self._joint(nets, student, train=True)
        values, logits = {}, {}
        if self.mode in ("sla", "sla_sd"):
            probs = batch.get("label_probs")
            if probs is None:
                probs = jax.nn.one_hot(batch["label"], self.num_classes, dtype=joint.dtype)
            values["joint"] = view_bank.joint_cross_entropy(joint, probs, views=m)
        else:
            repeated = {
                name: jnp.repeat(batch[name], m, axis=0)
                for name in ("label", "label_probs")
                if name in batch
            }
            plain = label_loss(student["logits"], repeated, smoothing=0.0)
            values["cross_entropy"] = plain.reshape(-1, m).mean(1)
        if self.mode == "mt":
            which = jnp.tile(jnp.arange(m, dtype=jnp.int32), batch["mask"].shape[0])
            values["transformation"] = cross_entropy(joint, which).reshape(-1, m).mean(1)
        if self.mode == "sla_sd":
            plain = student["logits"].reshape(-1, m, self.num_classes)[:, 0]
            target = jax.lax.stop_gradient(view_bank.own_columns(joint, views=m).mean(1))
            values["distillation"] = distillation_kl(plain, target, temperature=self.temperature)
            values["cross_entropy"] = label_loss(plain, batch, smoothing=0.0)
            logits = {"student": plain, "teacher": target}
        coef = {"cross_entropy": self.label_weight} if self.mode == "sla_sd" else {}
        return Terms(values=values, coef=coef, state=states, logits=logits)

    def predictions(
        self, nets: Nets, batch: Batch, memory: PyTree, step: Array
    ) -> Mapping[str, Outputs]:
        student, _ = nets("student", self._views(batch))
        if self.mode in ("sla", "sla_sd"):
            joint, _ = self._joint(nets, student)
            own = view_bank.own_columns(joint, views=self.views)
        else:
            own = student["logits"].reshape(-1, self.views, self.num_classes)
        return {"single": {"logits": own[:, 0]}, "aggregated": {"logits": own.mean(1)}}

    def _views(self, batch: Batch) -> Array:
        x = batch["input"]
        shape = getattr(x, "shape", ())
        if len(shape) != 4 or (self.rotations > 1 and shape[1] != shape[2]):
            raise ArgumentError(
                f"inputs of shape {shape} cannot be rotated",
                where="rotations",
                hint="square images [b, h, w, c] are needed",
            )
        if self.permutations > 1 and shape[-1] != 3:
            raise ArgumentError(
                f"images of {shape[-1]} channels have no colours to permute",
                where="permutations",
                hint="set it to 1",
            )
        return view_bank.augmented_views(
            x, rotations=self.rotations, permutations=self.permutations
        )

    def _joint(self, nets: Nets, student: Outputs, *, train: bool = False):
        embedding = endpoint(student, "embedding", role="student", where="mode")
        outputs, state = nets("joint", embedding, train=train)
        width = self.views * (1 if self.mode == "mt" else self.num_classes)
        if outputs["output"].shape[-1] != width:
            raise ArgumentError(
                f"the joint head has {outputs['output'].shape[-1]} outputs",
                where="joint.kwargs.features",
                hint=f"mode {self.mode!r} with {self.views} views needs {width}",
            )
        return outputs["output"], state


make = SLA
