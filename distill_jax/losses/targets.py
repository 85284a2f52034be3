"""Targets that mix the labels of a supervisor with the predictions of the network it trains.

Burns et al. 2023 (Weak-to-strong generalization, arXiv:2312.09390), section 4.3 and appendix A.4.
Targets carry no gradient.
"""

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array

BALANCING = 20
"""Iterations that balance the classes of three or more."""


def masked_quantile(x: Array, mask: Array, share: Array) -> Array:
    """Returns the quantile of the real entries of `x` `[b]`, interpolated linearly.

    Args:
      x: values `[b]`.
      mask: `[b]`, 0 on entries that do not count; one entry at least must count.
      share: the level, in [0, 1].
    """
    ordered = jnp.sort(jnp.where(mask > 0, x, jnp.inf))
    last = jnp.maximum((mask > 0).sum() - 1, 0)
    at = share * last
    low = jnp.floor(at).astype(jnp.int32)
    below, above = ordered[low], ordered[jnp.minimum(low + 1, last)]
    return below + (at - low) * (above - below)


def hardened(probs: Array, weak: Array, mask: Array) -> Array:
    """Returns hardened predictions, one-hot `[b, k]`, of classes as frequent as in `weak`.

    With two classes, the second where its probability exceeds the quantile of the batch at which
    the share of the second class equals the mean of `weak`. With more, the largest entry after
    each class is multiplied by a factor, such that the mean probabilities over the batch are those
    of `weak`; the paper has two classes only.

    Args:
      probs: predictions of the network `[b, k]`.
      weak: labels of the supervisor `[b, k]`.
      mask: `[b]`, 0 on padding.
    """
    probs, weak = jax.lax.stop_gradient((probs, weak))
    k, total = probs.shape[-1], jnp.maximum(mask.sum(), 1)
    prior = (mask[:, None] * weak).sum(0) / total
    if k == 2:
        top = (probs[:, 1] > masked_quantile(probs[:, 1], mask, 1 - prior[1])).astype(jnp.int32)
        return jax.nn.one_hot(top, k, dtype=probs.dtype)
    tiny = jnp.finfo(probs.dtype).tiny
    log_p, log_prior = jnp.log(jnp.maximum(probs, tiny)), jnp.log(jnp.maximum(prior, tiny))

    def balance(_, bias: Array) -> Array:
        now = (mask[:, None] * jax.nn.softmax(log_p + bias[None])).sum(0) / total
        return bias + log_prior - jnp.log(jnp.maximum(now, tiny))

    bias = jax.lax.fori_loop(0, BALANCING, balance, jnp.zeros_like(log_prior))
    return jax.nn.one_hot((log_p + bias[None]).argmax(-1), k, dtype=probs.dtype)


def product(probs: Array, weak: Array, *, own: Array | float, power: Array | float) -> Array:
    """Returns `probs^own weak^power`, normalized over the classes, `[b, k]`.

    Args:
      probs: predictions of the network `[b, k]`.
      weak: labels of the supervisor `[b, k]`.
      own: exponent of the predictions.
      power: exponent of the labels.
    """
    probs, weak = jax.lax.stop_gradient((probs, weak))
    tiny = jnp.finfo(probs.dtype).tiny
    logs = own * jnp.log(jnp.maximum(probs, tiny)) + power * jnp.log(jnp.maximum(weak, tiny))
    return jax.nn.softmax(logs)


def debiased(probs: Array, blank: Array) -> Array:
    """Returns labels without the answer that a source gives whatever it sees, `[b, k]`.

    `p(y | x) - p(y | blank)`, moved to the mean `1 / k`, cut at 0 and normalized (Wang et al. 2025,
    arXiv:2501.00192, subtract the probabilities of a judge that sees no image). No gradient.

    Args:
      probs: answers of the source `[b, k]`.
      blank: its answer to an input without content, `[k]`.
    """
    probs, blank = jax.lax.stop_gradient((probs, blank))
    moved = jnp.maximum(probs - blank[None] + 1 / probs.shape[-1], 0)
    return moved / moved.sum(-1, keepdims=True)
