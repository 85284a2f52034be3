"""Weak-to-strong training by an ensemble of weak networks that see arguments (`argued`).

The weak label is the mean of the probabilities of the teachers, each of which sees arguments of its
own length (Lang et al. 2025, arXiv:2501.13124: a debate for each); the rest is `weak_to_strong`.
Evaluators read the weak labels as `weak="weak"`.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from distill_jax.core import ranges
from distill_jax.core.api import Array, Batch, Nets, Outputs, PyTree, Role
from distill_jax.core.errors import ArgumentError
from distill_jax.objectives.argued import arguers, check_sides, with_arguments
from distill_jax.objectives.weak_to_strong import WeakToStrong


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArguedToStrong(WeakToStrong):
    """`WeakToStrong` with several teachers.

    Attributes:
      teachers: their roles.
      pixels: number of pixel values of the arguments that each teacher sees.
      sides: as in `argued`.
    """

    teachers: tuple[Role, ...] = ("teacher",)
    pixels: tuple[int, ...] = (8,)
    sides: str = "both"

    def __post_init__(self):
        super().__post_init__()
        ranges.sizes(pixels=self.pixels)
        check_sides(self.sides)
        if not self.teachers or len(self.pixels) != len(self.teachers):
            raise ArgumentError(
                f"{len(self.pixels)} lengths of arguments for {len(self.teachers)} teachers",
                where="pixels",
                hint="one for each teacher",
            )

    @property
    def roles(self) -> tuple[Role, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("student", *self.teachers, *arguers(self.sides), *self.beside)

    def weak_labels(self, nets: Nets, batch: Batch) -> tuple[Array, Array]:
        x, found = batch["input"], []
        for role, pixels in zip(self.teachers, self.pixels, strict=True):
            seen = with_arguments(nets, x, pixels=pixels, sides=self.sides)
            found.append(jax.nn.softmax(nets(role, seen)[0]["logits"]))
        soft = jax.lax.stop_gradient(jnp.mean(jnp.stack(found), axis=0))
        logits = jnp.log(jnp.maximum(soft, jnp.finfo(soft.dtype).tiny))
        hard = jax.nn.one_hot(soft.argmax(-1), soft.shape[-1], dtype=soft.dtype)
        return hard if self.hard else soft, logits

    def predictions(
        self, nets: Nets, batch: Batch, memory: PyTree, step: Array
    ) -> Mapping[str, Outputs]:
        return {"weak": {"logits": self.weak_labels(nets, batch)[1]}}


make = ArguedToStrong
