"""Regression losses: one value per example, `[b]`, the mean over its targets."""

import jax.numpy as jnp
import optax

from distill_jax.core.api import Array
from distill_jax.losses.multilabel import mean_known


def squared_error(
    values: Array, target: Array, *, scale: Array | None = None, known: Array | None = None
) -> Array:
    """`((values - target) / scale)^2`, `[b, m], [b, m] -> [b]`.

    Args:
      values: `[b, m]`.
      target: `[b, m]`.
      scale: `[m]`, the unit of the differences, such as the standard deviation of a target over
        the training examples; 1 by default.
      known: float `[b, m]`, 1 where a target is known; all are known by default.
    """
    return mean_known(jnp.square(_scaled(values, target, scale)), known)


def huber(
    values: Array,
    target: Array,
    *,
    delta: float,
    scale: Array | None = None,
    known: Array | None = None,
) -> Array:
    """Huber loss of `r = (values - target) / scale`, `[b, m], [b, m] -> [b]`.

    `r^2 / 2` up to `|r| = delta`, and `delta (|r| - delta / 2)` beyond (Huber 1964, Annals of
    Mathematical Statistics 35, section 1). See `squared_error` for the arguments.
    """
    return mean_known(optax.huber_loss(_scaled(values, target, scale), delta=delta), known)


def _scaled(values: Array, target: Array, scale: Array | None) -> Array:
    difference = values - target
    return difference if scale is None else difference / scale[None]
