"""Weak networks that see a strong network's arguments (after Lang et al. 2025, arXiv:2501.13124).

`L = CE(student(x, arguments), y)`: the student is the weak network, and the frozen `teacher_arguer`
shows it, for each class, the pixels that speak for it (`losses.arguments`). The paper's arguments
are a debate of language models; these are not. `argued_to_strong` trains a strong student on the
labels of several such networks. Evaluators read the logits as `role="prediction"`.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from distill_jax.core import ranges
from distill_jax.core.api import Array, Batch, Nets, Objective, Outputs, PyTree, Role, Terms
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.losses.arguments import SIDES, arguments
from distill_jax.objectives._labels import label_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Argued(Objective):
    """Cross-entropy of a network that sees arguments.

    Attributes:
      pixels: number of pixel values of an argument, at least 1.
      sides: "both", "own", "answer" or "neither"; see `losses.arguments`.
    """

    pixels: int = 8
    sides: str = "both"

    couples_batch: ClassVar[bool] = False

    def __post_init__(self):
        ranges.sizes(pixels=self.pixels)
        check_sides(self.sides)

    @property
    def roles(self) -> tuple[Role, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("student", *arguers(self.sides))

    def _seen(self, nets: Nets, batch: Batch) -> Array:
        return with_arguments(nets, batch["input"], pixels=self.pixels, sides=self.sides)

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        student, state = nets("student", self._seen(nets, batch), train=True)
        logits = student["logits"]
        return Terms(
            values={"cross_entropy": label_loss(logits, batch, smoothing=0.0)},
            state={"student": state},
            logits={"student": logits},
        )

    def predictions(
        self, nets: Nets, batch: Batch, memory: PyTree, step: Array
    ) -> Mapping[str, Outputs]:
        return {"prediction": nets("student", self._seen(nets, batch))[0]}


def with_arguments(nets: Nets, x: Array, *, pixels: int, sides: str) -> Array:
    """Returns images with the arguments of `teacher_arguer` as further channels."""

    def logits_of(x: Array) -> Array:
        return nets("teacher_arguer", x)[0]["logits"]

    return arguments(logits_of, x, pixels=pixels, sides=sides)


def arguers(sides: str) -> tuple[Role, ...]:
    """Returns the roles of networks that argue."""
    return () if sides == "neither" else ("teacher_arguer",)


def check_sides(sides: str) -> None:
    if sides not in SIDES:
        raise ArgumentError(f"unknown sides {sides!r}", where="sides", hint=nearest(sides, SIDES))


make = Argued
