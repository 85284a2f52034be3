"""The mesh, and which leaf lies where on it.

Two axes: `data` splits the batch; `fsdp` splits the batch and, by rule, parameters and optimizer
state. Axes are `Auto`, so losses are written against the global batch and mean the same on any
number of devices.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from distill_jax.core.api import PyTree
from distill_jax.core.errors import ConfigError

AXES = ("data", "fsdp")


def make_mesh(*, data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the mesh; one of the two sizes may be -1, meaning all devices that are left.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    n = len(devices)
    sizes = {"data": data, "fsdp": fsdp}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = [size for size in sizes.values() if size != -1]
    if len(free) == 1 and fixed[0] > 0 and n % fixed[0] == 0:
        sizes[free[0]] = n // fixed[0]
    if len(free) > 1 or min(sizes.values()) < 1 or sizes["data"] * sizes["fsdp"] != n:
        raise ConfigError(
            f"a mesh of data={data}, fsdp={fsdp} does not fit {n} device{'s'[: n > 1]}",
            where="mesh",
            hint=f"data * fsdp must be {n}; at most one of them may be -1 (all that is left)",
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of every array with a leading batch axis.

    While a function is traced under `jax.shard_map` over another axis of the mesh, its arrays are
    of the mesh in that context.
    """
    context = jax.sharding.get_abstract_mesh()
    inside = context.axis_names == mesh.axis_names
    return NamedSharding(context if inside else mesh, PartitionSpec(AXES))


def check_batch(batch_size: int, mesh: Mesh, *, accum_steps: int = 1, where: str) -> None:
    """Raises `ConfigError` where a micro-batch does not split evenly over the mesh."""
    n = mesh.size * accum_steps
    if batch_size % n:
        below, above = batch_size // n * n, -(-batch_size // n) * n
        steps = f" in {accum_steps} micro-batches" if accum_steps > 1 else ""
        raise ConfigError(
            f"a batch of {batch_size} does not split evenly over {mesh.size} devices{steps}",
            where=where,
            hint=f"use a multiple of {n}: {' or '.join(str(b) for b in (below, above) if b)}",
        )


def path_name(path: tuple[Any, ...]) -> str:
    """Formats a pytree path as "student/stage1/conv/kernel"."""
    keys = (getattr(p, "key", getattr(p, "name", getattr(p, "idx", p))) for p in path)
    return "/".join(str(key) for key in keys)


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Returns `{path: leaf}` in tree order."""
    return {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def infer(
    tree: PyTree, mesh: Mesh, *, rules: Mapping[str, Sequence[str | None]], min_size: int = 2**14
) -> PyTree:
    """Chooses a sharding for every leaf of a tree of shapes.

    The first rule whose regular expression is found in the leaf's path gives its spec. A leaf
    that no rule names is split over `fsdp` along its largest divisible axis where it has at least
    `min_size` elements, and replicated otherwise.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s.
      mesh: from `make_mesh`.
      rules: `{regular expression: one mesh axis or None for each array axis}`.
      min_size: smallest number of elements worth splitting.

    Raises:
      ConfigError: a rule matches nothing, names an unknown axis, or does not divide its leaf.
    """
    used: set[str] = set()

    def choose(path, leaf):
        name = path_name(path)
        for pattern, axes in rules.items():
            if re.search(pattern, name):
                used.add(pattern)
                return NamedSharding(mesh, _checked_spec(pattern, axes, name, leaf.shape, mesh))
        return NamedSharding(mesh, _largest_axis(leaf.shape, mesh.shape["fsdp"], min_size))

    shardings = jax.tree_util.tree_map_with_path(choose, tree)
    for pattern in rules:
        if pattern not in used:
            raise ConfigError(
                f"partition rule {pattern!r} matches no parameter",
                where="partition.rules",
                hint="parameters are named like " + ", ".join(list(named_leaves(tree))[:3]),
            )
    return shardings


def _checked_spec(pattern, axes, name, shape, mesh) -> PartitionSpec:
    where = f"partition.rules[{pattern!r}]"
    if len(axes) > len(shape):
        raise ConfigError(f"{len(axes)} axes for {name} of shape {shape}", where=where)
    for axis, size in zip(axes, shape, strict=False):
        if axis is not None and axis not in AXES:
            raise ConfigError(f"unknown mesh axis {axis!r}", where=where, hint=f"axes: {AXES}")
        if axis is not None and size % mesh.shape[axis]:
            raise ConfigError(
                f"axis of size {size} of {name} does not split over {axis}={mesh.shape[axis]}",
                where=where,
            )
    return PartitionSpec(*axes)


def _largest_axis(shape: tuple[int, ...], n: int, min_size: int) -> PartitionSpec:
    size = 1
    for s in shape:
        size *= s
    if n == 1 or size < min_size:
        return PartitionSpec()
    for axis in sorted(range(len(shape)), key=lambda axis: -shape[axis]):
        if shape[axis] % n == 0:
            return PartitionSpec(*("fsdp" if i == axis else None for i in range(len(shape))))
    return PartitionSpec()
