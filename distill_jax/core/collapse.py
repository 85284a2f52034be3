"""Measures of the spread of the representations of a batch, computed inside the step.

The loss does not show a collapse: a value at which one method is stuck is healthy for another. The
measures from `spectrum` are cheap compared with a step, and are computed only in the steps that are
logged.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from distill_jax.core import spectrum
from distill_jax.core.api import Array

PREFIX = "embedding/"
LARGEST = 512
"""Number of rows that are measured, and the largest width for which the spectrum is computed."""


def names(embeddings: Mapping[str, Array]) -> tuple[str, ...]:
    """Returns the names of the results of `measure` for embeddings or shapes `[b, ..., d]`."""
    measures = []
    for name, z in embeddings.items():
        kinds = ["std", "variance", "rank", "uniformity"]
        kinds += ["alpha"] if z.shape[-1] <= LARGEST else []
        if z.ndim == 3 and z.shape[1] > 1:
            kinds += ["alignment", *(["lidar"] if z.shape[-1] <= LARGEST else [])]
        measures += [f"{PREFIX}{name}/{kind}" for kind in kinds]
    return tuple(measures)


def measure(embeddings: Mapping[str, Array], mask: Array) -> dict[str, Array]:
    """Returns scalars by `names`, without gradient.

    "std", "rank", "alpha", "uniformity", "alignment" and "lidar" are defined in `spectrum`;
    "variance" is its `feature_variance`. "alpha" and "lidar" are omitted for wide embeddings.

    Args:
      embeddings: `[b, d]`, or `[b, v, d]` for v views; only the first examples of a large batch
        are used.
      mask: float `[b]`, 0 on padding.
    """
    values: dict[str, Array] = {}
    for name, z in embeddings.items():
        z = jax.lax.stop_gradient(z).astype(jnp.float32)
        z = z[:, None] if z.ndim == 2 else z
        v = z.shape[1]
        n = max(1, LARGEST // v)
        z, kept = z[:n], mask[:n]
        rows, real = z.reshape(-1, z.shape[-1]), jnp.repeat(kept, v)
        measures = {
            "std": lambda rows=rows, real=real: spectrum.normalized_std(rows, real),
            "variance": lambda rows=rows, real=real: spectrum.feature_variance(rows, real),
            "rank": lambda rows=rows, real=real: spectrum.rankme(rows, real),
            "uniformity": lambda rows=rows, real=real: spectrum.uniformity(rows, real),
            "alpha": lambda rows=rows, real=real: spectrum.alpha_req(rows, real),
            "alignment": lambda z=z, kept=kept: spectrum.alignment(z.swapaxes(0, 1), kept),
            "lidar": lambda z=z, kept=kept: spectrum.lidar(z.swapaxes(0, 1), kept),
        }
        for full in names({name: embeddings[name]}):
            values[full] = measures[full.rpartition("/")[2]]().astype(jnp.float32)
    return values


def due(step: Array | int, every: int) -> Array | bool:
    """Returns whether the step after `step` finished steps is the first or is logged."""
    return (step == 0) | ((step + 1) % every == 0)


def measure_when_due(
    embeddings: Mapping[str, Array], mask: Array, step: Array, *, every: int
) -> dict[str, Array]:
    """Returns `measure` in the steps that are `due`, and zeros in other steps."""
    if not embeddings:
        return {}
    embeddings = jax.lax.stop_gradient(dict(embeddings))
    nothing = lambda *_: {name: jnp.float32(0) for name in names(embeddings)}  # noqa: E731
    return jax.lax.cond(due(step, every), measure, nothing, embeddings, mask)
