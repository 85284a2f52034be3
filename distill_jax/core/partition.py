"""The mesh and the sharding of each leaf.

Three axes: `data` splits the batch; `fsdp` splits the batch and, by default, large parameters and
their optimizer state; `model` splits the leaves named by rules, and the computation on them within
an example. Axes are `Auto`, so losses are written for the global batch and do not depend on the
number of devices.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from distill_jax.core.api import Array, Model, PyTree
from distill_jax.core.errors import ArgumentError, nearest

BATCH_AXES = ("data", "fsdp")
AXES = (*BATCH_AXES, "model")

T = TypeVar("T")

Rules: TypeAlias = Mapping[str, Sequence[str | None]]
"""`{regular expression over leaf paths: one mesh axis or None for each array axis}`."""

_COLUMNS, _ROWS = ("fsdp", "model"), ("model", "fsdp")

RULE_SETS: Mapping[str, Rules] = {
    "transformer": {
        r"Attention_\d+/Dense_0/kernel$": _COLUMNS,
        r"Attention_\d+/Dense_0/bias$": ("model",),
        r"Attention_\d+/Dense_1/kernel$": _ROWS,
        r"Block_\d+/Dense_0/kernel$": _COLUMNS,
        r"Block_\d+/Dense_0/bias$": ("model",),
        r"Block_\d+/Dense_1/kernel$": _ROWS,
    },
}
"""Rules by name.

`transformer` is the tensor parallelism of Shoeybi et al. 2019 (Megatron-LM, arXiv:1909.08053,
section 3) for the blocks of `models.vit` and `models.tabular_transformer`: of the two products in
each branch the first is split by output columns (whole attention heads), the second by input rows,
so that a branch exchanges one sum forwards and one backwards. Heads and hidden width must be
multiples of `model`.
"""


def make_mesh(
    *, data: int = -1, fsdp: int = 1, model: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Builds the mesh; one of the sizes may be -1, meaning all remaining devices.

    Raises:
      ArgumentError: the product of the sizes is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    n = len(devices)
    sizes = {"data": data, "fsdp": fsdp, "model": model}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) == 1 and fixed > 0 and n % fixed == 0:
        sizes[free[0]] = n // fixed
    if len(free) > 1 or min(sizes.values()) < 1 or math.prod(sizes.values()) != n:
        given = ", ".join(
            f"{axis}={size}" for axis, size in zip(AXES, (data, fsdp, model), strict=True)
        )
        raise ArgumentError(
            f"a mesh of {given} does not fit {n} device{'s'[: n > 1]}",
            where="mesh",
            hint=f"data * fsdp * model must be {n}; at most one may be -1 (all remaining devices)",
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * 3, devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of parts into which the mesh splits a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of every array with a leading batch axis.

    While a function is traced under `jax.shard_map` over another axis of the mesh, its arrays use
    the mesh in that context.
    """
    context = jax.sharding.get_abstract_mesh()
    inside = context.axis_names == mesh.axis_names
    return NamedSharding(context if inside else mesh, PartitionSpec(BATCH_AXES))


def axes_in_context() -> dict[str, int]:
    """Returns the sizes of the axes of the mesh in context that the compiler may use.

    Axes over which an enclosing `jax.shard_map` has split the arrays are not included.
    """
    mesh = jax.sharding.get_abstract_mesh()
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {axis: mesh.shape[axis] for axis, kind in types if kind == AxisType.Auto}


def shards_in_context() -> int:
    """Returns the number of parts of a batch on the mesh in context; 1 without a mesh."""
    sizes = axes_in_context()
    return math.prod(sizes.get(axis, 1) for axis in BATCH_AXES)


def by_rows(fn: Callable[..., T], split: tuple[PyTree, ...], whole: tuple[PyTree, ...] = ()) -> T:
    """Returns `fn(*split, *whole)`, computed on each device for the rows that it holds.

    The rows of the result must not depend on other rows. On a mesh in context that splits the batch
    this exchanges nothing in the forward pass, and in the backward pass the gradient of `whole`
    once, also if `fn` has a loop, in which the partitioner would exchange it in every iteration.

    Args:
      fn: function of arrays that returns arrays `[b, ...]`.
      split: arguments `[b, ...]`.
      whole: arguments that every row needs.
    """
    sizes = axes_in_context()
    axes = tuple(axis for axis in BATCH_AXES if sizes.get(axis, 1) > 1)
    n = shards_in_context()
    if not axes or any(x.shape[0] % n for x in jax.tree.leaves(split)):
        return fn(*split, *whole)
    spec, everywhere = PartitionSpec(axes), PartitionSpec()
    specs = (*(spec for _ in split), *(everywhere for _ in whole))

    def varying(x: Array) -> Array:
        # In 32 bits at least: XLA:CPU ends the process on a sum of 16 bits over devices.
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return jax.lax.pcast(wide, axes, to="varying").astype(x.dtype)

    def here(*given: PyTree) -> T:
        # Before any loop in `fn`: the gradient of this is the exchange.
        own = jax.tree.map(varying, given[len(split) :])
        return fn(*given[: len(split)], *own)

    return jax.shard_map(here, in_specs=specs, out_specs=spec, axis_names=set(axes))(*split, *whole)


def top_k(x: Array, k: int) -> tuple[Array, Array]:
    """Returns `jax.lax.top_k` of `[b, ..., n]`, along the last axis, without an exchange.

    The partitioner does not know that the rows of `jax.lax.top_k` are independent, and gathers its
    argument from all devices.
    """

    def of_rows(rows: Array) -> tuple[Array, Array]:
        value, index = jax.lax.top_k(rows, k)
        return value, index

    return by_rows(of_rows, (x,)) if x.ndim > 1 else of_rows(x)


def check_batch(batch_size: int, mesh: Mesh, *, accum_steps: int = 1, where: str) -> None:
    """Raises `ArgumentError` where a micro-batch does not split evenly over the mesh."""
    shards = batch_shards(mesh)
    n = shards * accum_steps
    if batch_size % n:
        below, above = batch_size // n * n, -(-batch_size // n) * n
        steps = f" in {accum_steps} micro-batches" if accum_steps > 1 else ""
        devices = "devices" if shards == mesh.size else "parts of the mesh"
        raise ArgumentError(
            f"a batch of {batch_size} does not split evenly over {shards} {devices}{steps}",
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


def read_rules(entries: Iterable[Any], *, where: str) -> Rules:
    """Returns the rules that a config gives as pairs `(regex, axes)` and names of `RULE_SETS`.

    Raises:
      ArgumentError: a name is unknown, or an entry is neither a pair nor a name.
    """
    rules: dict[str, Sequence[str | None]] = {}
    for entry in entries:
        match entry:
            case str(name) if name in RULE_SETS:
                rules |= RULE_SETS[name]
            case str(name):
                raise ArgumentError(
                    f"no set of rules {name!r}", where=where, hint=nearest(name, RULE_SETS)
                )
            case (str(pattern), (*axes,)):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ArgumentError(
                        f"{pattern!r} is not a regex: {error}", where=where
                    ) from None
                rules[pattern] = tuple(axes)
            case _:
                hint = "example: ('Dense_0/kernel$', ('fsdp', None))"
                raise ArgumentError(f"{entry!r} is not a rule", where=where, hint=hint)
    return rules


def check_model_axis(mesh: Mesh, *rules: Rules) -> None:
    """Raises `ArgumentError` if all devices of the `model` axis would do the same work."""
    if mesh.shape["model"] > 1 and not any("model" in axes for r in rules for axes in r.values()):
        raise ArgumentError(
            f"no rule splits anything over {mesh.shape['model']} devices",
            where="mesh.model",
            hint=f"name a set in rules or frozen_rules: {', '.join(RULE_SETS)}",
        )


def infer(
    tree: PyTree,
    mesh: Mesh,
    *,
    rules: Rules,
    min_size: int = 2**14,
    where: str = "rules",
    strict: bool = True,
) -> PyTree:
    """Chooses a sharding for every leaf of a tree of shapes.

    The first rule whose regular expression matches in the leaf's path gives its spec. A leaf
    without a matching rule is split over `fsdp` along its largest divisible axis if it has at
    least `min_size` elements, and replicated otherwise.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s.
      mesh: from `make_mesh`.
      rules: `{regular expression: one mesh axis or None for each array axis}`.
      min_size: smallest number of elements worth splitting.
      where: config path of the rules, for errors.
      strict: whether each rule must match something.

    Raises:
      ArgumentError: a rule matches nothing, names an unknown axis, or does not divide its leaf.
    """
    used: set[str] = set()

    def choose(path, leaf):
        name = path_name(path)
        for pattern, axes in rules.items():
            if re.search(pattern, name):
                used.add(pattern)
                rule = f"{where}[{pattern!r}]"
                return NamedSharding(mesh, _checked_spec(axes, name, leaf.shape, mesh, where=rule))
        return NamedSharding(mesh, _largest_axis(leaf.shape, mesh.shape["fsdp"], min_size))

    shardings = jax.tree_util.tree_map_with_path(choose, tree)
    for pattern in rules:
        if strict and pattern not in used:
            raise ArgumentError(
                f"partition rule {pattern!r} matches no parameter",
                where=where,
                hint="parameters are named like " + ", ".join(list(named_leaves(tree))[:3]),
            )
    return shardings


def gathered(model: Model, shardings: PyTree) -> Model:
    """Returns a network that gathers its parameters split over `fsdp` before it uses them.

    By default, the compiler exchanges the arrays that it estimates to be smaller. In the backward
    pass it may exchange the activations of a layer for a gradient of a hundredth of their size.
    This network exchanges its parameters, in the compute type, and their gradients. The sharding of
    the summed gradients is not constrained: over `fsdp`, a device needs only its own part.

    Args:
      model: the network.
      shardings: shardings of its parameters.
    """

    def whole(sharding: NamedSharding) -> NamedSharding:
        kept = [axis if axis != "fsdp" else None for axis in sharding.spec]
        return NamedSharding(sharding.mesh, PartitionSpec(*kept))

    used = jax.tree.map(whole, shardings)

    @jax.custom_jvp
    def gather(params):
        # Split after the cast too, otherwise the arrays before the cast would be gathered.
        params = jax.lax.with_sharding_constraint(params, shardings)
        return jax.lax.with_sharding_constraint(params, used)

    gather.defjvp(lambda primals, tangents: (gather(*primals), *tangents))

    def apply(params, state, *inputs, **options):
        return model.apply(gather(params), state, *inputs, **options)

    decode = model.decode
    if decode is not None:
        step = decode.step
        decode = decode._replace(step=lambda params, *given: step(gather(params), *given))
    return Model(model.init, apply, decode)


def _checked_spec(axes, name, shape, mesh, *, where: str) -> PartitionSpec:
    if len(axes) > len(shape):
        raise ArgumentError(f"{len(axes)} axes for {name} of shape {shape}", where=where)
    for axis, size in zip(axes, shape, strict=False):
        if axis is not None and axis not in AXES:
            raise ArgumentError(
                f"unknown mesh axis {axis!r}", where=where, hint=nearest(axis, AXES)
            )
        if axis is not None and size % mesh.shape[axis]:
            raise ArgumentError(
                f"axis of size {size} of {name} does not split over {axis}={mesh.shape[axis]}",
                where=where,
            )
    return PartitionSpec(*axes)


def _largest_axis(shape: tuple[int, ...], n: int, min_size: int) -> PartitionSpec:
    if n == 1 or math.prod(shape) < min_size:
        return PartitionSpec()
    for axis in sorted(range(len(shape)), key=lambda axis: -shape[axis]):
        if shape[axis] % n == 0:
            return PartitionSpec(*("fsdp" if i == axis else None for i in range(len(shape))))
    return PartitionSpec()
