"""Transforms of lists: noise by which rankings are drawn, and how easy their parts are."""

import jax
import jax.numpy as jnp

from distill_jax.core import ranges, rng
from distill_jax.core.api import Array, Batch, Key, Transform
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.data.transforms._draws import require, uniform


def make_gumbel_noise(*, rankings: int = 8) -> Transform:
    """Returns a transform that adds `gumbel` float32 `[b, k, n]`, standard Gumbel noise.

    n is the number of labels of an example: a ranking sorts scores of candidates with their noise.

    Args:
      rankings: k, number of rankings of each list.

    Raises:
      ArgumentError: `rankings` is below 1; as it is applied, labels that are not `[b, n]`.
    """
    ranges.sizes(rankings=rankings)

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        labels = jnp.shape(batch.get("label", 0))
        require(len(labels) == 2, "there are no lists of labels", "label")
        shape = (rankings, labels[1])
        draw = jax.vmap(lambda k: jax.random.gumbel(k, shape, jnp.float32))
        return {**batch, "gumbel": draw(rng.example_keys(key, batch))}

    return apply


HEURISTICS = ("reciprocal_rank", "normalized_score", "kde")
"""Ways to turn the scores of a first-stage ranker into values in [0, 1]."""

ORDERS = ("easy", "hard", "shuffled")
"""Which part of a list counts first: the easy part, the hard part, or a random one."""


def first_stage_value(scores: Array, mask: Array, *, kind: str) -> Array:
    """Returns how high a first-stage ranker ranks each candidate, in [0, 1], `[b, n]`.

    MacAvaney et al. 2020 (arXiv:2004.14269): `reciprocal_rank` is 1 for the first candidate, 1/2
    for the second; `normalized_score` is linear from 0 for the lowest to 1 for the highest score;
    `kde` is the distribution function of a Gaussian kernel density estimate of the list's scores,
    with the bandwidth of Scott. Absent candidates get 0.

    Args:
      scores: `[b, n]`.
      mask: `[b, n]`, 0 for candidates that are absent.
      kind: one of `HEURISTICS`.
    """
    mask = (mask > 0).astype(scores.dtype)
    count = jnp.maximum(mask.sum(1, keepdims=True), 1)
    if kind == "reciprocal_rank":
        ranked = jnp.where(mask > 0, scores, -jnp.inf)
        rank = jnp.argsort(jnp.argsort(-ranked, axis=1, stable=True), axis=1, stable=True)
        return mask / (1 + rank)
    if kind == "normalized_score":
        low = jnp.where(mask > 0, scores, jnp.inf).min(1, keepdims=True)
        high = jnp.where(mask > 0, scores, -jnp.inf).max(1, keepdims=True)
        return jnp.where((mask > 0) & (high > low), (scores - low) / (high - low), 0)
    mean = (mask * scores).sum(1, keepdims=True) / count
    variance = (mask * (scores - mean) ** 2).sum(1, keepdims=True) / jnp.maximum(count - 1, 1)
    width = jnp.sqrt(variance) * count**-0.2
    gaps = (scores[:, :, None] - scores[:, None]) / jnp.where(width > 0, width, 1)[:, :, None]
    below = (jax.scipy.stats.norm.cdf(gaps) * mask[:, None]).sum(2) / count
    return mask * below


def ease(values: Array, label: Array, mask: Array, *, pairs: bool) -> tuple[Array, Array]:
    """Returns how easy examples of a list are, in [0, 1], and which there are.

    MacAvaney et al. 2020, section 3: a relevant candidate is easy if the first stage ranks it high,
    another if it ranks it low; a pair is easy if the first stage has it in the right order.

    Args:
      values: from `first_stage_value`, `[b, n]`.
      label: relevances `[b, n]`, 0 or more.
      mask: `[b, n]`, 0 for candidates that are absent.
      pairs: whether examples are pairs.

    Returns:
      Two arrays, `[b, n]` of candidates, or `[b, n, n]` of pairs: candidate i with the higher
      relevance, then j.
    """
    present = mask > 0
    if not pairs:
        return jnp.where(label > 0, values, 1 - values), present.astype(values.dtype)
    both = present[:, :, None] & present[:, None] & (label[:, :, None] > label[:, None])
    return (values[:, :, None] - values[:, None] + 1) / 2, both.astype(values.dtype)


def make_ranking_ease(
    *, heuristic: str = "reciprocal_rank", pairs: bool = True, order: str = "easy"
) -> Transform:
    """Returns a transform that adds `ease` float32 in [0, 1], for the objective `ranking`.

    It is `[b, n, n]` for pairs and `[b, n]` for candidates, from the `first_stage` scores `[b, n]`
    and the relevances; see `first_stage_value` and `ease`.

    Args:
      heuristic: one of `HEURISTICS`.
      pairs: whether examples are pairs of a list, or candidates.
      order: "easy"; "hard" takes 1 - ease, the anti-curriculum; "shuffled" permutes the values
        among the examples of a list, a control with the same distribution.

    Raises:
      ArgumentError: an unknown heuristic or order; as it is applied, a batch without scores.
    """
    for name, value, known in (("heuristic", heuristic, HEURISTICS), ("order", order, ORDERS)):
        if value not in known:
            raise ArgumentError(f"no {name} {value!r}", where=name, hint=nearest(value, known))

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        require("first_stage" in batch, "a batch has no first_stage scores", "ranking_ease")
        scores, label = batch["first_stage"], batch["label"]
        require(jnp.shape(scores) == jnp.shape(label), "one score for each label", "ranking_ease")
        mask = jnp.broadcast_to(batch.get("labelled", jnp.ones_like(scores)), scores.shape)
        values = first_stage_value(scores, mask, kind=heuristic)
        values, present = ease(values, label, mask, pairs=pairs)
        if order == "hard":
            values = 1 - values
        if order == "shuffled":
            flat = present.reshape(len(label), -1)
            u = uniform(key, batch, flat.shape[1])
            values = _permuted(values.reshape(flat.shape), flat, u).reshape(present.shape)
        return {**batch, "ease": (values * present).astype(jnp.float32)}

    return apply


def _permuted(x: Array, mask: Array, u: Array) -> Array:
    """Permutes the unmasked values of each row `[b, m]` in the order of `u`."""
    to = jnp.argsort(mask <= 0, axis=1, stable=True)
    at = jnp.argsort(jnp.where(mask > 0, u, 2.0), axis=1)
    rows = jnp.arange(len(x))[:, None]
    return jnp.zeros_like(x).at[rows, to].set(x[rows, at])
