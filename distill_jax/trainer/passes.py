"""One pass of a function over a data set."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from distill_jax.core.api import Batch, Evaluator, PyTree

Wanted = tuple[tuple[str, tuple[str, ...] | None], ...]
"""Outputs by network or by prediction of the objective; None for all outputs."""

_BATCH_ONLY = ("input", "mask", "epoch")


def dataset_pass(
    fn: Callable[[Batch], PyTree],
    batches: Iterable[Batch],
    *,
    axis: int | None = 0,
    on_batch: Callable[[], None] = lambda: None,
) -> tuple[Any, dict[str, np.ndarray]]:
    """Collects the outputs of a function over batches on the host, padding removed.

    Args:
      fn: `batch -> outputs`, arrays whose axis `axis` is the batch axis; or, with `axis=None`,
        arrays of the batch as a whole, such as sums.
      batches: batches with `mask` `[b]`, 0 on padding.
      axis: batch axis of the outputs, None if they have none.
      on_batch: called before each batch.

    Returns:
      The outputs with n along `axis`, or stacked with one row per batch if `axis` is None, and the
      other arrays of the batches (`label`, `index`, ...), `{name: [n, ...]}`.

    Raises:
      ValueError: there is no batch.
    """
    parts: list[tuple[Any, dict[str, np.ndarray]]] = []
    for batch in batches:
        on_batch()
        outputs = jax.device_get(fn(batch))
        real = np.flatnonzero(np.asarray(batch["mask"]) > 0)
        if axis is not None:
            outputs = jax.tree.map(lambda x, real=real: x.take(real, axis), outputs)
        info: Mapping[str, Any] = {k: x for k, x in batch.items() if k not in _BATCH_ONLY}
        parts.append((outputs, {name: np.asarray(x)[real] for name, x in info.items()}))
    if not parts:
        raise ValueError("batches is empty")
    join = np.stack if axis is None else functools.partial(np.concatenate, axis=axis)
    outputs = jax.tree.map(lambda *xs: join(xs), *[part[0] for part in parts])
    return outputs, {k: np.concatenate([part[1][k] for part in parts]) for k in parts[0][1]}


def wanted_by(evaluators: Mapping[str, Evaluator]) -> Wanted:
    """Returns the outputs that evaluators read."""
    wanted: dict[str, tuple[str, ...]] = {}
    for evaluator in evaluators.values():
        for role, names in evaluator.outputs.items():
            wanted[role] = tuple(dict.fromkeys((*wanted.get(role, ()), *names)))
    return tuple(wanted.items())
