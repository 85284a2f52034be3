"""Shared code of the logit evaluators: checks, log-softmax and predictions, in float64."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from distill_jax.core.errors import ArgumentError, NonFiniteError


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Returns log-probabilities `[n, k]` of finite logits `[n, k]`, shifted by the row maximum."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def read_logits(outputs: Mapping[str, Mapping[str, Any]], role: str) -> np.ndarray:
    """Returns the logits of `role` as float64 `[n, k]`.

    Raises:
      ArgumentError: the logits are absent or not a matrix, or the split is empty.
      NonFiniteError: one of them is NaN or infinite. A metric over such logits would be NaN at
        best and an innocent-looking number at worst (`argmax` of NaN is a class).
    """
    where = f"outputs of role {role!r}"
    if "logits" not in outputs.get(role, {}):
        raise ArgumentError(
            "there are no logits to evaluate",
            where=where,
            hint="choose a role whose model returns `logits`",
        )
    logits = np.asarray(outputs[role]["logits"], np.float64)
    if logits.ndim != 2 or not logits.size:
        tokens = "; the evaluator next_token takes those of tokens" * (logits.ndim == 3)
        raise ArgumentError(
            f"logits have shape {logits.shape}",
            where=where,
            hint=f"[n, k] with n, k > 0 is needed{tokens}",
        )
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        raise NonFiniteError(
            f"logits of {np.count_nonzero(~finite)} of {len(logits)} examples are not finite, "
            f"the first at position {int(np.argmin(finite))}",
            where=where,
            hint="the model diverged or the input has NaN: look at the training loss",
        )
    return logits


def read_labels(batch: Mapping[str, Any], logits: np.ndarray) -> np.ndarray:
    """Returns the labels `[n]`; rejects values that are not classes of `logits` `[n, k]`."""
    labels = np.asarray(batch["label"])
    n, k = logits.shape
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise ArgumentError(
            f"labels have shape {labels.shape} and type {labels.dtype}",
            where="label",
            hint=f"integers of shape {(n,)} are needed",
        )
    if labels.min() < 0 or labels.max() >= k:
        raise ArgumentError(
            f"labels span {labels.min()}..{labels.max()} but there are {k} logits",
            where="label",
            hint="give the model as many classes as the data has",
        )
    return labels.astype(np.int64)


def read_columns(batch: Mapping[str, Any], logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the labels float64 `[n, m]` for `logits` `[n, m]`, and a bool mask of known ones.

    Raises:
      ArgumentError: the labels do not have one column per output.
    """
    labels = np.asarray(batch["label"])
    if labels.shape != logits.shape:
        raise ArgumentError(
            f"labels have shape {labels.shape} and there are outputs {logits.shape}",
            where="label",
            hint="one column of labels for each output is needed",
        )
    known = np.asarray(batch.get("labelled", np.ones(labels.shape))) > 0
    return labels.astype(np.float64), known
