"""Contrastive losses over the views of all examples of the batch.

Embeddings are `[b, v, d]`; padding rows are never candidates. Losses that need all similarities of
the batch store them in one table, as "dense" below, or take an argument `form`, which affects
memory use only. With n vectors, G devices and blocks of `BLOCK`:

* "dense": one table, `n * n / G` numbers on a device;
* "gathered": each device gathers all candidates explicitly and computes the rows of its own
  anchors; same size as "dense", independent of how the compiler partitions a product;
* "ring": candidates are passed around the devices and processed in blocks, each recomputed in the
  backward pass; `n / G * min(n / G, BLOCK)` numbers. On one device only the blocks remain.

The devices are those of the mesh in context (`jax.set_mesh`, `jax.shard_map`). Without a mesh, or
with one device, "gathered" is the same as "dense".
"""

import functools
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from distill_jax.core import partition
from distill_jax.core.api import Array
from distill_jax.losses.ties import normalized

Form: TypeAlias = Literal["dense", "gathered", "ring"]
FORMS: tuple[str, ...] = get_args(Form)

BLOCK = 1024
"""Number of candidates per block in the form "ring"."""

FLOOR = -1e30
"""The logit of excluded candidates. Finite, so that an anchor without candidates has gradient 0."""

Rows: TypeAlias = Mapping[str, Array]
"""Anchors or candidates: arrays with one leading axis."""

Sums: TypeAlias = tuple[Array, ...]
"""Partial results of the anchors over a set of candidates, each `[m]`."""


def normalize(x: Array, *, epsilon: float = 1e-12) -> Array:
    """Returns vectors of length one along the last axis, float32 or wider.

    Zero stays zero, without a gradient.
    """
    return normalized(x.astype(jnp.promote_types(x.dtype, jnp.float32)), epsilon=epsilon)


def products(x: Array, y: Array) -> Array:
    """Returns all inner products, `[m, d], [n, d] -> [m, n]`, in full precision on every device."""
    return jnp.matmul(x, y.T, precision="highest")


def over_candidates(
    block: Callable[[Rows, Rows], Sums],
    merge: Callable[[Sums, Sums], Sums],
    anchors: Rows,
    candidates: Rows,
    *,
    start: tuple[float, ...],
    form: str,
) -> Sums:
    """Reduces over all candidates for each anchor.

    Args:
      block: computes the partial results of the anchors over a block of candidates.
      merge: combines the partial results of two sets of candidates; `start` is its neutral element.
      anchors: m rows. They must include `place`, `[m]`.
      candidates: n rows.
      start: the partial results of an empty set of candidates.
      form: one of `FORMS`.
    """
    sizes = partition.axes_in_context()
    axes = tuple(axis for axis in partition.BATCH_AXES if axis in sizes)
    devices = partition.shards_in_context()
    if form == "dense" or (form == "gathered" and devices == 1):
        return block(anchors, candidates)
    fold = functools.partial(_in_blocks, block, merge)

    def gathered(anchors, candidates):
        return block(anchors, jax.lax.all_gather(candidates, axes, tiled=True))

    def ring(anchors, candidates):
        onwards = [(i, (i + 1) % devices) for i in range(devices)]

        def hop(carry, _):
            here, sums = carry
            there = jax.lax.ppermute(here, axes, onwards)
            return (there, fold(sums, anchors, here)), None

        carry = (dict(candidates), _started(start, anchors))
        (_, sums), _ = jax.lax.scan(hop, carry, length=devices)
        return sums

    if devices == 1:
        return fold(_started(start, anchors), anchors, candidates)
    return jax.shard_map(
        ring if form == "ring" else gathered,
        in_specs=PartitionSpec(axes),
        out_specs=PartitionSpec(axes),
        axis_names=set(sizes),
    )(dict(anchors), dict(candidates))


def _started(start: tuple[float, ...], anchors: Rows) -> Sums:
    dtype = anchors["vector"].dtype
    # Derived from the anchors, since under `shard_map` it must vary over devices as they do.
    nothing = (0 * anchors["place"]).astype(dtype)
    return tuple(nothing + value for value in start)


def _in_blocks(block, merge, sums: Sums, anchors: Rows, candidates: Rows) -> Sums:
    """Merges the results of blocks of candidates; blocks are recomputed in the backward pass."""

    @jax.checkpoint
    def one(sums, anchors, candidates):
        return merge(sums, block(anchors, candidates))

    n = candidates["usable"].shape[0]
    if n <= BLOCK:
        return one(sums, anchors, candidates)
    count = -(-n // BLOCK)

    def split(x):
        padded = jnp.pad(x, [(0, count * BLOCK - n)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(count, BLOCK, *x.shape[1:])

    blocks = {name: split(x) for name, x in candidates.items()}  # padded with `usable` false
    body = lambda sums, part: (one(sums, anchors, part), None)  # noqa: E731
    return jax.lax.scan(body, sums, blocks)[0]


def _softmax_block(anchors: Rows, candidates: Rows) -> Sums:
    logits = products(anchors["vector"], candidates["vector"])
    own = anchors["place"][:, None] == candidates["place"][None]
    usable = candidates["usable"][None] & ~own
    positive = usable & (anchors["group"][:, None] == candidates["group"][None])
    return (
        jax.nn.logsumexp(jnp.where(usable, logits, FLOOR), axis=1),
        jnp.where(positive, logits, 0).sum(1),
        positive.sum(1).astype(logits.dtype),
    )


def _softmax_merge(a: Sums, b: Sums) -> Sums:
    return (jnp.logaddexp(a[0], b[0]), a[1] + b[1], a[2] + b[2])


def softmax_contrast(
    anchors: Array,
    candidates: Array,
    *,
    groups: tuple[Array, Array],
    usable: Array,
    leave_out_own: bool,
    form: str,
) -> Array:
    """Mean over positives of `-log softmax` over all candidates, `[m, d], [n, d] -> [m]`.

    `L_i = log sum_a exp(s_ia) - mean of s_ip over the positives p of i`, with s the inner products.
    The loss of an anchor without positives is 0.

    Args:
      anchors: unit vectors divided by the temperature.
      candidates: unit vectors.
      groups: ints `[m]` and `[n]`; candidates of the anchor's group are its positives.
      usable: bool `[n]`, false for rows that are not candidates.
      leave_out_own: whether anchors and candidates are the same list; each anchor then excludes
        itself.
      form: one of `FORMS`.
    """
    place = jnp.arange(anchors.shape[0])
    log_all, total, count = over_candidates(
        _softmax_block,
        _softmax_merge,
        {
            "vector": anchors,
            "group": groups[0],
            "place": place if leave_out_own else -1 - place,
        },
        {
            "vector": candidates,
            "group": groups[1],
            "place": jnp.arange(candidates.shape[0]),
            "usable": usable,
        },
        start=(FLOOR, 0.0, 0.0),
        form=form,
    )
    return jnp.where(count > 0, log_all - total / jnp.maximum(count, 1), 0)


def nt_xent(z: Array, mask: Array, *, temperature: float, form: str = "dense") -> Array:
    """Normalized, temperature-scaled cross-entropy, `[b, v, d] -> [b]`.

    Chen, Kornblith, Norouzi, Hinton (2020, SimCLR, arXiv:2002.05709), eq. 1, mean over the views of
    an example as anchors and over the other views as positives. The negatives of an anchor are all
    views of the other examples.

    Args:
      z: embeddings of views, v at least 2; normalized here.
      mask: float `[b]`, 0 on padding.
      temperature: tau.
      form: one of `FORMS`.
    """
    return sup_con(z, jnp.arange(z.shape[0]), mask, temperature=temperature, form=form)


def sup_con(
    z: Array, label: Array, mask: Array, *, temperature: float, form: str = "dense"
) -> Array:
    """Supervised contrastive loss, `[b, v, d], [b] -> [b]`.

    The mean over the views of an example as anchors.

    Khosla et al. (2020, arXiv:2004.11362), the loss with the sum over positives outside the
    logarithm, eq. 2: `-1 / |P(i)| sum_{p in P(i)} log(exp(z_i . z_p / tau) / sum_{a != i} exp(z_i .
    z_a / tau))`, with P(i) all other views of the class of i in the batch.

    Args:
      z: embeddings of views, v at least 2; normalized here.
      label: ints; views with equal labels are positives of each other.
      mask: float `[b]`, 0 on padding.
      temperature: tau.
      form: one of `FORMS`.
    """
    b, v, d = z.shape
    z = normalize(z).reshape(b * v, d)
    group = jnp.repeat(label, v)
    value = softmax_contrast(
        z / temperature,
        z,
        groups=(group, group),
        usable=jnp.repeat(mask > 0, v),
        leave_out_own=True,
        form=form,
    )
    return value.reshape(b, v).mean(1)


def soft_con(z: Array, probs: Array, mask: Array, *, temperature: float) -> Array:
    """Supervised contrastive loss with soft positives, `[b, v, d], [b, k] -> [b]`.

    Bai et al. (2023, BaCon, arXiv:2310.01376): the loss of `sup_con` with each pair weighted
    by `m_ij = q_i . q_j`, 1 for two views of one example, divided by the sum of the weights. Usage
    with the logits `[b, v, k]` of a cosine classifier:

        probs = jax.lax.stop_gradient(debiased_probs(logits, prior))
        value = soft_con(z, probs, mask, temperature=0.1)  # [b]
        far = marginal_divergence(logits.reshape(b * v, k), prior, jnp.repeat(mask, v))  # of all

    Args:
      z: embeddings of views; normalized here.
      probs: q, estimated class probabilities of each example; see `debiased_probs`.
      mask: float `[b]`, 0 on padding.
      temperature: tau.
    """
    b, v, d = z.shape
    z = normalize(z).reshape(b * v, d)
    agreement = jnp.where(jnp.eye(b, dtype=bool), 1, products(probs, probs))
    own = jnp.eye(b * v, dtype=bool)
    usable = jnp.repeat(mask > 0, v)[None] & ~own
    weights = jnp.where(usable, jnp.repeat(jnp.repeat(agreement, v, 0), v, 1), 0)
    log_p = jax.nn.log_softmax(jnp.where(usable, products(z, z) / temperature, FLOOR), axis=1)
    total = jnp.maximum(weights.sum(1), jnp.finfo(weights.dtype).tiny)
    return -((weights * jnp.where(usable, log_p, 0)).sum(1) / total).reshape(b, v).mean(1)


def debiased_probs(
    logits: Array, prior: Array, *, temperature: float = 0.1, power: float = 0.5
) -> Array:
    """Class probabilities corrected for an estimated prior, `[b, v, k], [k] -> [b, k]`.

    Mean over views of `softmax(logits / temperature - power log prior)` (BaCon).

    Args:
      logits: logits of a cosine classifier.
      prior: positive, estimated share of each class; computed outside the training step.
      temperature: temperature of the softmax.
      power: exponent of the prior.
    """
    shift = power * jnp.log(prior)
    return jax.nn.softmax(logits / temperature - shift[None, None], axis=-1).mean(1)


def marginal_divergence(
    logits: Array, prior: Array, mask: Array, *, temperature: float = 0.1, power: float = 1.1
) -> Array:
    """Divergence of a batch's predictions from an estimated class distribution, a scalar.

    `R = log k - H(p')`, `p' ~ p / prior^power`, with p the mean of `softmax(logits / temperature)`.
    This is the regularizer of BaCon. It is at least 0, and 0 if p is proportional to `prior^power`.

    Args:
      logits: `[b, k]`.
      prior: `[k]`, positive.
      mask: float `[b]`, 0 on padding.
      temperature: temperature of the softmax.
      power: exponent of the prior.
    """
    probs = jax.nn.softmax(logits / temperature, axis=-1)
    mean = (mask[:, None] * probs).sum(0) / jnp.maximum(mask.sum(), 1)
    # Below the smallest normal number a class contributes no entropy.
    mean = jnp.maximum(mean, jnp.finfo(mean.dtype).tiny)
    log_p = jax.nn.log_softmax(jnp.log(mean) - power * jnp.log(prior))
    return jnp.log(logits.shape[-1]) + (jnp.exp(log_p) * log_p).sum()


def queue_contrast(
    queries: Array, keys: Array, queue: Array, usable: Array, *, temperature: float
) -> Array:
    """InfoNCE of queries and keys with a queue of negatives, `[b, d], [b, d], [q, d] -> [b]`.

    He et al. (2020, MoCo, arXiv:1911.05722), eq. 1.

    Args:
      queries: normalized here.
      keys: normalized here; no gradient flows through them.
      queue: unit vectors.
      usable: bool `[q]`, false for empty slots.
      temperature: tau.
    """
    queries, keys = normalize(queries), jax.lax.stop_gradient(normalize(keys))
    positive = (queries * keys).sum(1) / temperature
    negative = products(queries, queue.astype(queries.dtype)) / temperature
    negative = jnp.where(usable[None], negative, FLOOR)
    return jnp.logaddexp(positive, jax.nn.logsumexp(negative, axis=1)) - positive


def pair_contrast(
    x: Array, y: Array, mask: Array, *, temperature: float | Array = 1.0, form: str = "dense"
) -> Array:
    """Cross-entropy of identifying each anchor's partner in the batch, `[b, d], [b, d] -> [b]`.

    Args:
      x: anchors; normalized here.
      y: candidates; row i is the partner of anchor i; normalized here.
      mask: float `[b]`, 0 on padding.
      temperature: a number, or one per anchor, `[b]`.
      form: one of `FORMS`.
    """
    place = jnp.arange(x.shape[0])
    temperature = jnp.broadcast_to(jnp.asarray(temperature), mask.shape)
    return softmax_contrast(
        normalize(x) / temperature[:, None],
        normalize(y),
        groups=(place, place),
        usable=mask > 0,
        leave_out_own=False,
        form=form,
    )


def clip_contrast(x: Array, y: Array, mask: Array, scale: Array, *, form: str = "dense") -> Array:
    """Symmetric cross-entropy of pairs, `[b, d], [b, d] -> [b]`.

    Radford et al. (2021, CLIP, arXiv:2103.00020), figure 3: the mean over both directions.

    Args:
      x: one half of each pair; normalized here.
      y: the other half; normalized here.
      mask: float `[b]`, 0 on padding.
      scale: inverse temperature, `[b]`, equal for all rows.
      form: one of `FORMS`.
    """
    there = pair_contrast(x, y, mask, temperature=1 / scale, form=form)
    back = pair_contrast(y, x, mask, temperature=1 / scale, form=form)
    return (there + back) / 2


def sigmoid_contrast(
    x: Array, y: Array, mask: Array, scale: Array, bias: Array, *, form: str = "dense"
) -> Array:
    """Binary cross-entropy of all pairs, summed over candidates, `[b, d], [b, d] -> [b]`.

    Zhai et al. (2023, SigLIP, arXiv:2303.15343): `sum_j softplus(-l_ij (t x_i . y_j + c))`, with l
    1 for a matching pair and -1 otherwise. Blocks of candidates are independent of each other.

    Args:
      x: one half of each pair; normalized here.
      y: the other half; normalized here.
      mask: float `[b]`, 0 on padding.
      scale: t, `[b]`, equal for all rows.
      bias: c, `[b]`, equal for all rows.
      form: one of `FORMS`.
    """
    x = normalize(x) * scale[:, None]
    place = jnp.arange(x.shape[0])
    anchors = {"vector": x, "place": place, "bias": bias}
    candidates = {"vector": normalize(y), "place": place, "usable": mask > 0}
    merge = lambda a, b: (a[0] + b[0],)  # noqa: E731
    sums = over_candidates(_sigmoid_block, merge, anchors, candidates, start=(0.0,), form=form)
    return sums[0]


def _sigmoid_block(anchors: Rows, candidates: Rows) -> Sums:
    logits = products(anchors["vector"], candidates["vector"]) + anchors["bias"][:, None]
    pair = anchors["place"][:, None] == candidates["place"][None]
    value = jax.nn.softplus(jnp.where(pair, -logits, logits))
    return (jnp.where(candidates["usable"][None], value, 0).sum(1),)


def _squared_distances(x: Array, y: Array) -> Array:
    # Not computed from a norm, whose derivative at distance 0 is infinite.
    return 2 - 2 * products(x, y)


def attraction(
    z: Array, *, t: float, uniform: bool = False, stop_grad_weights: bool = False
) -> Array:
    """Attraction to the other views of an example, weighted towards far views, `[b, v, d] -> [b]`.

    Zheng et al. (2021, CACR, arXiv:2105.03746): mean over views of `sum_{u != v} w_u |z_v-z_u|^2`,
    with w the softmax over u of `t |z_v-z_u|^2`. With two views w is 1.

    Args:
      z: embeddings of views; normalized here.
      t: t+, 0 or more.
      uniform: whether all w are equal, as a control.
      stop_grad_weights: whether w has no gradient.
    """
    z = normalize(z)
    v = z.shape[1]
    cost = 2 - 2 * jnp.einsum("bvd,bud->bvu", z, z, precision="highest")
    other = ~jnp.eye(v, dtype=bool)[None]
    weights = _weights(t * cost, other, uniform=uniform, stop=stop_grad_weights)
    return (weights * cost).sum(2).mean(1)


def repulsion(
    z: Array, mask: Array, *, t: float, uniform: bool = False, stop_grad_weights: bool = False
) -> Array:
    """Repulsion from other examples, weighted towards close ones, `[b, v, d] -> [b]`.

    CACR: mean over pairs of views v < u of `-sum_{j != i} w_j |z_i^v-z_j^u|^2`, with w the softmax
    over j of `-t |z_i^v-z_j^u|^2`.

    Args:
      z: embeddings of views; normalized here.
      mask: float `[b]`, 0 on padding.
      t: t-, 0 or more.
      uniform: whether all w are equal, as a control.
      stop_grad_weights: whether w has no gradient.
    """
    z = normalize(z)
    b, v, _ = z.shape
    others = (mask > 0)[None] & ~jnp.eye(b, dtype=bool)
    values = []
    for i in range(v):
        for j in range(i + 1, v):
            cost = _squared_distances(z[:, i], z[:, j])
            weights = _weights(-t * cost, others, uniform=uniform, stop=stop_grad_weights)
            values.append(-(weights * cost).sum(1))
    return jnp.stack(values).mean(0)


def _weights(logits: Array, allowed: Array, *, uniform: bool, stop: bool) -> Array:
    """Returns a softmax over the allowed entries, 0 elsewhere and in rows without any."""
    logits = 0 * logits if uniform else logits
    weights = jax.nn.softmax(jnp.where(allowed, logits, FLOOR), axis=-1)
    weights = jnp.where(allowed, weights, 0)
    return jax.lax.stop_gradient(weights) if stop else weights
