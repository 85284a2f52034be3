"""Stored soft labels: compressed teacher outputs, and their weights.

FKD (Shen, Xing 2022, arXiv:2112.01528) keeps the k largest probabilities of each stored crop; FerKD
(Shen 2023, arXiv:2312.17473) decides for each crop whether its label is used.
"""

import jax
import jax.numpy as jnp

from distill_jax.core import partition
from distill_jax.core.api import Array

NOTHING = -1e4
"""The logit of a class with probability 0: its exponential is 0 in float32, and the product of both
is finite, unlike with an infinite logit."""


def keep_top(logits: Array, *, k: int) -> tuple[Array, Array]:
    """Returns the `k` most probable classes, int32, and their log-probabilities, both `[b, k]`."""
    value, index = partition.top_k(jax.nn.log_softmax(logits), k)
    return index.astype(jnp.int32), value


def restore_top(index: Array, value: Array, *, num_classes: int, rest: str) -> Array:
    """Restores logits `[b, num_classes]` from the output of `keep_top`.

    With one class these are FKD's "smoothing" and "hard" labels, with several classes its "marginal
    smoothing" and "marginal re-normalisation" (section 3.2).

    Args:
      index: classes, int `[b, k]`.
      value: their log-probabilities, `[b, k]`.
      num_classes: c.
      rest: "spread" distributes the remaining probability evenly over the other classes; "drop"
        gives them probability 0, so that a softmax renormalises the kept classes.
    """
    b, k = index.shape
    if rest == "drop" or k == num_classes:
        fill = jnp.full((b, 1), NOTHING, value.dtype)
    else:
        missing = jnp.maximum(1 - jnp.exp(value).sum(-1, keepdims=True), 0)
        fill = jnp.maximum(jnp.log(missing / (num_classes - k)), NOTHING)
    logits = jnp.broadcast_to(fill, (b, num_classes))
    return jnp.put_along_axis(logits, index, value, axis=-1, inplace=False)


def adapt_labels(
    probs: Array, label: Array, *, low: float, mid: float, high: float, smoothing: float, score: str
) -> tuple[Array, Array]:
    """Returns targets `[b, k]` and weights 0 or 1 `[b]`: FerKD's label of each crop.

    For confidence c: below `low` the crop misses the object and has weight 0. From `low` to below
    `mid` the target is the smoothed true label `(1 - smoothing) onehot + smoothing / k`. From `mid`
    on the teacher's label is kept. Above `high` the crop is too easy and has weight 0.

    Args:
      probs: the teacher's probabilities, `[b, k]`.
      label: true classes, int `[b]`.
      low: least confidence of a crop that is used.
      mid: least confidence at which the teacher's label is kept.
      high: largest confidence of a crop that is used.
      smoothing: label smoothing of the true label.
      score: definition of c: "max", the largest probability, or "label", that of the true class.
    """
    k = probs.shape[-1]
    onehot = jax.nn.one_hot(label, k, dtype=probs.dtype)
    confidence = probs.max(-1) if score == "max" else (probs * onehot).sum(-1)
    softened = (1 - smoothing) * onehot + smoothing / k
    target = jnp.where((confidence < mid)[:, None], softened, probs)
    used = (confidence >= low) & (confidence <= high)
    return target, used.astype(probs.dtype)
