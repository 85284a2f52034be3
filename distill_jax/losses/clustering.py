"""Losses that compare assignments of views to learned prototypes.

Logits are `[..., k]` for k prototypes. Softmaxes and Sinkhorn iterations are computed in the log
domain, in float32 or wider.
"""

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array
from distill_jax.losses.classification import soft_cross_entropy


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def centred_softmax(logits: Array, centre: Array, *, temperature: float | Array) -> Array:
    """Returns `softmax((t - c) / temperature)`, `[..., k]`.

    Caron et al. (2021, DINO, arXiv:2104.14294), eq. 1 with the centring of section 3.1.
    """
    logits = _wide(logits)
    row = centre.astype(logits.dtype).reshape((1,) * (logits.ndim - 1) + centre.shape)
    return jax.nn.softmax((logits - row) / temperature)


def move_centre(centre: Array, logits: Array, weights: Array, *, decay: float) -> Array:
    """Returns `decay c + (1 - decay) mean(t)` (DINO, eq. 4).

    Args:
      centre: c, `[k]`.
      logits: t, `[..., k]`.
      weights: `[...]`, 0 for logits to ignore; the centre is unchanged if all are 0.
      decay: weight of the old centre.
    """
    rows, w = _wide(logits).reshape(-1, logits.shape[-1]), weights.reshape(-1)
    total = w.sum()
    mean = jnp.matmul(w, rows, precision="highest") / jnp.maximum(total, 1)
    moved = decay * centre + (1 - decay) * mean.astype(centre.dtype)
    return jax.lax.stop_gradient(jnp.where(total > 0, moved, centre))


def sinkhorn(
    logits: Array, weights: Array, *, temperature: float | Array, iterations: int = 3
) -> Array:
    """Returns assignments `[n, k]` whose columns sum to about n / k, and whose rows to 1.

    Caron et al. (2020, SwAV, arXiv:2006.09882), eq. 3 to 5: the columns and rows of
    `exp(t / temperature)` are scaled in turn, rows last. This prevents a single prototype from
    receiving all assignments.

    Args:
      logits: t, `[n, k]`.
      weights: `[n]`, 0 on rows that are excluded from the sums.
      temperature: epsilon in the paper.
      iterations: number of times that columns and rows are scaled.
    """
    real = (weights > 0)[:, None]
    log_q = jnp.where(real, _wide(logits) / temperature, -jnp.inf)
    for _ in range(iterations):
        total = jax.nn.logsumexp(log_q, axis=0, keepdims=True)
        # If all weights are 0, all sums are empty.
        log_q = log_q - jnp.where(jnp.isfinite(total), total, 0)
        log_q = log_q - jnp.where(real, jax.nn.logsumexp(log_q, axis=1, keepdims=True), 0)
    return jnp.exp(log_q)


def view_entropies(targets: Array, logits: Array, *, temperature: float) -> Array:
    """Cross-entropy of every pair of views, `[b, u, k], [b, w, k] -> [b, u, w]` (DINO, eq. 2).

    Args:
      targets: assignments by the teacher.
      logits: logits of the student.
      temperature: temperature of the student's softmax.
    """
    log_p = jax.nn.log_softmax(_wide(logits) / temperature)
    return -jnp.einsum("buk,bwk->buw", targets, log_p, precision="highest")


def between_views(values: Array) -> Array:
    """Mean over pairs of different views, `[b, u, w] -> [b]` (DINO, eq. 3).

    The teacher sees the first u of the student's w views; w is at least 2.
    """
    u, w = values.shape[1:]
    other = jnp.arange(u)[:, None] != jnp.arange(w)[None]
    return jnp.where(other[None], values, 0).sum((1, 2)) / (u * w - u)


def masked_entropy(targets: Array, logits: Array, weights: Array, *, temperature: float) -> Array:
    """Mean cross-entropy over the masked patches of an image, `[b, p, k], [b, p, k] -> [b]`.

    Zhou et al. (2022, iBOT, arXiv:2111.07832), eq. 2. An image without masked patches gives 0.

    Args:
      targets: assignments of the patches by the teacher, which sees all of them.
      logits: logits of the student, which does not see the masked patches.
      weights: `[b, p]`, 1 where the patch is masked.
      temperature: temperature of the student's softmax.
    """
    values = soft_cross_entropy(_wide(logits) / temperature, targets)
    return (weights * values).sum(-1) / jnp.maximum(weights.sum(-1), 1)
