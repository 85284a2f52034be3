"""Supervised classification.

Cross-entropy with label smoothing (Szegedy et al. 2016, arXiv:1512.00567). Labels mixed by a
transform (mixup, cutmix) arrive as `label_probs` and replace the class ids.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from distill_jax.core.api import Array, Batch, Nets, Objective, PyTree, Terms
from distill_jax.core.errors import ArgumentError
from distill_jax.losses.classification import cross_entropy, soft_cross_entropy


def label_loss(logits: Array, batch: Batch, *, smoothing: float) -> Array:
    """Cross-entropy against the batch's mixed labels where it has them, else its class ids.

    Examples whose label is hidden count 0, the others more (`labelled`, see `data.corruption`).
    """
    if "label_probs" in batch:
        return soft_cross_entropy(logits, batch["label_probs"], smoothing=smoothing)
    loss = cross_entropy(logits, batch["label"], smoothing=smoothing)
    return loss * batch["labelled"] if "labelled" in batch else loss


def shown(batch: Batch) -> Array:
    """Returns 1 where an example's label may be used and 0 where it is hidden, `[b]`."""
    mask = batch["mask"]
    if "labelled" not in batch:
        return jnp.ones_like(mask)
    return (batch["labelled"] > 0).astype(mask.dtype)


def check_smoothing(smoothing: float) -> None:
    if not 0 <= smoothing < 1:
        raise ArgumentError(
            f"label_smoothing is {smoothing}",
            where="label_smoothing",
            hint="a share of probability in [0, 1)",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Supervised(Objective):
    """Cross-entropy of the student with the labels.

    Attributes:
      label_smoothing: share of the target spread evenly over all classes, in [0, 1).
    """

    label_smoothing: float = 0.0

    roles: ClassVar[tuple[str, ...]] = ("student",)
    couples_batch: ClassVar[bool] = False

    def __post_init__(self):
        check_smoothing(self.label_smoothing)

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        outputs, state = nets("student", batch["input"], train=True)
        loss = label_loss(outputs["logits"], batch, smoothing=self.label_smoothing)
        return Terms(values={"cross_entropy": loss}, state={"student": state})


make = Supervised
