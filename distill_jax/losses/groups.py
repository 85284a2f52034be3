"""Losses over groups and environments, as members, weights and shares `[b]` of examples.

All means are over the batch without padding. Letters: g groups, e environments.
"""

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array


def _sizes(member: Array, mask: Array) -> tuple[Array, Array]:
    """Returns memberships `[b, g]` without padding, and their sums `[g]`."""
    member = member * mask[:, None]
    return member, member.sum(0)


def worst_group(loss: Array, member: Array, mask: Array) -> Array:
    """Returns 1 for the members of the group with the largest mean of `loss`, `[b]`, else 0.

    Args:
      loss: `[b]`.
      member: `[b, g]`, 0 or 1; an example may be in several groups. Empty groups are ignored.
      mask: `[b]`, 0 on padding.
    """
    member, size = _sizes(member, mask)
    mean = (member * loss[:, None]).sum(0) / jnp.maximum(size, 1)
    worst = jnp.argmax(jnp.where(size > 0, mean, -jnp.inf))
    return member[:, worst]


def balanced_weights(member: Array, mask: Array) -> Array:
    """Weights `[b]` of mean 1 that give each non-empty one of g disjoint groups the same total.

    Args:
      member: `[b, g]`, one-hot.
      mask: `[b]`.
    """
    member, size = _sizes(member, mask)
    share = 1 / jnp.maximum((size > 0).sum(), 1)
    return (member * (share * mask.sum() / jnp.maximum(size, 1))[None]).sum(1)


def environment_risks(loss: Array, member: Array, mask: Array) -> Array:
    """Shares `[b]` whose mean is the sum over environments of their mean losses, `sum_e R_e`.

    Args:
      loss: `[b]`.
      member: `[b, e]`, one-hot; a zero row belongs to no environment.
      mask: `[b]`.
    """
    member, size = _sizes(member, mask)
    return loss * (member / jnp.maximum(size, 1)[None]).sum(1) * mask.sum()


def irm_penalty(logits: Array, label: Array, member: Array, mask: Array) -> Array:
    """Shares `[b]` whose mean is `sum_e (d/ds R_e(s logits))^2` at s = 1.

    IRMv1, Arjovsky et al. 2019, arXiv:1907.02893, section 3.

    Args:
      logits: `[b, k]`.
      label: class ids `[b]`.
      member: `[b, e]`, one-hot; a zero row belongs to no environment.
      mask: `[b]`.
    """
    member, size = _sizes(member, mask)
    own = jnp.take_along_axis(logits, label[:, None], axis=1)[:, 0]
    slope = (jax.nn.softmax(logits) * logits).sum(1) - own
    mean = (member * slope[:, None]).sum(0) / jnp.maximum(size, 1)
    return slope * (member * (mean / jnp.maximum(size, 1))[None]).sum(1) * mask.sum()


def vrex_penalty(loss: Array, member: Array, mask: Array) -> Array:
    """Shares `[b]` whose mean is the variance over environments of their mean losses.

    V-REx, Krueger et al. 2021, arXiv:2003.00688; environments without examples are ignored.

    Args:
      loss: `[b]`.
      member: `[b, e]`, one-hot; a zero row belongs to no environment.
      mask: `[b]`.
    """
    member, size = _sizes(member, mask)
    present = size > 0
    risk = (member * loss[:, None]).sum(0) / jnp.maximum(size, 1)
    count = jnp.maximum(present.sum(), 1)
    away = jnp.where(present, risk - (present * risk).sum() / count, 0)
    # sum_e R_e (R_e - mean R) = sum_e (R_e - mean R)^2
    return loss * (member * (away / count / jnp.maximum(size, 1))[None]).sum(1) * mask.sum()
