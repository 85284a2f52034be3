"""Losses between logits, labels and other logits: one value per example, `[b]`.

The derivatives of cross-entropies are written out, so that the backward pass has fewer arrays of
the logits' size; those of any order and in both modes are exact.
"""

import jax
import jax.numpy as jnp
import optax
from jax.custom_derivatives import SymbolicZero

from distill_jax.core import ranges
from distill_jax.core.api import Array
from distill_jax.core.errors import ArgumentError
from distill_jax.losses.divergences import softmax_divergence


def cross_entropy(logits: Array, label: Array, *, smoothing: float = 0.0) -> Array:
    """Cross-entropy of class ids, `[b, k], [b] -> [b]`, in nats.

    Args:
      logits: `[b, k]`.
      label: class ids, int `[b]`.
      smoothing: mass e spread evenly over all k classes (Szegedy et al. 2016, section 7):
        the target is `(1 - e) * onehot + e / k`.

    Raises:
      ArgumentError: labels that are not integers.
    """
    if not jnp.issubdtype(label.dtype, jnp.integer):
        hint = "class ids, integers [b]; soft_cross_entropy takes distributions"
        raise ArgumentError(f"label has type {label.dtype}", where="label", hint=hint)
    hard = _hard_cross_entropy(logits, label)
    if smoothing == 0.0:
        return hard
    uniform = softmax_cross_entropy(logits, jnp.full_like(logits, 1 / logits.shape[-1]))
    return (1 - smoothing) * hard + smoothing * uniform


@jax.custom_jvp
def _hard_cross_entropy(logits: Array, label: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


@_hard_cross_entropy.defjvp
def _(primals, tangents):
    (logits, label), (change, _) = primals, tangents
    onehot = jax.nn.one_hot(label, logits.shape[-1], dtype=logits.dtype)
    slope = jax.nn.softmax(logits) - onehot
    return _hard_cross_entropy(logits, label), (slope * change).sum(-1)


def soft_cross_entropy(logits: Array, probs: Array, *, smoothing: float = 0.0) -> Array:
    """Cross-entropy of label distributions, `[b, k], [b, k] -> [b]`, in nats."""
    probs = (1 - smoothing) * probs + smoothing / probs.shape[-1]
    return softmax_cross_entropy(logits, probs)


@jax.custom_jvp
def softmax_cross_entropy(logits: Array, weights: Array) -> Array:
    """`-sum_c weights_c log softmax(logits)_c`, `[b, k], [b, k] -> [b]`; any weights, in nats."""
    return optax.softmax_cross_entropy(logits, weights)


def _softmax_cross_entropy_jvp(primals, tangents):
    logits, weights = primals
    value = softmax_cross_entropy(logits, weights)
    change = jnp.zeros_like(value)
    if not isinstance(tangents[0], SymbolicZero):
        slope = weights.sum(-1, keepdims=True) * jax.nn.softmax(logits) - weights
        change += (slope * tangents[0]).sum(-1)
    if not isinstance(tangents[1], SymbolicZero):
        change += softmax_cross_entropy(logits, tangents[1])
    return value, change


softmax_cross_entropy.defjvp(_softmax_cross_entropy_jvp, symbolic_zeros=True)


def focal(logits: Array, label: Array, *, gamma: float) -> Array:
    """Focal loss of class ids, `[b, k], [b] -> [b]`, in nats.

    `-(1 - p)^gamma log p` with p the softmax probability of the label (Lin et al. 2017,
    arXiv:1708.02002, eq. 4). `1 - p` is computed as a sum over the other classes, so that its power
    has a derivative where p rounds to 1.
    """
    own = jnp.arange(logits.shape[-1])[None] == label[:, None]
    others = jax.nn.logsumexp(jnp.where(own, -jnp.inf, logits), axis=-1)
    log_not = others - jax.nn.logsumexp(logits, axis=-1)
    return jnp.exp(gamma * log_not) * cross_entropy(logits, label)


def weighted_cross_entropy(
    logits: Array, probs: Array, weights: Array, *, smoothing: float = 0.0
) -> Array:
    """`-sum_c weights_c probs_c log softmax(logits)_c`, `[b, k], [b, k], [k] -> [b]`, in nats.

    Args:
      logits: `[b, k]`.
      probs: label distributions; one-hot rows for class ids.
      weights: class weights.
      smoothing: see `cross_entropy`.
    """
    probs = (1 - smoothing) * probs + smoothing / probs.shape[-1]
    return softmax_cross_entropy(logits, probs * weights[None])


def distillation_kl(student: Array, teacher: Array, *, temperature: float) -> Array:
    """`T^2 KL(softmax(teacher / T) || softmax(student / T))`, `[b, k], [b, k] -> [b]`, in nats.

    The factor T^2 keeps the size of the gradient independent of T (Hinton et al. 2015,
    section 2.1, arXiv:1503.02531).

    Raises:
      ArgumentError: the numbers of classes differ, or the temperature is not positive.
    """
    if isinstance(temperature, (int, float)):
        ranges.within("(0, inf)", temperature=temperature)
    if student.shape[-1] != teacher.shape[-1]:
        what = f"teacher has {teacher.shape[-1]} classes and student {student.shape[-1]}"
        raise ArgumentError(what, where="teacher", hint="the same classes in the same order")
    return temperature**2 * softmax_divergence(
        "forward", teacher / temperature, student / temperature
    )


def shift_logits(logits: Array, shift: Array) -> Array:
    """Rolls each row along the classes: `out[i, (c + shift_i) % k] = logits[i, c]`.

    Args:
      logits: `[b, k]`.
      shift: int `[b]`; 0 leaves a row unchanged; any other shift makes a correct prediction wrong.
    """
    k = logits.shape[-1]
    source = (jnp.arange(k)[None] - shift[:, None]) % k
    return jnp.take_along_axis(logits, source, axis=-1)
