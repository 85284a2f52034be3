"""Losses of ranked lists: Plackett-Luce policies, discounted gains, leave-one-out baselines.

Shape letters here: n candidates of a list, k sampled rankings. A ranking is a permutation of the
candidates, best first. Candidates of mask 0 do not belong to the list.
"""

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array

_ABSENT = -1e30


def plackett_luce_rankings(scores: Array, gumbel: Array, mask: Array) -> Array:
    """Draws rankings from the Plackett-Luce distribution of scores, int32 `[b, k, n]`.

    Sorting scores with Gumbel noise draws from it (Yellott 1977, J. Math. Psychology 15(2)).

    Args:
      scores: `[b, n]`.
      gumbel: standard Gumbel noise `[b, k, n]`; zeros give the most probable ranking.
      mask: `[b, n]`.
    """
    noisy = jnp.where(mask[:, None] > 0, scores[:, None] + gumbel, _ABSENT)
    return jnp.argsort(-jax.lax.stop_gradient(noisy), axis=-1)


def plackett_luce_log_prob(scores: Array, ranking: Array, mask: Array) -> Array:
    """Returns `log prod_i exp s_(r_i) / sum_(j >= i) exp s_(r_j)`, `[b, k]`.

    Args:
      scores: `[b, n]`.
      ranking: int `[b, k, n]`, absent candidates last.
      mask: `[b, n]`.
    """
    scores = jnp.where(mask > 0, scores, _ABSENT)
    ranked, present = take(scores, ranking), take(mask, ranking)
    left = jax.lax.cumlogsumexp(ranked, axis=ranked.ndim - 1, reverse=True)
    return jnp.where(present > 0, ranked - left, 0).sum(-1)


def ndcg(relevance: Array, ranking: Array, mask: Array, *, cutoff: int) -> Array:
    """Returns the normalized discounted cumulative gain of rankings, `[b, k]`.

    `DCG = sum_(i <= cutoff) (2^rel_(r_i) - 1) / log2(i + 1)`, divided by that of the best ranking
    (Jarvelin, Kekalainen 2002, ACM TOIS 20(4), with the gains of Burges et al. 2005). It is 0 for a
    list without a relevant candidate.

    Args:
      relevance: `[b, n]`, 0 or more.
      ranking: int `[b, k, n]`.
      mask: `[b, n]`.
      cutoff: number of ranks that count.
    """
    gains = (jnp.exp2(relevance) - 1) * mask
    ranks = jnp.arange(relevance.shape[-1], dtype=relevance.dtype)
    discount = jnp.where(ranks < cutoff, 1 / jnp.log2(ranks + 2), 0)
    best = (-jnp.sort(-gains, axis=-1) * discount[None]).sum(-1)
    found = (take(gains, ranking) * discount[None, None]).sum(-1)
    return jnp.where(best[:, None] > 0, found / jnp.where(best > 0, best, 1)[:, None], 0)


def leave_one_out(rewards: Array) -> Array:
    """Returns each reward minus the mean of the others of its example, `[b, k]`, k above 1."""
    k = rewards.shape[-1]
    return (rewards - rewards.mean(-1, keepdims=True)) * (k / (k - 1))


def take(x: Array, ranking: Array) -> Array:
    """Returns values `[b, n]` in the order of rankings `[b, k, n]`."""
    return jnp.take_along_axis(jnp.broadcast_to(x[:, None], ranking.shape), ranking, axis=-1)
