"""Divergences of two distributions along the last axis, `[..., k], [..., k] -> [...]`, in nats.

`DIVERGENCES` takes log-probabilities; `softmax_divergence` takes logits. The derivatives of the
latter are written out, so that the backward pass has fewer arrays of the logits' size; derivatives
of any order and in both modes are exact.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from distill_jax.core.api import Array
from distill_jax.core.errors import ArgumentError, nearest

LEAST = -1e4
"""Least logarithm of a probability: its exponential is 0, and its products with 0 are 0."""


def kl(log_p: Array, log_q: Array) -> Array:
    """`KL(p || q)` of two distributions given as log-probabilities, `[..., k] x 2 -> [...]`.

    Computed as `sum p (d - 1 + exp(-d))` with `d = log p - log q`. For rows that sum to 1 this is
    the same value, but its terms are of second order where p and q are close, so they do not cancel
    in float32.
    """
    p, d = jnp.exp(log_p), log_p - log_q
    near = jnp.abs(d) < 1
    small = jnp.where(near, d, 0)
    terms = jnp.where(near, p * (small + jnp.expm1(-small)), p * (d - 1) + jnp.exp(log_q))
    return terms.sum(-1)


def _mixed(log_p: Array, log_q: Array, share: float) -> Array:
    """Returns `log((1 - share) p + share q)`."""
    return jnp.logaddexp(log_p + jnp.log1p(-share), log_q + jnp.log(share))


def _jeffreys(p: Array, q: Array, share: float) -> Array:
    del share
    return (kl(p, q) + kl(q, p)) / 2


def _jensen_shannon(p: Array, q: Array, share: float) -> Array:
    mean = _mixed(p, q, share)
    return (1 - share) * kl(p, mean) + share * kl(q, mean)


DIVERGENCES: Mapping[str, Callable[[Array, Array, float], Array]] = MappingProxyType(
    {
        "forward": lambda p, q, share: kl(p, q),
        "reverse": lambda p, q, share: kl(q, p),
        "jeffreys": _jeffreys,
        "skew_forward": lambda p, q, share: kl(p, _mixed(q, p, share)),
        "skew_reverse": lambda p, q, share: kl(q, _mixed(p, q, share)),
        "jensen_shannon": _jensen_shannon,
    }
)
"""By name, with p the teacher, q the student and s the share:

* `forward` `KL(p || q)`; `reverse` `KL(q || p)` (Gu et al. 2023, MiniLLM, arXiv:2306.08543);
* `jeffreys` `(KL(p || q) + KL(q || p)) / 2`;
* `skew_forward` `KL(p || s p + (1 - s) q)`, `skew_reverse` `KL(q || s q + (1 - s) p)` (Ko et al.
  2024, DistiLLM, arXiv:2402.03898, section 3.1, with alpha = s);
* `jensen_shannon` `(1 - s) KL(p || m) + s KL(q || m)`, `m = (1 - s) p + s q` (Agarwal et al. 2023,
  GKD, arXiv:2306.13649, section 2, with beta = 1 - s).
"""


def check(kind: str, share: float) -> None:
    """Raises an ArgumentError for an unknown divergence, or a share outside (0, 1)."""
    if kind not in DIVERGENCES:
        hint = nearest(kind, DIVERGENCES)
        raise ArgumentError(f"no divergence {kind!r}", where="kind", hint=hint)
    if not 0 < share < 1:
        raise ArgumentError(f"share is {share!r}", where="share", hint="above 0 and below 1")


def softmax_divergence(kind: str, teacher: Array, student: Array, *, share: float = 0.5) -> Array:
    """Returns a divergence of two softmaxes, `[..., k], [..., k] -> [...]`, in nats.

    Args:
      kind: one of `DIVERGENCES`.
      teacher: its logits; `-inf`, or far below the others, where a class is impossible.
      student: its logits.
      share: s of the skew and Jensen-Shannon divergences, in (0, 1); 0.1 is usual for skew.

    Raises:
      ArgumentError: an unknown kind, or a share outside (0, 1).
    """
    check(kind, share)
    return _softmax_divergence(kind, share, teacher, student)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _softmax_divergence(kind: str, share: float, teacher: Array, student: Array) -> Array:
    return DIVERGENCES[kind](_log_probs(teacher), _log_probs(student), share)


def _log_probs(logits: Array) -> Array:
    # XLA keeps the shifted logits of jax.nn.log_softmax as an array, and has no need to here.
    log_p = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return jnp.maximum(log_p, LEAST)


def _slope(log_p: Array, change: Array) -> Array:
    """From the derivative with respect to probabilities, that with respect to their logits."""
    weighted = jnp.exp(log_p) * change
    return weighted - jnp.exp(log_p) * weighted.sum(-1, keepdims=True)


def _forward_slopes(log_p: Array, log_q: Array) -> tuple[Array, Array]:
    return _slope(log_p, log_p - log_q), jnp.exp(log_q) - jnp.exp(log_p)


def _skew_slopes(log_p: Array, log_q: Array, share: float) -> tuple[Array, Array]:
    to_mean = log_p - _mixed(log_q, log_p, share)
    ratio = jnp.exp(to_mean)
    return _slope(log_p, to_mean - share * ratio), _slope(log_q, (share - 1) * ratio)


def _slopes(kind: str, p: Array, q: Array, share: float) -> tuple[Array, Array]:
    """Derivatives of a divergence with respect to the logits of p and q, `[..., k]` each."""
    if kind == "forward":
        return _forward_slopes(p, q)
    if kind == "skew_forward":
        return _skew_slopes(p, q, share)
    if kind in ("reverse", "skew_reverse"):
        to_q, to_p = _slopes(kind.replace("reverse", "forward"), q, p, share)
        return to_p, to_q
    if kind == "jeffreys":
        forward, reverse = _forward_slopes(p, q), _forward_slopes(q, p)
        return (forward[0] + reverse[1]) / 2, (forward[1] + reverse[0]) / 2
    mean = _mixed(p, q, share)
    return _slope(p, (1 - share) * (p - mean)), _slope(q, share * (q - mean))


def _softmax_divergence_jvp(kind, share, primals, tangents):
    teacher, student = primals
    value = _softmax_divergence(kind, share, teacher, student)
    slopes = _slopes(kind, _log_probs(teacher), _log_probs(student), share)
    change = jnp.zeros_like(value)
    for slope, tangent in zip(slopes, tangents, strict=True):
        if not isinstance(tangent, SymbolicZero):
            change += (slope * tangent).sum(-1)
    return value, change


_softmax_divergence.defjvp(_softmax_divergence_jvp, symbolic_zeros=True)

__all__ = ["DIVERGENCES", "check", "kl", "softmax_divergence"]
