"""ONNX operators for the primitives of JAX that networks use (operator set 18).

A rule takes the graph, the operation and its operands and returns its results. It raises
`ExportError` for what ONNX has no operator for. https://onnx.ai/onnx/operators
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from distill_jax.core.errors import ExportError
from distill_jax.export.flatten import Operation
from distill_jax.export.onnx_graph import Graph, Value, broadcast_order, fold

Rule = Callable[[Graph, Operation, Sequence[Value]], list[Value]]

RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def refuse(operation: Operation, what: str) -> ExportError:
    """Returns the error for an operation that ONNX has no operator for."""
    place = operation.place or "the network"
    return ExportError(
        f"{operation.primitive.name}: {what}",
        where=f"{place} ({operation.source})" if operation.source else place,
        hint="export it as stablehlo, which holds every program, or change the layer",
    )


def _onnx_type(dtype: Any) -> int:
    from onnx import helper

    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


# Elementwise.


def _elementwise(compute: Callable[[Graph, Operation, list[str]], str]) -> Rule:
    def rule(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
        (out,) = operation.outputs
        order = broadcast_order(values)
        rank = len(out.aval.shape)
        values = [graph.reordered(v, order) if v.rank else v for v in values]
        flat = [
            a
            for a in range(rank)
            if out.aval.shape[a] != 1
            and all(a in v.ones or v.shape[a] == 1 for v in values if v.rank)
        ]
        layout = {"order": order, "ones": flat}
        if all(v.is_constant for v in values):
            shape = np.broadcast_shapes(*(np.shape(v.array) for v in values))
            arrays = [np.broadcast_to(v.array, shape) for v in values]
            label = next((v.label for v in values if v.label), "")
            return [graph.folded(fold(operation, arrays)[0], out.aval, label, **layout)]
        name = compute(graph, operation, [graph.stored(v) for v in values])
        return [graph.value(name, out.aval, order, flat)]

    return rule


def _simple(op: str) -> Rule:
    return _elementwise(lambda graph, operation, names: graph.one(op, *names))


def _like(operation: Operation, value: float) -> np.ndarray:
    return np.asarray(value, operation.inputs[0].aval.dtype)


_UNARY = {
    **{name: name.capitalize() for name in ("exp", "log", "tanh", "sqrt", "abs", "sign", "floor")},
    **{name: name.capitalize() for name in ("ceil", "erf", "sin", "cos", "tan", "not")},
    **{
        name: name.capitalize()
        for name in ("asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh")
    },
    "neg": "Neg",
    "logistic": "Sigmoid",
    "stop_gradient": "Identity",
}
_BINARY = {
    **{"add": "Add", "add_any": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "pow": "Pow"},
    **{"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"},
    "min": "Min",
}
for _name, _op in (_UNARY | _BINARY).items():
    RULES[_name] = _simple(_op)

RULES["ne"] = _elementwise(lambda g, o, x: g.one("Not", g.one("Equal", *x)))
RULES["rsqrt"] = _elementwise(lambda g, o, x: g.one("Reciprocal", g.one("Sqrt", x[0])))
RULES["square"] = _elementwise(lambda g, o, x: g.one("Mul", x[0], x[0]))
RULES["rem"] = _elementwise(lambda g, o, x: g.one("Mod", *x, fmod=1))
RULES["log1p"] = _elementwise(
    lambda g, o, x: g.one("Log", g.one("Add", x[0], g.constant(_like(o, 1))))
)
RULES["expm1"] = _elementwise(
    lambda g, o, x: g.one("Sub", g.one("Exp", x[0]), g.constant(_like(o, 1)))
)
RULES["exp2"] = _elementwise(lambda g, o, x: g.one("Pow", g.constant(_like(o, 2)), x[0]))
RULES["erfc"] = _elementwise(
    lambda g, o, x: g.one("Sub", g.constant(_like(o, 1)), g.one("Erf", x[0]))
)
RULES["is_finite"] = _elementwise(
    lambda g, o, x: g.one("Not", g.one("Or", g.one("IsInf", x[0]), g.one("IsNaN", x[0])))
)
RULES["clamp"] = _elementwise(lambda g, o, x: g.one("Min", g.one("Max", x[1], x[0]), x[2]))


@_rule("max")
def _maximum(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    zero = [
        v.is_constant and v.rank == 0 and v.dtype == np.float32 and v.array == 0 for v in values
    ]
    if zero == [False, True] and not values[0].is_constant:
        return _RELU(graph, operation, values[:1])
    return _MAX(graph, operation, values)


_MAX, _RELU = _simple("Max"), _simple("Relu")


def _logical(name: str) -> Callable[[Graph, Operation, list[str]], str]:
    def compute(graph: Graph, operation: Operation, names: list[str]) -> str:
        is_bool = operation.inputs[0].aval.dtype == bool
        return graph.one(name if is_bool else f"Bitwise{name}", *names)

    return compute


for _name in ("And", "Or", "Xor"):
    RULES[_name.lower()] = _elementwise(_logical(_name))


def _round(graph: Graph, operation: Operation, names: list[str]) -> str:
    if int(operation.params["rounding_method"]) == 1:  # to the nearest even number
        return graph.one("Round", *names)
    half = graph.one("Add", graph.one("Abs", *names), graph.constant(_like(operation, 0.5)))
    return graph.one("Mul", graph.one("Sign", *names), graph.one("Floor", half))


def _integer_pow(graph: Graph, operation: Operation, names: list[str]) -> str:
    y = operation.params["y"]
    if y == 2:
        return graph.one("Mul", names[0], names[0])
    if y == -1:
        return graph.one("Reciprocal", names[0])
    return graph.one("Pow", names[0], graph.constant(_like(operation, y)))


def _select(graph: Graph, operation: Operation, names: list[str]) -> str:
    if len(names) != 3 or operation.inputs[0].aval.dtype != bool:
        raise refuse(operation, f"a choice among {len(names) - 1}; two and a boolean are needed")
    return graph.one("Where", names[0], names[2], names[1])


def _cast(graph: Graph, operation: Operation, names: list[str]) -> str:
    old, new = operation.inputs[0].aval.dtype, operation.outputs[0].aval.dtype
    return names[0] if old == new else graph.one("Cast", names[0], to=_onnx_type(new))


RULES["round"] = _elementwise(_round)
RULES["integer_pow"] = _elementwise(_integer_pow)
RULES["select_n"] = _elementwise(_select)
RULES["convert_element_type"] = _elementwise(_cast)


@_rule("copy", "copy_p", "name", "sharding_constraint", "pvary", "optimization_barrier")
def _identity(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    return list(values)


# Shapes and axes.


@_rule("broadcast_in_dim")
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


@_rule("reshape")
def _reshape(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    aval = operation.outputs[0].aval
    if operation.params["dimensions"] is not None:
        raise refuse(operation, "a reshape that also transposes")
    return [graph.value(graph.reshape(values[0], aval.shape), aval)]


@_rule("squeeze")
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


@_rule("stack")
def _stack(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    axis = operation.params["axis"]
    at = graph.ints([axis])
    names = [graph.one("Unsqueeze", graph.plain(value), at) for value in values]
    name = graph.one("Concat", *names, axis=axis)
    return [graph.value(name, operation.outputs[0].aval)]


@_rule("transpose")
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


@_rule("concatenate")
def _concatenate(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    order = broadcast_order(values)
    names = [graph.plain(v, order) for v in values if v.shape[operation.params["dimension"]] != 0]
    name = graph.one("Concat", *names, axis=order.index(operation.params["dimension"]))
    return [graph.value(name, operation.outputs[0].aval, order)]


@_rule("split")
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


@_rule("slice")
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


@_rule("rev")
def _reverse(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    parts = {axis: (-1, -(2**62), -1) for axis in operation.params["dimensions"]}
    return [_sliced(graph, values[0], operation.outputs[0].aval, parts)]


@_rule("pad")
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


@_rule("gather")
def _gather(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    """Rows along one axis, as `jnp.take` reads them."""
    value, indices = values
    numbers, sizes = operation.params["dimension_numbers"], operation.params["slice_sizes"]
    axes = numbers.start_index_map
    if indices.is_constant and indices.rank == 1:
        return _part(graph, operation, value, dict(zip(axes, indices.array, strict=True)))
    whole = all(size == value.shape[a] or (a in axes and size == 1) for a, size in enumerate(sizes))
    if (
        len(axes) != 1
        or numbers.collapsed_slice_dims != axes
        or numbers.operand_batching_dims
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
    name = graph.one("Gather", graph.plain(value), safe, axis=axis)
    if mode == jax.lax.GatherScatterMode.FILL_OR_DROP:
        inside = graph.one("Equal", at, clipped)
        outer = value.rank - 1 - axis
        inside = graph.one("Unsqueeze", inside, graph.ints(range(-outer, 0))) if outer else inside
        fill = operation.params["fill_value"]
        fill = fill if fill is not None else (np.nan if aval.dtype.kind == "f" else 0)
        name = graph.one("Where", inside, name, graph.constant(np.asarray(fill, aval.dtype)))
    offsets = list(numbers.offset_dims)
    batch = [a for a in range(len(aval.shape)) if a not in offsets]
    return [graph.value(name, aval, [*offsets[:axis], *batch, *offsets[axis:]])]


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


@_rule("dynamic_slice")
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


# Sums, products, convolutions.


def _reduced(value: Value, axes: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Returns the stored axes that go, and the order and ones of what is left."""
    left = [a for a in range(value.rank) if a not in axes]
    order = [left.index(a) for a in value.order if a not in axes]
    at = [i for i, a in enumerate(value.order) if a in axes]
    return at, order, [left.index(a) for a in value.ones if a not in axes]


def _reduction(op: str) -> Rule:
    def rule(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
        axes = operation.params["axes"]
        value = graph.expanded(values[0], axes)
        at, order, ones = _reduced(value, axes)
        name = graph.stored(value)
        if value.dtype == bool:  # all is the least, any the largest
            name = graph.one("Cast", name, to=_onnx_type(np.int32))
        name = graph.one(op, name, graph.ints(at), keepdims=0)
        if value.dtype == bool:
            name = graph.one("Cast", name, to=_onnx_type(bool))
        return [graph.value(name, operation.outputs[0].aval, order, ones)]

    return rule


for _name, _op in {
    **{"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin"},
    **{"reduce_prod": "ReduceProd", "reduce_and": "ReduceMin", "reduce_or": "ReduceMax"},
}.items():
    RULES[_name] = _reduction(_op)


@_rule("argmax", "argmin")
def _arg(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    (axis,), aval = operation.params["axes"], operation.outputs[0].aval
    value = graph.expanded(values[0], [axis])
    (at,), order, ones = _reduced(value, [axis])
    op = "ArgMax" if operation.primitive.name == "argmax" else "ArgMin"
    name = graph.one(op, graph.stored(value), axis=at, keepdims=0)
    name = graph.one("Cast", name, to=_onnx_type(aval.dtype))
    return [graph.value(name, aval, order, ones)]


@_rule("cumsum")
def _cumsum(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    value = graph.expanded(values[0], [operation.params["axis"]])
    at = graph.constant(np.asarray(value.order.index(operation.params["axis"]), np.int64))
    name = graph.one("CumSum", graph.stored(value), at, reverse=int(operation.params["reverse"]))
    return [graph.value(name, operation.outputs[0].aval, value.order, value.ones)]


@_rule("dot_general")
def _dot(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    """Batch axes first, then one product of matrices."""
    (left, right), aval = values, operation.outputs[0].aval
    (lc, rc), (lb, rb) = operation.params["dimension_numbers"]
    lf, rf = (
        [a for a in range(v.rank) if a not in (*c, *b)]
        for v, c, b in ((left, lc, lb), (right, rc, rb))
    )
    left_order, right_order = (*lb, *lf, *lc), (*rb, *rc, *rf)
    simple = len(lc) == len(rf) == 1 and (len(lf) == 1 or (not lb and lf))
    a, b = graph.plain(left, left_order), graph.plain(right, right_order)
    if not simple:

        def flat(name: str, value: Value, *groups: Sequence[int]) -> str:
            sizes = [value.shape[axis] for axis in groups[0]]
            for group in groups[1:]:
                size = 1
                for axis in group:
                    size = size * value.shape[axis]
                sizes.append(size)
            return graph.one("Reshape", name, graph.dims(sizes))

        a, b = flat(a, left, lb, lf, lc), flat(b, right, rb, rc, rf)
    if left.dtype != aval.dtype or right.dtype != aval.dtype:
        a, b = (graph.one("Cast", name, to=_onnx_type(aval.dtype)) for name in (a, b))
    name = graph.one("MatMul", a, b)
    if not simple:
        name = graph.one("Reshape", name, graph.dims(aval.shape))
    return [graph.value(name, aval)]


@_rule("conv2d")
def _conv2d(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    pads = [(k // 2, k // 2) for k in values[1].shape[:2]]
    specs = (0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)
    strides = (operation.params["stride"],) * 2
    return _conv(graph, operation, values, specs, pads, strides, (1, 1), 1)


@_rule("conv_general_dilated")
def _conv_general(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    params = operation.params
    if any(step != 1 for step in params["lhs_dilation"]):
        raise refuse(operation, "a transposed convolution")
    if params["batch_group_count"] != 1:
        raise refuse(operation, "groups of the batch")
    return _conv(
        graph,
        operation,
        values,
        tuple(params["dimension_numbers"]),
        params["padding"],
        params["window_strides"],
        params["rhs_dilation"],
        params["feature_group_count"],
    )


def _conv(
    graph: Graph,
    operation: Operation,
    values: Sequence[Value],
    specs: Sequence[Sequence[int]],
    pads: Sequence[tuple[int, int]],
    strides: Sequence[int],
    dilations: Sequence[int],
    groups: int,
) -> list[Value]:
    """The orders of axes are those of `ConvDimensionNumbers`: batch, channels, sides."""
    (x, kernel), (lhs, rhs, out) = values, specs
    if any(low < 0 or high < 0 for low, high in pads):
        raise refuse(operation, "negative padding")
    name = graph.one(
        "Conv",
        graph.plain(x, lhs),
        graph.plain(kernel, rhs),
        kernel_shape=[kernel.shape[axis] for axis in rhs[2:]],
        strides=list(strides),
        dilations=list(dilations),
        pads=[low for low, _ in pads] + [high for _, high in pads],
        group=groups,
    )
    return [graph.value(name, operation.outputs[0].aval, out)]


@_rule("reduce_window_sum", "reduce_window_max")
def _pool(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    (value,), params = values, operation.params
    window, strides = params["window_dimensions"], params["window_strides"]
    pads = params["padding"]
    for name in ("base_dilation", "window_dilation"):
        if any(step != 1 for step in params[name]):
            raise refuse(operation, name)
    sides = [a for a in range(value.rank) if (window[a], strides[a], *pads[a]) != (1, 1, 0, 0)]
    others = [a for a in range(value.rank) if a not in sides]
    if len(others) != 2 or not sides:
        raise refuse(operation, f"windows along {len(sides)} of {value.rank} axes")
    order = value.order if set(value.order[2:]) == set(sides) else (*others, *sides)
    sides = order[2:]
    common: dict[str, Any] = {
        "kernel_shape": [window[a] for a in sides],
        "strides": [strides[a] for a in sides],
        "pads": [pads[a][0] for a in sides] + [pads[a][1] for a in sides],
    }
    x = graph.plain(value, order)
    if operation.primitive.name == "reduce_window_max":
        name = graph.one("MaxPool", x, **common)
    else:
        mean = graph.one("AveragePool", x, count_include_pad=1, **common)
        size = np.asarray(np.prod([window[a] for a in sides]), value.dtype)
        name = graph.one("Mul", mean, graph.constant(size))
    return [graph.value(name, operation.outputs[0].aval, order)]
