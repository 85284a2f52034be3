"""ONNX operators for what moves, cuts and joins axes; see `onnx_ops`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from distill_jax.export.flatten import Operation
from distill_jax.export.onnx_graph import Graph, Value, broadcast_order
from distill_jax.export.onnx_ops import refuse, rule

_INT64 = 7
"""`onnx.TensorProto.INT64`."""


@rule("broadcast_in_dim")
def _broadcast(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    value, aval = values[0], operation.outputs[0].aval
    axes = operation.params["broadcast_dimensions"]
    value = graph.reordered(value)
    sizes: list[Any] = [1] * len(aval.shape)
    for i, axis in enumerate(axes):
        sizes[axis] = 1 if i in value.ones else value.shape[i]
    ones = [a for a, size in enumerate(sizes) if _is_one(size) and not _is_one(aval.shape[a])]
    if value.is_constant:
        array = np.reshape(value.array, sizes)
        return [graph.folded(array, aval, value.label, ones=ones)]
    name = value.name
    if len(aval.shape) != value.rank:
        new = [a for a in range(len(aval.shape)) if a not in axes]
        name = graph.one("Unsqueeze", name, graph.ints(new))
    return [graph.value(name, aval, (), ones)]


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


@rule("reshape")
def _reshape(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    aval = operation.outputs[0].aval
    if operation.params["dimensions"] is not None:
        raise refuse(operation, "a reshape that also transposes")
    return [graph.value(graph.reshape(values[0], aval.shape), aval)]


@rule("squeeze")
def _squeeze(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    gone = operation.params["dimensions"]
    return [_without(graph, values[0], gone, operation.outputs[0].aval)]


def _without(graph: Graph, value: Value, gone: Sequence[int], aval: Any) -> Value:
    """Returns a value without axes of size 1."""
    left = [a for a in range(value.rank) if a not in gone]
    order = [left.index(a) for a in value.order if a not in gone]
    at = [i for i, a in enumerate(value.order) if a in gone]
    name = graph.one("Squeeze", graph.stored(value), graph.ints(at))
    return graph.value(name, aval, order, [left.index(a) for a in value.ones])


@rule("stack")
def _stack(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    axis = operation.params["axis"]
    at = graph.ints([axis])
    names = [graph.one("Unsqueeze", graph.plain(value), at) for value in values]
    name = graph.one("Concat", *names, axis=axis)
    return [graph.value(name, operation.outputs[0].aval)]


@rule("unstack")
def _unstack(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    axis, count = operation.params["axis"], len(operation.outputs)
    name, sizes = graph.plain(values[0]), graph.ints([1] * count)
    names = graph.emit("Split", name, sizes, outputs=count, axis=axis)
    at = graph.ints([axis])
    return [
        graph.value(graph.one("Squeeze", part, at), out.aval)
        for part, out in zip(names, operation.outputs, strict=True)
    ]


@rule("tile")
def _tile(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    name = graph.one("Tile", graph.plain(values[0]), graph.ints(operation.params["reps"]))
    return [graph.value(name, operation.outputs[0].aval)]


@rule("transpose")
def _transpose(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    (value,), moves = values, operation.params["permutation"]
    return [
        dataclasses.replace(
            value,
            shape=tuple(operation.outputs[0].aval.shape),
            order=tuple(moves.index(a) for a in value.order),
            ones=frozenset(moves.index(a) for a in value.ones),
        )
    ]


@rule("concatenate")
def _concatenate(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    order = broadcast_order(values)
    names = [graph.plain(v, order) for v in values if v.shape[operation.params["dimension"]] != 0]
    name = graph.one("Concat", *names, axis=order.index(operation.params["dimension"]))
    return [graph.value(name, operation.outputs[0].aval, order)]


@rule("split")
def _split(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    value = graph.expanded(values[0], [operation.params["axis"]])
    sizes, axis = operation.params["sizes"], value.order.index(operation.params["axis"])
    names = graph.emit(
        "Split", graph.stored(value), graph.ints(sizes), outputs=len(sizes), axis=axis
    )
    return [
        graph.value(name, out.aval, value.order, value.ones)
        for name, out in zip(names, operation.outputs, strict=True)
    ]


def _sliced(graph: Graph, value: Value, aval: Any, parts: dict[int, tuple[int, int, int]]) -> Value:
    """Returns a value cut along axes to `start:stop:step`."""
    value = graph.expanded(value, parts)
    if not parts:
        return value
    axes = [value.order.index(axis) for axis in parts]
    starts, stops, steps = zip(*parts.values(), strict=True)
    name = graph.one("Slice", graph.stored(value), *map(graph.ints, (starts, stops, axes, steps)))
    return graph.value(name, aval, value.order, value.ones)


@rule("slice")
def _slice(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    (value,), params = values, operation.params
    strides = params["strides"] or (1,) * value.rank
    parts = {}
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    for axis, (start, stop, step) in enumerate(bounds):
        if _is_zero(start) and stop == value.shape[axis] and step == 1:
            continue
        if not isinstance(start, int) or not isinstance(stop, int):
            raise refuse(operation, "a part of the batch is cut out")
        parts[axis] = (start, stop, step)
    return [_sliced(graph, value, operation.outputs[0].aval, parts)]


def _is_zero(size: Any) -> bool:
    return isinstance(size, int) and size == 0


@rule("rev")
def _reverse(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    parts = {axis: (-1, -(2**62), -1) for axis in operation.params["dimensions"]}
    return [_sliced(graph, values[0], operation.outputs[0].aval, parts)]


@rule("pad")
def _pad(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    config = operation.params["padding_config"]
    if any(interior for _, _, interior in config):
        raise refuse(operation, "padding between elements")
    padded = [axis for axis, (low, high, _) in enumerate(config) if low or high]
    value = graph.expanded(values[0], padded)
    low, high = ([config[axis][end] for axis in padded] for end in (0, 1))
    axes = [value.order.index(axis) for axis in padded]
    fill = graph.plain(values[1])
    name = graph.one(
        "Pad", graph.stored(value), graph.ints(low + high), fill, graph.ints(axes), mode="constant"
    )
    return [graph.value(name, operation.outputs[0].aval, value.order, value.ones)]


@rule("gather")
def _gather(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    """Rows along one axis, as `jnp.take` and `jnp.take_along_axis` read them."""
    value, indices = values
    numbers, sizes = operation.params["dimension_numbers"], operation.params["slice_sizes"]
    axes = numbers.start_index_map
    if indices.is_constant and indices.rank == 1:
        return _part(graph, operation, value, dict(zip(axes, indices.array, strict=True)))
    if indices.is_constant and len(axes) > 1:
        value, indices, axes = _one_axis(graph, operation, value, indices)
    # One element for each position, or whole rows of each example.
    elements = not numbers.offset_dims and len(numbers.operand_batching_dims) == value.rank - 1
    batched = tuple(numbers.operand_batching_dims) == (0,) and not elements
    single = (*axes, *numbers.operand_batching_dims)
    whole = all(
        size == value.shape[a] or (a in single and size == 1) for a, size in enumerate(sizes)
    )
    if (
        len(axes) != 1
        or tuple(numbers.collapsed_slice_dims) != tuple(axes)
        or numbers.operand_batching_dims != numbers.start_indices_batching_dims
        or (numbers.operand_batching_dims and not batched and not elements)
        or not whole
        or not isinstance(value.shape[axes[0]], int)
    ):
        raise refuse(operation, "elements at positions along several axes, or of the batch")
    (axis,), aval = axes, operation.outputs[0].aval
    mode, top = operation.params["mode"], value.shape[axes[0]] - 1
    index_shape = indices.shape[:-1]
    at = graph.reshape(indices, index_shape)
    zero, last = (graph.constant(np.asarray(x, indices.dtype)) for x in (0, top))
    clipped = graph.one("Min", graph.one("Max", at, zero), last)
    safe = at if mode == jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS else clipped
    offsets = list(numbers.offset_dims)
    batch = [a for a in range(len(aval.shape)) if a not in offsets]
    if elements:
        name = graph.one("GatherElements", graph.plain(value), safe, axis=axis)
        order, outer = batch, 0
    elif batched:
        others = [a for a in range(1, value.rank) if a != axis]
        rows = graph.one("Cast", graph.one("Unsqueeze", safe, graph.ints([-1])), to=_INT64)
        name = graph.one("GatherND", graph.plain(value, (0, axis, *others)), rows, batch_dims=1)
        order, outer = [*batch, *offsets], len(others)
    else:
        name = graph.one("Gather", graph.plain(value), safe, axis=axis)
        order, outer = [*offsets[:axis], *batch, *offsets[axis:]], value.rank - 1 - axis
    if mode == jax.lax.GatherScatterMode.FILL_OR_DROP:
        inside = graph.one("Equal", at, clipped)
        inside = graph.one("Unsqueeze", inside, graph.ints(range(-outer, 0))) if outer else inside
        fill = operation.params["fill_value"]
        fill = fill if fill is not None else (np.nan if aval.dtype.kind == "f" else 0)
        name = graph.one("Where", inside, name, graph.constant(np.asarray(fill, aval.dtype)))
    return [graph.value(name, aval, order)]


def _one_axis(
    graph: Graph, operation: Operation, value: Value, indices: Value
) -> tuple[Value, Value, Sequence[int]]:
    """Cuts a value along the axes on which known positions are all the same."""
    numbers, sizes = operation.params["dimension_numbers"], operation.params["slice_sizes"]
    columns = np.moveaxis(indices.array, -1, 0)
    parts, left = {}, []
    for axis, column in zip(numbers.start_index_map, columns, strict=True):
        start = int(column.flat[0])
        same = (column == start).all() and axis not in numbers.collapsed_slice_dims
        if same and isinstance(sizes[axis], int) and 0 <= start <= value.shape[axis] - sizes[axis]:
            parts[axis] = (start, start + sizes[axis], 1)
        else:
            left.append((axis, column))
    if len(left) != 1:
        return value, indices, numbers.start_index_map
    shape = [sizes[a] if a in parts else size for a, size in enumerate(value.shape)]
    value = _sliced(graph, value, jax.ShapeDtypeStruct(shape, value.dtype), parts)
    column = left[0][1][..., None]
    return value, graph.folded(column, column), [left[0][0]]


def _part(graph: Graph, operation: Operation, value: Value, starts: dict[int, Any]) -> list[Value]:
    """One box at a known position, as indexing reads it where the batch is a symbol."""
    parts, aval = {}, operation.outputs[0].aval
    sizes = operation.params["slice_sizes"]
    for axis, size in enumerate(sizes):
        start = int(starts.get(axis, 0))
        if start == 0 and size == value.shape[axis]:
            continue
        if not isinstance(size, int) or not isinstance(value.shape[axis], int):
            raise refuse(operation, "a part of the batch is cut out")
        if not 0 <= start <= value.shape[axis] - size:
            raise refuse(operation, "a position outside")
        parts[axis] = (start, start + size, 1)
    value = _sliced(graph, value, jax.ShapeDtypeStruct(sizes, aval.dtype), parts)
    gone = operation.params["dimension_numbers"].collapsed_slice_dims
    return [_without(graph, value, gone, aval)] if gone else [value]


@rule("dynamic_slice")
def _dynamic_slice(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    value, *starts = values
    parts = {}
    for axis, (start, size) in enumerate(zip(starts, operation.params["slice_sizes"], strict=True)):
        if size == value.shape[axis]:
            continue
        if not start.is_constant:
            raise refuse(operation, "a part at a computed position")
        begin = int(np.clip(start.array, 0, value.shape[axis] - size))
        parts[axis] = (begin, begin + size, 1)
    return [_sliced(graph, value, operation.outputs[0].aval, parts)]
