"""Stored soft labels: compressed teacher outputs, and their weights.

FKD (Shen, Xing 2022, arXiv:2112.01528) keeps the k largest probabilities of each stored crop; FerKD
(Shen 2023, arXiv:2312.17473) decides crop by crop whether a label is used.
"""

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array

NOTHING = -1e4
"""The logit of a class without probability: its exponential is 0 in float32, and the product of
both is finite, which that with an infinite logit is not."""


def keep_top(logits: Array, *, k: int) -> tuple[Array, Array]:
    """Returns the classes int32 and the log-probabilities of the `k` likeliest, both `[b, k]`."""
    value, index = jax.lax.top_k(jax.nn.log_softmax(logits), k)
    return index.astype(jnp.int32), value


def restore_top(index: Array, value: Array, *, num_classes: int, rest: str) -> Array:
    """Returns logits `[b, num_classes]` of which `keep_top` kept some.

    With one class kept these are FKD's "smoothing" and "hard" labels, with more "marginal
    smoothing" and "marginal re-normalisation" (its section 3.2).

    Args:
      index: classes, int `[b, k]`.
      value: their log-probabilities, `[b, k]`.
      num_classes: c.
      rest: "spread" divides what is missing to 1 evenly among the other classes; "drop" gives them
        nothing, so that a softmax normalises what was kept.
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

    With confidence c: below `low` the crop misses the object and has weight 0; from `low` to below
    `mid` the target is the softened true label `(1 - smoothing) onehot + smoothing / k`; from `mid`
    the teacher's label stays; above `high` the crop is too easy and has weight 0.

    Args:
      probs: the teacher's, `[b, k]`.
      label: true classes, int `[b]`.
      low: least confidence of a crop that is used.
      mid: least confidence at which the teacher's label is kept.
      high: largest confidence of a crop that is used.
      smoothing: of the true label.
      score: what c is: "max", the largest probability, or "label", that of the true class.
    """
    k = probs.shape[-1]
    onehot = jax.nn.one_hot(label, k, dtype=probs.dtype)
    confidence = probs.max(-1) if score == "max" else (probs * onehot).sum(-1)
    softened = (1 - smoothing) * onehot + smoothing / k
    target = jnp.where((confidence < mid)[:, None], softened, probs)
    used = (confidence >= low) & (confidence <= high)
    return target, used.astype(probs.dtype)
