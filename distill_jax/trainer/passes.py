"""One pass of a function over a data set."""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from distill_jax.core.api import Array, Batch, Evaluator, Nets, Outputs, PyTree
from distill_jax.core.errors import ArgumentError

Wanted = tuple[tuple[str, tuple[str, ...] | None], ...]
"""Outputs by network or by prediction of the objective; None for all outputs."""

Measures = tuple[tuple[str, Evaluator], ...]
"""Evaluators that have `measure`, by name."""

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


def measuring(evaluators: Mapping[str, Evaluator]) -> Measures:
    """Returns the evaluators that compute something with the networks, by name."""
    return tuple((name, x) for name, x in evaluators.items() if hasattr(x, "measure"))


def measured(
    measures: Measures, nets: Nets, batch: Batch, step: Array, *, taken: Collection[str]
) -> dict[str, Outputs]:
    """Returns `{evaluator: {name: [b, ...]}}`; pure.

    Args:
      measures: the evaluators.
      nets: the networks.
      batch: after its transforms, with `mask` `[b]`.
      step: number of finished steps.
      taken: names of networks and predictions, which no evaluator may have.

    Raises:
      ArgumentError: a result has no row for each example, or a name is taken.
    """
    results: dict[str, Outputs] = {}
    for name, evaluator in measures:
        if name in taken:
            raise ArgumentError(
                f"evaluator {name!r} has the name of an output", where=name, hint="another name"
            )
        results[name] = dict(evaluator.measure(nets, batch, step))  # pyright: ignore
        for key, value in results[name].items():
            if value.shape[:1] != batch["mask"].shape:
                raise ArgumentError(
                    f"evaluator {name!r} measures {key!r} of shape {value.shape} in a batch of "
                    f"{len(batch['mask'])}",
                    where=name,
                    hint="one row for each example",
                )
    return results


def filled(batches: Iterable[Batch]) -> Iterable[Batch]:
    """Yields batches with `mask` and `index` where they are missing; no example is repeated."""
    start = 0
    for batch in batches:
        b = len(jax.tree.leaves(batch["input"])[0])
        index = np.arange(start, start + b, dtype=np.int32)
        start += b
        yield {"mask": np.ones(b, np.float32), "index": index, **batch}
