"""Losses between the logits of a student and a teacher: one value per example, `[b]`, in nats."""

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array
from distill_jax.losses.classification import softmax_cross_entropy
from distill_jax.losses.divergences import softmax_divergence

_TINY_VARIANCE = 1e-12
"""Rows or columns with less variation are treated as constant and give no gradient."""


def log_probs(student: Array, teacher: Array, *, temperature: float) -> tuple[Array, Array]:
    """Log-probabilities of both networks at temperature T, `[b, k]` each."""
    return jax.nn.log_softmax(student / temperature), jax.nn.log_softmax(teacher / temperature)


def reverse_kl(
    student: Array, teacher: Array, *, temperature: float, floor: float | None = None
) -> Array:
    """`T^2 KL(student_T || teacher_T)`, `[b, k], [b, k] -> [b]`.

    Args:
      student: logits `[b, k]`.
      teacher: logits `[b, k]`.
      temperature: T of both softmaxes.
      floor: lower bound of the teacher's log-probability, which is otherwise unbounded. With it the
        teacher's row no longer sums to 1, and the value may be slightly negative.
    """
    if floor is None:
        student, teacher = student / temperature, teacher / temperature
        return temperature**2 * softmax_divergence("reverse", teacher, student)
    log_student, log_teacher = log_probs(student, teacher, temperature=temperature)
    ratio = log_student - jnp.maximum(log_teacher, floor)
    return temperature**2 * (jnp.exp(log_student) * ratio).sum(-1)


def jensen_shannon(student: Array, teacher: Array, *, temperature: float) -> Array:
    """`T^2 (KL(s || m) + KL(t || m)) / 2` with `m = (s + t) / 2`, `[b, k], [b, k] -> [b]`."""
    student, teacher = student / temperature, teacher / temperature
    return temperature**2 * softmax_divergence("jensen_shannon", teacher, student)


def teacher_cross_entropy(student: Array, teacher: Array, *, temperature: float) -> Array:
    """`-T^2 sum_c t_c log s_c`: the forward divergence plus the teacher's entropy."""
    student, teacher = student / temperature, teacher / temperature
    entropy = softmax_cross_entropy(teacher, jax.nn.softmax(teacher))
    return temperature**2 * (softmax_divergence("forward", teacher, student) + entropy)


def decoupled_kl(
    student: Array, teacher: Array, target: Array, *, temperature: float
) -> tuple[Array, Array]:
    """The two terms of the divergence of Zhao et al. 2022, eq. 5 and 7 (arXiv:2203.08679).

    `KL(t || s) = TCKD + (1 - t_target) NCKD`; both are multiplied by T^2 here.

    Args:
      student: logits `[b, k]`.
      teacher: logits `[b, k]`.
      target: the target class, int `[b]`.
      temperature: T of all softmaxes.

    Returns:
      TCKD `[b]`, over "target" and "any other class", and NCKD `[b]`, over the other classes only.
    """
    is_target = jax.nn.one_hot(target, student.shape[-1], dtype=bool)

    def split(logits: Array) -> tuple[Array, Array]:
        logits = logits / temperature
        others = jnp.where(is_target, -jnp.inf, logits)
        pair = jnp.stack(
            [
                jnp.where(is_target, logits, 0).sum(-1),
                jax.nn.logsumexp(others, axis=-1),
            ],
            axis=-1,
        )
        return pair, others

    (student_pair, student_others), (teacher_pair, teacher_others) = split(student), split(teacher)
    scale = temperature**2
    return (
        scale * softmax_divergence("forward", teacher_pair, student_pair),
        scale * softmax_divergence("forward", teacher_others, student_others),
    )


def standardize(logits: Array) -> Array:
    """Rows of mean 0 and standard deviation 1, `[b, k] -> [b, k]`.

    Sun et al. 2024, algorithm 1 (arXiv:2403.01427): the deviation is over all k classes
    (divisor k). A constant row becomes 0 and gives no gradient.
    """
    centred = logits - logits.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    varies = variance > _TINY_VARIANCE
    return jnp.where(varies, centred, 0) / jnp.sqrt(jnp.where(varies, variance, 1))


def inter_class(student: Array, teacher: Array, *, temperature: float) -> Array:
    """`T^2 (1 - r)` with r the correlation of two rows of probabilities, `[b, k] x 2 -> [b]`.

    Huang et al. 2022, eq. 6 to 8 (arXiv:2205.10536). A constant row has correlation 0.
    """
    s, t = jax.nn.softmax(student / temperature), jax.nn.softmax(teacher / temperature)
    s, t = (x - x.mean(-1, keepdims=True) for x in (s, t))
    return temperature**2 * (1 - _products_over_norms(s, t, axis=-1).sum(-1))


def intra_class(student: Array, teacher: Array, mask: Array, *, temperature: float) -> Array:
    """`T^2 (1 - mean_c r_c)` with r_c the correlation of two columns of probabilities.

    Huang et al. 2022, eq. 9 (arXiv:2205.10536), over the examples with mask 1.

    Args:
      student: logits `[b, k]`.
      teacher: logits `[b, k]`.
      mask: `[b]`, 0 on padding.
      temperature: T of both softmaxes.

    Returns:
      `[b]`, one share per example. The correlation is a sum over examples, and share i is
      `T^2 (1 - n / k sum_c term_ic)` with n the sum of the mask. The masked mean is the loss.
    """
    total = jnp.maximum(mask.sum(), 1)
    mask = mask[:, None]

    def centre(logits: Array) -> Array:
        probs = jax.nn.softmax(logits / temperature)
        return mask * (probs - (mask * probs).sum(0, keepdims=True) / total)

    terms = _products_over_norms(centre(student), centre(teacher), axis=0)
    return temperature**2 * (1 - total * terms.mean(-1))


def _products_over_norms(x: Array, y: Array, *, axis: int) -> Array:
    """`x y / (|x| |y|)` of centred arrays, whose sum along the axis is their correlation.

    A vector without variation has no direction: its terms are 0 and so are their gradients, which
    would be infinite.
    """
    scale = jnp.ones((), x.dtype)
    for v in (x, y):
        squares = (v**2).sum(axis, keepdims=True)
        varies = squares > _TINY_VARIANCE
        scale = jnp.where(varies, scale * jax.lax.rsqrt(jnp.where(varies, squares, 1)), 0)
    return x * y * scale
