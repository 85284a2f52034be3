"""Shared parts of masked methods: the hidden tokens, and their prediction in an encoder's space."""

import dataclasses
import itertools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.core import tokens
from distill_jax.core.api import TASKS, Array, Batch, Nets, Objective, Outputs, PyTree, Role, Terms
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.losses import jepa

MASKS = ("keep", "targets", "hidden")

WATCHED = 8
"""Most places whose true tokens are watched for collapse."""


class Masks(NamedTuple):
    """`keep` `[b, n]`, `targets` `[b, m, n_t]` and the number of tokens t."""

    keep: Array
    targets: Array
    t: int


def masks_of(batch: Batch, *, suggest: str) -> list[Masks]:
    """Returns the masks of a batch; further ways to hide parts of it have keys with `_1`, `_2`, ...

    Args:
      batch: the batch.
      suggest: the transform that the method goes with.

    Raises:
      ArgumentError: no transform has made masks.
    """
    if missing := [key for key in MASKS if key not in batch]:
        raise ArgumentError(
            f"the method predicts what is hidden, and batches have no {missing[0]!r}",
            where="batch",
            hint=f"add the transform {suggest!r}",
        )
    more = itertools.takewhile(lambda i: f"keep_{i}" in batch, itertools.count(1))
    masks = []
    for end in ("", *(f"_{i}" for i in more)):
        keep, targets, hidden = (batch[f"{key}{end}"] for key in MASKS)
        masks.append(Masks(keep, targets, hidden.shape[1]))
    return masks


def tokens_of(outputs: Outputs, role: Role) -> Array:
    """Returns the encoded tokens `[b, r + t, d]` of an encoder.

    Raises:
      ArgumentError: it has none.
    """
    if "tokens" not in outputs:
        raise ArgumentError(
            f"{role} has no output 'tokens'",
            where=role,
            hint="masked methods need vit, tabular_transformer, or an encoder like these",
        )
    return outputs["tokens"]


def side_by_side(full: Array) -> Array:
    """Returns tokens `[b, t, d]` at up to `WATCHED` places as one vector, `[b, <= WATCHED d]`.

    Tokens have collapsed where those at one place are the same in all examples: however much they
    differ from place to place, they say where they are and nothing else.
    """
    some = full[:, :: -(-full.shape[1] // WATCHED)]
    return some.reshape(len(some), -1)


def check_number(tokens: int, expected: int) -> None:
    """Raises `ArgumentError` unless the masks are of as many tokens as the encoder has."""
    if tokens != expected:
        raise ArgumentError(
            f"masks of {expected} tokens for an encoder of {tokens}",
            where="batch",
            hint="patch_size of the masks must be that of the encoder",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentPrediction(Objective):
    """The term "prediction": a distance of predicted and true tokens of hidden parts.

    `L = mean over sets m, their tokens and features of distance(g(f(x_C), m), sg f'(x)_m)`, where f
    sees the kept tokens alone, and f' all. Of several ways to hide parts the mean is taken.

    Attributes:
      distance: "squared", "absolute" or "smooth_l1".
      target_norm: whether true tokens are standardized, each by itself.
      moving_average: whether f' is the role `target`, the moving average of the student; else it
        is the student, a control.
      stop_gradient: whether f' gets no gradient; without it and without a moving average, a
        control that collapses.
    """

    distance: str = "smooth_l1"
    target_norm: bool = True
    moving_average: bool = True
    stop_gradient: bool = True

    tasks: ClassVar[tuple[str, ...]] = TASKS
    couples_batch: ClassVar[bool] = False
    suggest: ClassVar[str] = "block_masks"

    def __post_init__(self):
        if self.distance not in jepa.DISTANCES:
            raise ArgumentError(
                f"no distance {self.distance!r}",
                where="distance",
                hint=nearest(self.distance, jepa.DISTANCES),
            )
        if self.moving_average and not self.stop_gradient:
            raise ArgumentError(
                "a moving average never gets a gradient",
                where="stop_gradient",
                hint="set moving_average to false too",
            )

    @property
    def roles(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("student", "predictor", *(("target",) if self.moving_average else ()))

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        del memory, step
        state, values, masks = {}, [], masks_of(batch, suggest=self.suggest)
        role = "target" if self.moving_average else "student"
        # The whole comes first: what a role sees first is what evaluators will see.
        full = tokens_of(nets(role, batch["input"])[0], role)
        for keep, targets, t in masks:
            outputs, state["student"] = nets("student", batch["input"], keep, train=True)
            context = tokens_of(outputs, "student")
            front = context.shape[1] - keep.shape[1]
            check_number(full.shape[1] - front, t)
            true = full[:, front:]
            true = jax.lax.stop_gradient(true) if self.stop_gradient else true
            predicted, state["predictor"] = nets(
                "predictor", context, keep, targets, true, train=True
            )
            true = jepa.standardize(true) if self.target_norm else true
            distance = jepa.DISTANCES[self.distance]
            values.append(distance(predicted["output"], tokens.take(true, targets)))
        return Terms(
            values={"prediction": jnp.stack(values).mean(0)},
            state=state,
            embeddings={"target": side_by_side(full[:, -masks[0].t :])},
        )
