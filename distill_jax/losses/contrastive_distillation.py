"""Contrastive losses between student and teacher embeddings: one value per example, `[b]`."""

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array


def noise_contrast(
    positive: Array, negative: Array, weights: Array, *, log_z: Array, num_examples: int
) -> Array:
    """Noise-contrastive loss, `[b], [b, q], [b, q] -> [b]`, in nats.

    CRD (Tian et al. 2020, arXiv:1910.10699, section 3.1) with one positive and q
    negatives: `-log h+ - sum_j w_j log(1 - h-_j)` with `h = p / (p + q / n)` and
    `p = exp(logit) / Z`.

    Args:
      positive: logits of the matching pairs, `[b]`.
      negative: logits of the negative pairs, `[b, q]`.
      weights: weights of the negatives, 1 or 0 for excluded ones, `[b, q]`.
      log_z: logarithm of Z, a scalar.
      num_examples: n, the number of examples over which the noise is uniform.
    """
    shift = log_z + jnp.log(negative.shape[1] / num_examples)
    return jax.nn.softplus(shift - positive) + (weights * jax.nn.softplus(negative - shift)).sum(1)


def estimate_log_z(
    positive: Array, negative: Array, weights: Array, mask: Array, *, num_examples: int
) -> Array:
    """Returns `log(n mean(exp(logit)))` over the pairs of a batch, a scalar without gradient.

    This is the constant of `noise_contrast`, which its authors estimate on the first batch.

    Args:
      positive: `[b]`.
      negative: `[b, q]`.
      weights: `[b, q]`.
      mask: `[b]`.
      num_examples: n.
    """
    logits = jnp.concatenate([positive[:, None], negative], 1)
    weights = mask[:, None] * jnp.concatenate([jnp.ones_like(positive)[:, None], weights], 1)
    log_mean = jax.nn.logsumexp(logits, b=weights) - jnp.log(weights.sum())
    return jax.lax.stop_gradient(log_mean + jnp.log(1.0 * num_examples))


def batch_contrast(student: Array, teacher: Array, allowed: Array, *, temperature: float) -> Array:
    """InfoNCE among the examples of a batch, in both directions, `[b, d], [b, d] -> [b]`, in nats.

    `-log softmax_j(s_i . t_j / T)_i - log softmax_j(t_i . s_j / T)_i` (van den Oord et al. 2018,
    arXiv:1807.03748).

    Args:
      student: unit vectors, `[b, d]`.
      teacher: unit vectors, `[b, d]`.
      allowed: bool `[b, b]`, whether j is a negative of i; i is always its own positive.
      temperature: T, positive.
    """
    logits = student @ teacher.T / temperature
    allowed = allowed | jnp.eye(len(logits), dtype=bool)

    def cross_entropy(logits):
        return jax.nn.logsumexp(logits, axis=1, where=allowed) - jnp.diagonal(logits)

    return cross_entropy(logits) + cross_entropy(logits.T)
