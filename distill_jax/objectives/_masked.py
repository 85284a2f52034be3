"""Shared parts of masked methods: hidden tokens and their prediction in latent space."""

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
    """Returns the masks of a batch. Further mask types have keys with `_1`, `_2`, ...

    Args:
      batch: the batch.
      suggest: the transform to name in the error message.

    Raises:
      ArgumentError: the batch has no masks.
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
      ArgumentError: the encoder has no such output.
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

    Tokens have collapsed if the tokens at one place are the same in all examples. Differences
    between places then encode the position only.
    """
    some = full[:, :: -(-full.shape[1] // WATCHED)]
    return some.reshape(len(some), -1)


def check_number(tokens: int, expected: int) -> None:
    """Raises `ArgumentError` unless the masks and the encoder have the same number of tokens."""
    if tokens != expected:
        raise ArgumentError(
            f"masks of {expected} tokens for an encoder of {tokens}",
            where="batch",
            hint="patch_size of the masks must be that of the encoder",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentPrediction(Objective):
    """The loss term "prediction": a distance between predicted and true tokens of hidden parts.

    `L = mean over sets m, their tokens and features of distance(g(f(x_C), m), sg f'(x)_m)`. The
    input of f is the kept tokens only, the input of f' is all tokens. With several mask types, the
    loss is their mean.

    Attributes:
      distance: "squared", "absolute" or "smooth_l1".
      target_norm: whether each true token is standardized.
      moving_average: whether f' is the role `target`, the moving average of the student. If false,
        f' is the student itself, as a control.
      stop_gradient: whether f' gets no gradient. If false and without a moving average, a control
        that collapses.
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
        # The full input comes first: evaluators use the first input shape of a role.
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
