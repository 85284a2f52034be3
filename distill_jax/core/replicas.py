"""Several runs of one program side by side: a leading replica axis, split over devices.

A replica is a run of its own: nothing passes from one to another, so the devices of the "replica"
axis do not communicate.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from distill_jax.core.api import Array, PyTree
from distill_jax.core.partition import AXES

REPLICA = "replica"


def make_replica_mesh(replicas: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds a mesh with a replica axis in front of those of `partition.make_mesh`.

    The replica axis takes as many devices as there are replicas; the remaining devices of each
    replica split its batch.
    """
    devices = list(jax.devices() if devices is None else devices)
    split = max(n for n in range(1, len(devices) + 1) if len(devices) % n == 0 and n <= replicas)
    sizes = (split, len(devices) // split, 1, 1)
    return jax.make_mesh(sizes, (REPLICA, *AXES), (AxisType.Auto,) * 4, devices=devices)


def over_replicas_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of every array with a leading replica axis."""
    return NamedSharding(mesh, PartitionSpec(REPLICA))


def over_replicas(
    fn: Callable[..., PyTree], *, mesh: Mesh, shared: Sequence[PyTree], strategy: str
) -> Callable[..., PyTree]:
    """Maps a pure function over a leading replica axis; to be called under `jit`.

    Args:
      fn: a function of one replica.
      mesh: from `make_replica_mesh`; its replica axis divides the number of replicas.
      shared: for each argument a prefix tree of booleans: True if all replicas receive the same
        value, without a replica axis.
      strategy: how a device runs its replicas: "vmap" batches them into wider operations,
        "unroll" writes them out in sequence, "loop" runs them in a loop.

    Returns:
      A function of the same arguments; all its results have a leading replica axis.
    """

    def local(*args):
        full = [broadcast(s, a) for s, a in zip(shared, args, strict=True)]
        if strategy == "vmap":
            axes = jax.tree.map(lambda same: None if same else 0, full)
            return jax.vmap(fn, in_axes=tuple(axes))(*args)

        def one(i):
            return fn(*jax.tree.map(lambda same, x: x if same else x[i], tuple(full), args))

        flat = zip(jax.tree.leaves(full), jax.tree.leaves(args), strict=True)
        n = next(x.shape[0] for same, x in flat if not same)
        if strategy == "unroll":
            return jax.tree.map(lambda *x: jnp.stack(x), *map(one, range(n)))
        return jax.lax.map(one, jnp.arange(n))

    def broadcast(same, tree):
        return jax.tree.map(lambda s, part: jax.tree.map(lambda _: s, part), same, tree)

    specs = jax.tree.map(lambda same: PartitionSpec() if same else PartitionSpec(REPLICA), shared)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=PartitionSpec(REPLICA),
        axis_names={REPLICA},
        check_vma=False,
    )


def choose_strategy(primitives: set[str], *, backend: str) -> str:
    """Returns the fastest strategy for a step with these primitives.

    A convolution with one kernel per replica is a grouped convolution, which XLA:CPU computes at
    half the speed. A matrix product with a replica axis is not slower than one without. On CPU,
    XLA's gradient of a convolution is slow in loops; that of `models/convolution.py` is not.
    """
    if backend != "cpu":
        return "vmap"
    if "conv_general_dilated" in primitives:
        return "unroll"
    return "loop" if any(name.startswith("conv2d") for name in primitives) else "vmap"


Scalars = Mapping[tuple[str, ...], Any]
"""Values of float fields by path: `{("objective", "temperature"): 4.0}`."""


def differing(things: Sequence[Any]) -> dict[tuple[str, ...], tuple[float, ...]] | None:
    """Returns the float fields in which nested dataclasses differ, with the value of each.

    The result is None if they differ in anything else.
    """
    first = things[0]
    if any(type(thing) is not type(first) for thing in things):
        numeric = all(type(thing) in (int, float) for thing in things)
        return {(): tuple(float(thing) for thing in things)} if numeric else None
    if dataclasses.is_dataclass(first):
        scalars = {}
        for field in dataclasses.fields(first):
            parts = differing([getattr(thing, field.name) for thing in things])
            if parts is None:
                return None
            scalars |= {(field.name, *path): values for path, values in parts.items()}
        return scalars
    if all(thing == first for thing in things):
        return {}
    return {(): tuple(things)} if type(first) is float else None


def with_scalars(thing: Any, values: Scalars) -> Any:
    """Returns a copy of a nested dataclass with other values in some fields.

    The values may be traced: `__post_init__` does not run again, because its comparisons would
    fail. Validate the values first by building the same dataclass from numbers.
    """
    if () in values:
        return values[()]
    changed = copy.copy(thing)
    for name in {path[0] for path in values}:
        inner = {path[1:]: value for path, value in values.items() if path[0] == name}
        object.__setattr__(changed, name, with_scalars(getattr(thing, name), inner))
    return changed


def stack_scalars(values: Sequence[float]) -> Array:
    """Stacks numbers into an array of weak type (`weak_type`), like a Python scalar."""
    return jnp.stack([jnp.asarray(float(value)) for value in values])
