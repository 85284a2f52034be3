"""One pass of a function over a data set."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from distill_jax.core.api import Batch, PyTree

_BATCH_ONLY = ("input", "mask", "epoch")


def dataset_pass(
    fn: Callable[[Batch], PyTree],
    batches: Iterable[Batch],
    *,
    axis: int = 0,
    on_batch: Callable[[], None] = lambda: None,
) -> tuple[Any, dict[str, np.ndarray]]:
    """Collects the outputs of a function over batches on the host, padding removed.

    Args:
      fn: `batch -> outputs`, arrays whose axis `axis` is the batch axis.
      batches: batches with `mask` `[b]`, 0 on padding.
      axis: batch axis of the outputs.
      on_batch: called before each batch.

    Returns:
      The outputs with n along `axis`, and whatever else the batches hold about each example
      (`label`, `index`, ...), `{name: [n, ...]}`.

    Raises:
      ValueError: there is no batch.
    """
    parts: list[tuple[Any, dict[str, np.ndarray]]] = []
    for batch in batches:
        on_batch()
        outputs = jax.device_get(fn(batch))
        real = np.flatnonzero(np.asarray(batch["mask"]) > 0)
        kept = jax.tree.map(lambda x, real=real: x.take(real, axis), outputs)
        info: Mapping[str, Any] = {k: x for k, x in batch.items() if k not in _BATCH_ONLY}
        parts.append((kept, {name: np.asarray(x)[real] for name, x in info.items()}))
    if not parts:
        raise ValueError("batches is empty")
    outputs = jax.tree.map(lambda *xs: np.concatenate(xs, axis), *[part[0] for part in parts])
    return outputs, {k: np.concatenate([part[1][k] for part in parts]) for k in parts[0][1]}
