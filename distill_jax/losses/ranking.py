"""Losses on the order of an anchor's neighbours: soft sorting, and nearest-neighbour voting.

Embeddings are `[b, v, d]`; the candidates of an anchor are the views of all other examples of
the batch, without padding.
"""

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core.api import Array
from distill_jax.losses.contrastive import normalize, products

EPSILON = 1e-6
"""Shares are clipped to this distance from 0 and 1 before the logarithm."""


def soft_sort(x: Array, *, steepness: float) -> tuple[Array, Array]:
    """Sorts softly in ascending order, `[..., n] -> [..., n], [..., n, n]`.

    The odd-even network of n layers (Petersen, Borgelt, Kuehne, Deussen 2021, arXiv:2105.04019)
    with the Cauchy comparator (2022, arXiv:2203.09630): for wires a, b the lower output is
    `s a + (1 - s) b` and the upper `(1 - s) a + s b`, with `s = 1/2 + arctan(beta (b - a)) / pi`.

    Args:
      x: numbers to be sorted.
      steepness: beta, positive; the limit at infinity is a hard sort.

    Returns:
      The sorted numbers, and the doubly stochastic matrix whose row r holds the weights of the
      inputs in rank r.
    """
    n = x.shape[-1]
    wire, layer = np.arange(n), np.arange(n)[:, None]
    upwards = (wire + layer) % 2 == 0
    partner = wire + np.where(upwards, 1, -1)
    partner = np.where((partner < 0) | (partner == n), wire, partner)  # no partner: unchanged
    matrix = jnp.broadcast_to(jnp.eye(n, dtype=x.dtype), (*x.shape, n))

    def pass_layer(rows, layer):
        partner, sign = layer
        other = rows[..., partner, :]
        ahead = (other - rows)[..., 0] * sign.reshape((1,) * (x.ndim - 1) + (n,))
        share = 0.5 + jnp.arctan(steepness * ahead[..., None]) / jnp.pi
        return share * rows + (1 - share) * other, None

    # The same mixing applies to the numbers and to the rows of the matrix.
    rows = jnp.concatenate([x[..., None], matrix], axis=-1)
    signs = np.where(upwards, 1.0, -1.0)
    rows, _ = jax.lax.scan(pass_layer, rows, (jnp.asarray(partner), jnp.asarray(signs, x.dtype)))
    return rows[..., 0], rows[..., 1:]


def group_order(positive: Array, negative: Array, *, steepness: float) -> Array:
    """Loss on the order of positives before negatives, `[..., p], [..., k] -> [...]`.

    Shvetsova, Petersen, Kukleva, Schiele, Kuehne (2023, GroCo, arXiv:2301.02009): each group is
    sorted, then both are soft-sorted together. The loss is the binary cross-entropy of each score's
    share in the top p ranks, with target 1 for positives and 0 for negatives, averaged over scores.

    Args:
      positive: similarities of positives.
      negative: similarities of negatives.
      steepness: steepness of the comparators, see `soft_sort`.
    """
    p, k = positive.shape[-1], negative.shape[-1]
    scores = jnp.concatenate([jnp.sort(negative, axis=-1), jnp.sort(positive, axis=-1)], axis=-1)
    matrix = soft_sort(scores, steepness=steepness)[1]
    share = jnp.clip(matrix[..., k:, :].sum(-2), EPSILON, 1 - EPSILON)
    right = jnp.log(share[..., k:]).sum(-1) + jnp.log1p(-share[..., :k]).sum(-1)
    return -right / (k + p)


def _strangers(b: int, v: int, mask: Array) -> Array:
    """Returns which pairs of views belong to different examples, the second not padding."""
    example = jnp.repeat(jnp.arange(b), v)
    return (example[:, None] != example[None]) & jnp.repeat(mask > 0, v)[None]


def groco(z: Array, mask: Array, *, negatives: int, steepness: float) -> Array:
    """Loss that ranks an anchor's other views before its hardest negatives, `[b, v, d] -> [b]`.

    GroCo, mean over the views of an example as anchors. Only anchors receive a gradient.

    Args:
      z: embeddings of views, v at least 2; normalized here.
      mask: float `[b]`, 0 on padding.
      negatives: k, the number of most similar other examples; all if there are fewer. Each is
        compared by the view with the anchor's own view number, so that the k examples differ. If
        fewer than k are not padding, the scores are filled up with -1.
      steepness: steepness of the comparators.
    """
    b, v, _ = z.shape
    z = normalize(z)
    fixed = jax.lax.stop_gradient(z)
    scores = jnp.einsum("bvd,bud->bvu", z, fixed, precision="highest")
    others = jnp.array([[u for u in range(v) if u != i] for i in range(v)])
    positive = jnp.take_along_axis(scores, others[None], axis=2)

    similar = jnp.einsum("bvd,cvd->bvc", fixed, fixed, precision="highest")
    similar = jnp.where(_strangers(b, 1, mask)[:, None], similar, -jnp.inf)
    similarity, nearest = jax.lax.top_k(similar, min(negatives, b - 1))
    negative = jnp.einsum(
        "bvd,bvkd->bvk", z, fixed[nearest, jnp.arange(v)[None, :, None]], precision="highest"
    )
    negative = jnp.where(jnp.isfinite(similarity), negative, -1)
    return group_order(positive, negative, steepness=steepness).mean(1)


def look(z: Array, label: Array, mask: Array, *, neighbours: int, temperature: float) -> Array:
    """Leave-one-out vote of the nearest neighbours, `[b, v, d], [b] -> [b]`.

    Feng et al. (2022, LOOK, arXiv:2110.06014): `-log (sum of exp(z_i . z_j / tau) over neighbours j
    with the label of i / sum over all neighbours)`, mean over the views of an example as anchors.
    The neighbours are the most similar views of other examples and the other views of the example
    itself, so that at least one neighbour has the label.

    Args:
      z: embeddings of views, v at least 2; normalized here.
      label: ints.
      mask: float `[b]`, 0 on padding.
      neighbours: number of views of other examples; all if there are fewer.
      temperature: tau.
    """
    b, v, d = z.shape
    z = normalize(z)
    own = jnp.einsum("bvd,bud->bvu", z, z, precision="highest") / temperature
    own = jnp.where(jnp.eye(v, dtype=bool)[None], -jnp.inf, own).reshape(b * v, v)

    flat, labels = z.reshape(b * v, d), jnp.repeat(label, v)
    logits = jnp.where(_strangers(b, v, mask), products(flat, flat) / temperature, -jnp.inf)
    logits, nearest = jax.lax.top_k(logits, min(neighbours, (b - 1) * v))
    agrees = labels[nearest] == labels[:, None]
    everything = jnp.concatenate([own, logits], axis=1)
    votes = jnp.concatenate([own, jnp.where(agrees, logits, -jnp.inf)], axis=1)
    value = jax.nn.logsumexp(everything, axis=1) - jax.nn.logsumexp(votes, axis=1)
    return value.reshape(b, v).mean(1)
