"""The label loss shared by the classification methods, and the mask of usable labels."""

import jax.numpy as jnp

from distill_jax.core.api import Array, Batch
from distill_jax.core.errors import ArgumentError
from distill_jax.losses.classification import cross_entropy, soft_cross_entropy


def label_loss(logits: Array, batch: Batch, *, smoothing: float) -> Array:
    """Cross-entropy with the batch's mixed labels where it has them, else with its class ids.

    Each value is multiplied by `labelled` (see `data.corruption`): 0 where the label is hidden,
    more elsewhere.
    """
    if "label_probs" in batch:
        return soft_cross_entropy(logits, batch["label_probs"], smoothing=smoothing)
    loss = cross_entropy(logits, batch["label"], smoothing=smoothing)
    return loss * batch["labelled"] if "labelled" in batch else loss


def shown(batch: Batch) -> Array:
    """Returns 1 for each example with a usable label and 0 for a hidden one, `[b]`."""
    mask = batch["mask"]
    if "labelled" not in batch:
        return jnp.ones_like(mask)
    return (batch["labelled"] > 0).astype(mask.dtype)


def check_smoothing(smoothing: float) -> None:
    if not 0 <= smoothing < 1:
        raise ArgumentError(
            f"label_smoothing is {smoothing}",
            where="label_smoothing",
            hint="a share of probability in [0, 1)",
        )
