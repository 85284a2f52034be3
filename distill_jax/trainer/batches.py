"""What a trainer makes of the batches that it is given, inside the step."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill_jax.core import partition, rng
from distill_jax.core.api import Array, Batch, Key, Transform


def filled(batch: Batch, step: Array) -> Batch:
    """Adds `mask`, `index` and `epoch` where they are missing; every example is then new."""
    b = len(jax.tree.leaves(batch["input"])[0])
    return {
        "mask": jnp.ones(b, jnp.float32),
        "index": step * b + jnp.arange(b, dtype=jnp.int32),
        "epoch": jnp.zeros(b, jnp.int32),
        **batch,
    }


def prepared(
    batch: Batch, step: Array, key: Key, *, mesh: Mesh, transform: Transform | None
) -> Batch:
    """Returns a training batch, filled in and transformed."""
    split = jax.lax.with_sharding_constraint(dict(batch), partition.over_batch(mesh))
    batch = filled(split, step)
    return batch if transform is None else transform(rng.stream(key, "transform"), batch, step)


def prepared_both(
    fed: Mapping[str, Batch], step: Array, key: Key, *, mesh: Mesh, transform: Transform | None
) -> Any:
    """Returns `{"train": batch, "held_out": batch}`, of which only the first is transformed."""
    over_batch = partition.over_batch(mesh)
    held_out = jax.lax.with_sharding_constraint(dict(fed["held_out"]), over_batch)
    train = prepared(fed["train"], step, key, mesh=mesh, transform=transform)
    return {"train": train, "held_out": filled(held_out, step)}
