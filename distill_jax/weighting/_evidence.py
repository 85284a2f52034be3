"""Checks and computations shared by several weightings."""

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array, Evidence
from distill_jax.core.errors import ArgumentError


def need_two_loss_terms(evidence: Evidence, who: str) -> None:
    """Raises `ArgumentError` unless there are two loss terms: the label's and the teacher's."""
    if len(evidence.loss_terms) != 2:
        raise ArgumentError(
            f"{who} divides between two loss terms and there are {len(evidence.loss_terms)}",
            where="loss_terms",
            hint="name the label's term, then the teacher's",
        )


def need_classes(evidence: Evidence, what: str) -> None:
    """Raises `ArgumentError` unless a label is one class; `what` names the part that needs it."""
    if evidence.task != "classification":
        raise ArgumentError(
            f"the weighting reads {what}, and the task of the data is {evidence.task}",
            where="weighting",
            hint="meta_weight_net, reweight, annealed and constant read only the losses"
            + ("; trilateral supports several labels" if evidence.task == "multilabel" else ""),
        )


def log_probs(evidence: Evidence, role: str) -> Array:
    """Returns log-probabilities `[b, k]` of classes at temperature 1, at least in float32.

    Raises:
      ArgumentError: the method has no logits for that role, or labels are not classes.
    """
    need_classes(evidence, "a distribution over classes")
    return jax.nn.log_softmax(_logits(evidence, role))


def probs(evidence: Evidence, role: str) -> Array:
    """Returns probabilities `[b, k]` of a role at temperature 1.

    For classes a point of the simplex; for several labels the sigmoids, a point of `[0, 1]^k`.

    Raises:
      ArgumentError: the method has no logits for that role, or labels are real values, which have
        no probabilities.
    """
    if evidence.task == "multilabel":
        return jax.nn.sigmoid(_logits(evidence, role))
    need_classes(evidence, "probabilities")
    return jnp.exp(log_probs(evidence, role))


def _logits(evidence: Evidence, role: str) -> Array:
    if role not in evidence.logits:
        raise ArgumentError(
            f"the weighting reads the logits of {role!r}, which the objective does not give for "
            "each row of its loss terms",
            where="weighting",
            hint=f"it gives {', '.join(evidence.logits) or 'none'}; loss terms [b] need "
            "logits [b, k], those of tokens [b, t] need [b, t, k]",
        )
    logits = evidence.logits[role]
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def labels(evidence: Evidence) -> Array:
    """Returns the label as probabilities `[b, k]`; raises `ArgumentError` if there is none."""
    if evidence.task == "regression":
        need_classes(evidence, "labels as probabilities")
    if evidence.label_probs is None:
        raise ArgumentError(
            "the weighting reads labels, and the data have no classes",
            where="weighting",
            hint="a label for each token needs `target` in the batch, and logits [b, t, k] of the "
            "objective",
        )
    return evidence.label_probs


def class_means(evidence: Evidence) -> Array:
    """Returns the table `[k, k]`; raises `ArgumentError` if none was prepared."""
    if evidence.class_means is None:
        raise ArgumentError(
            "the weighting compares with class means, and none were prepared",
            where="weighting",
            hint="its `needs` must name class_means",
        )
    return evidence.class_means


def between(ratio: Array) -> Array:
    """Returns weights `[b, 2]` from the teacher's ratio `[b]`: `[1 - ratio, ratio]`."""
    return jnp.stack([1 - ratio, ratio], axis=1)
