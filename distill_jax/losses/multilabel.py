"""Multilabel losses: one value per example, `[b]`, the mean over its labels."""

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array
from distill_jax.losses.divergences import kl


def mean_known(values: Array, known: Array | None) -> Array:
    """Returns the mean of each row over its known entries, `[b, k] -> [b]`; 0 where none is known.

    Args:
      values: `[b, k]`, finite everywhere.
      known: float `[b, k]`, 1 where an entry is known, else 0; None if all are known.
    """
    if known is None:
        return values.mean(-1)
    return (values * known).sum(-1) / jnp.maximum(known.sum(-1), 1)


def binary_cross_entropy(
    logits: Array,
    label: Array,
    *,
    known: Array | None = None,
    smoothing: float = 0.0,
    positive_weights: Array | None = None,
    gamma: float = 0.0,
) -> Array:
    """Binary cross-entropy with logits, `[b, k], [b, k] -> [b]`, in nats.

    `-y w log s(z) - (1 - y) log s(-z)` for a logit z with target y and the sigmoid s. With `gamma`
    this is the focal loss (Lin et al. 2017, arXiv:1708.02002, eq. 4): each term is multiplied by
    the probability of the opposite outcome to the power gamma.

    Args:
      logits: `[b, k]`.
      label: targets in [0, 1], `[b, k]`.
      known: see `mean_known`.
      smoothing: mass e of the target: `(1 - e) * y + e / 2`.
      positive_weights: w `[k]`, weights of the terms of present labels.
      gamma: 0 or more; 0 gives the cross-entropy.
    """
    label = (1 - smoothing) * label + smoothing / 2 if smoothing else label
    log_p, log_not = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    positive, negative = -label * log_p, -(1 - label) * log_not
    if gamma:
        positive, negative = positive * jnp.exp(gamma * log_not), negative * jnp.exp(gamma * log_p)
    if positive_weights is not None:
        positive = positive * positive_weights[None]
    return mean_known(positive + negative, known)


def binary_distillation(student: Array, teacher: Array, *, temperature: float) -> Array:
    """Distillation of each label, `[b, k], [b, k] -> [b]`, in nats.

    `T^2 KL(s(teacher / T) || s(student / T))` of Bernoulli distributions, with the sigmoid s. This
    is the loss of Hinton et al. 2015 (arXiv:1503.02531, section 2.1), whose softmax over the logits
    `[z, 0]` is the sigmoid of z.
    """
    two = lambda z: jnp.stack([jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)], -1)  # noqa: E731
    return temperature**2 * kl(two(teacher / temperature), two(student / temperature)).mean(-1)
