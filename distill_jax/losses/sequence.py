"""Divergences between teacher and student at each token, over all tokens or the k most probable.

All functions take log-probabilities with a distribution along the last axis and reduce that axis:
`[b, t, c] -> [b, t]`, in nats. For large vocabularies the full logits need not be materialized:
store `top_log_probs_of` the teacher, compute the student's `log_probs_of` the same tokens, and
compare the two with `sparse_divergence`.
"""

import jax.numpy as jnp

from distill_jax.core.api import Array
from distill_jax.core.sequences import (
    TopLogProbs,
    log_probs_of,
    top_log_probs,
    top_log_probs_of,
)
from distill_jax.losses.divergences import DIVERGENCES, LEAST, check, softmax_divergence


def token_divergence(
    kind: str, log_teacher: Array, log_student: Array, *, share: float = 0.5
) -> Array:
    """Returns a divergence of two distributions, `[..., c], [..., c] -> [...]`, in nats.

    Args:
      kind: one of `DIVERGENCES`.
      log_teacher: log-probabilities of the teacher.
      log_student: those of the student.
      share: s of the skew and Jensen-Shannon divergences, in (0, 1); 0.1 is usual for skew.

    Raises:
      ArgumentError: an unknown kind, or a share outside (0, 1).
    """
    check(kind, share)
    log_teacher, log_student = (jnp.maximum(x, LEAST) for x in (log_teacher, log_student))
    return DIVERGENCES[kind](log_teacher, log_student, share)


def with_tail(log_probs: Array, tail: Array | None = None) -> Array:
    """Returns `[..., k + 1]`: the k tokens, and all others as one entry.

    Args:
      log_probs: log-probabilities of k different tokens, `[..., k]`.
      tail: log-probability of all other tokens, `[...]`. By default it is computed from the sum of
        the k, which in float32 is accurate to a probability of 1e-7.
    """
    if tail is None:
        rest = 1 - jnp.exp(log_probs).sum(-1)
        tail = jnp.log(jnp.maximum(rest, jnp.finfo(rest.dtype).eps / 2))
    return jnp.concatenate([log_probs, tail[..., None]], axis=-1)


def sparse_divergence(
    kind: str, teacher: TopLogProbs, student: Array, *, share: float = 0.5
) -> Array:
    """Returns the divergence over the teacher's top k tokens and one tail entry, `[b, t]`.

    It is at most the divergence over all tokens, and equal to it if both networks have the same
    distribution within the tail.

    Args:
      kind: one of `DIVERGENCES`.
      teacher: the teacher's k most probable tokens.
      student: log-probabilities of these tokens under the student, `[b, t, k]`.
      share: see `token_divergence`.

    Raises:
      ArgumentError: see `token_divergence`.
    """
    log_teacher = with_tail(teacher.log_probs, teacher.tail)
    return token_divergence(kind, log_teacher, with_tail(student), share=share)


__all__ = [
    "DIVERGENCES",
    "TopLogProbs",
    "log_probs_of",
    "softmax_divergence",
    "sparse_divergence",
    "token_divergence",
    "top_log_probs",
    "top_log_probs_of",
    "with_tail",
]
