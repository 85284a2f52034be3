"""Losses on the relations between examples or channels: one share per example, `[b]`.

A loss over pairs or triplets of a batch is divided among its examples such that the mean over the
examples with mask 1 is the published loss. Examples with mask 0 are excluded from all relations.
"""

import math

import jax
import jax.numpy as jnp
import optax

from distill_jax.core.api import Array
from distill_jax.losses.ties import absolute, normalized

TRIPLET_BLOCK = 2**22
"""Maximum number of elements of an array of angles for a block of vertices."""


def distances(x: Array) -> Array:
    """Euclidean distances of all pairs, `[b, d] -> [b, b]`; no gradient where a distance is 0.

    The distance of an example to itself is set to 0, since a compiler may compute a value twice
    with different last bits.
    """
    square = ((x[:, None] - x[None]) ** 2).sum(-1)
    positive = (square > 0) & ~jnp.eye(len(x), dtype=bool)
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


def distance_share(student: Array, teacher: Array, mask: Array) -> Array:
    """Huber loss of distances over their mean, `[b, d], [b, e], [b] -> [b]`.

    RKD-D (Park et al. 2019, arXiv:1904.05068, section 3.2.1). The mean distance is over the
    n (n - 1) pairs of different examples. The loss is averaged over all n^2 pairs, including the
    pairs of an example with itself, which are 0.
    """
    n = _count(mask)

    def potential(x):
        d = distances(x)
        mean = (mask[:, None] * mask[None] * d).sum() / jnp.maximum(n * (n - 1), 1)
        return d / jnp.where(mean > 0, mean, 1)

    return optax.huber_loss(potential(student), potential(teacher)) @ mask / n


def angle_share(student: Array, teacher: Array, mask: Array) -> Array:
    """Huber loss of the cosines of triplets, `[b, d], [b, e], [b] -> [b]`, one share per vertex.

    RKD-A (Park et al. 2019, arXiv:1904.05068, section 3.2.2), averaged over all n^3 triplets. Takes
    O(b^3) time. Large batches process their vertices in blocks whose angles are recomputed in the
    backward pass, so that memory stays O(b^2).
    """
    b, n = len(mask), _count(mask)

    def share(vertex):
        *ends, i = vertex
        # Set explicitly: a compiler may compute a value twice with different last bits, and
        # normalizing their difference would give the vertex a direction from itself.
        others = (jnp.arange(b) != i)[:, None]
        s, t = (
            normalized(jnp.where(others, x - v[None], 0))
            for x, v in zip((student, teacher), ends, strict=True)
        )
        return mask @ optax.huber_loss(s @ s.T, t @ t.T) @ mask / n**2

    block = max(1, TRIPLET_BLOCK // (b * max(b, student.shape[1], teacher.shape[1])))
    if block >= b:
        return jax.vmap(share)((student, teacher, jnp.arange(b)))
    vertices = (student, teacher, jnp.arange(b))
    return jax.lax.map(jax.checkpoint(share), vertices, batch_size=block)


def similarity_share(student: Array, teacher: Array, mask: Array) -> Array:
    """Squared distance of the rows of two Gram matrices, `[b, d], [b, e], [b] -> [b]`.

    SP (Tung and Mori 2019, arXiv:1907.09682, section 3): rows are normalized; the mean is the
    squared Frobenius distance over n^2.
    """

    def rows(x):
        return normalized(x @ x.T * mask[None])

    return ((rows(student) - rows(teacher)) ** 2).sum(1) / _count(mask)


def congruence_share(
    student: Array, teacher: Array, mask: Array, *, gamma: float, order: int
) -> Array:
    """Squared difference of two kernel matrices, `[b, d], [b, e], [b] -> [b]`; the mean over n^2.

    CC (Peng et al. 2019, arXiv:1904.01802, section 3): the Gaussian kernel
    `exp(-gamma |x - y|^2)` of unit vectors, as its Taylor series in their product up to `order`:
    `exp(-2 gamma) sum_p (2 gamma)^p / p! (x . y)^p`.
    """

    def kernel(x):
        x = normalized(x)
        product, total = x @ x.T, 0.0
        for p in reversed(range(order + 1)):
            total = total * product + (2 * gamma) ** p / math.factorial(p)
        return math.exp(-2 * gamma) * total

    return (kernel(student) - kernel(teacher)) ** 2 @ mask / _count(mask)


def successive_share(student: Array, teacher: Array, mask: Array) -> Array:
    """Product of the differences of neighbouring examples, `[b, d], [b, d], [b] -> [b]`.

    The simplified form of CC: the mean over neighbours i, i + 1 in the batch of
    `sum_d |s - t|_id |s - t|_(i+1)d`. Each pair belongs to its first example.
    """
    delta = absolute(student - teacher)
    pairs = mask[:-1] * mask[1:]
    product = pairs * (delta[:-1] * delta[1:]).sum(1)
    return jnp.append(product, 0) * (_count(mask) / _count(pairs))


def probability_share(student: Array, teacher: Array, mask: Array, *, eps: float = 1e-7) -> Array:
    """KL divergence of conditional probabilities of neighbours, `[b, d], [b, e], [b] -> [b]`.

    PKT (Passalis and Tefas 2018, arXiv:1803.10837, section 3) with the cosine kernel
    `(cos + 1) / 2`; the mean is `sum_ij p_ij log(p_ij / q_ij) / n^2`, with p the teacher's. The
    paper sums over j other than i. Here j = i is included, as in the form to which the usual
    weight applies.

    Args:
      student: `[b, d]`.
      teacher: `[b, e]`.
      mask: `[b]`.
      eps: added to both probabilities inside the logarithm.
    """

    def conditional(x):
        x = normalized(x)
        kernel = (x @ x.T + 1) / 2 * mask[None]
        return kernel / jnp.maximum(kernel.sum(1, keepdims=True), eps)

    p, q = conditional(teacher), conditional(student)
    return (p * jnp.log((p + eps) / (q + eps))).sum(1) / _count(mask)


def selectivity(student: Array, teacher: Array) -> Array:
    """Maximum mean discrepancy of channels, `[b, ..., c], [b, ..., e] -> [b]`.

    NST (Huang and Wang 2017, arXiv:1707.01219, section 4) with the kernel `(x . y)^2` between
    channels, taken as normalized vectors over positions. With `A = X X^T / c` over positions, the
    discrepancy is `|A_s - A_t|^2`. This form is used if there are fewer positions than channels.
    """

    def channels(x):  # [b, c, positions]
        return normalized(x.reshape(x.shape[0], -1, x.shape[-1]).swapaxes(1, 2))

    s, t = channels(student), channels(teacher)
    if s.shape[2] <= max(s.shape[1], t.shape[1]):
        a, b = (jnp.einsum("bcp,bcq->bpq", x, x) / x.shape[1] for x in (s, t))
        return ((a - b) ** 2).sum((1, 2))

    def mean_kernel(x, y):
        return (jnp.einsum("bcp,bep->bce", x, y) ** 2).mean((1, 2))

    return mean_kernel(s, s) + mean_kernel(t, t) - 2 * mean_kernel(s, t)


def channel_correlation(student: Array, teacher: Array) -> Array:
    """Squared distance of correlations between channels, `[b, ..., c], [b, ..., c] -> [b]`.

    ICKD-C (Liu et al. 2021, arXiv:2202.03680, section 3): inner products of all pairs of channels
    as vectors over positions; each row of the matrix is normalized, and the squared Frobenius
    distance is divided by c.
    """

    def rows(x):
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        return normalized(jnp.einsum("bpc,bpe->bce", x, x))

    return ((rows(student) - rows(teacher)) ** 2).sum((1, 2)) / student.shape[-1]


def _count(mask: Array) -> Array:
    return jnp.maximum(mask.sum(), 1)
