"""ONNX operators for sums, products, convolutions and windows; see `onnx_ops`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from distill_jax.export.flatten import Operation
from distill_jax.export.onnx_graph import Graph, Value
from distill_jax.export.onnx_ops import RULES, Rule, onnx_type, refuse, rule


def _reduced(value: Value, axes: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Returns the stored axes that go, and the order and ones of what is left."""
    left = [a for a in range(value.rank) if a not in axes]
    order = [left.index(a) for a in value.order if a not in axes]
    at = [i for i, a in enumerate(value.order) if a in axes]
    return at, order, [left.index(a) for a in value.ones if a not in axes]


def _reduction(op: str) -> Rule:
    def apply(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
        axes = operation.params["axes"]
        value = graph.expanded(values[0], axes)
        at, order, ones = _reduced(value, axes)
        name = graph.stored(value)
        if value.dtype == bool:  # all is the least, any the largest
            name = graph.one("Cast", name, to=onnx_type(np.int32))
        name = graph.one(op, name, graph.ints(at), keepdims=0)
        if value.dtype == bool:
            name = graph.one("Cast", name, to=onnx_type(bool))
        return [graph.value(name, operation.outputs[0].aval, order, ones)]

    return apply


for _name, _op in {
    **{"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin"},
    **{"reduce_prod": "ReduceProd", "reduce_and": "ReduceMin", "reduce_or": "ReduceMax"},
}.items():
    RULES[_name] = _reduction(_op)


@rule("argmax", "argmin")
def _arg(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    (axis,), aval = operation.params["axes"], operation.outputs[0].aval
    value = graph.expanded(values[0], [axis])
    (at,), order, ones = _reduced(value, [axis])
    op = "ArgMax" if operation.primitive.name == "argmax" else "ArgMin"
    name = graph.one(op, graph.stored(value), axis=at, keepdims=0)
    name = graph.one("Cast", name, to=onnx_type(aval.dtype))
    return [graph.value(name, aval, order, ones)]


@rule("cumsum")
def _cumsum(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    value = graph.expanded(values[0], [operation.params["axis"]])
    at = graph.constant(np.asarray(value.order.index(operation.params["axis"]), np.int64))
    name = graph.one("CumSum", graph.stored(value), at, reverse=int(operation.params["reverse"]))
    return [graph.value(name, operation.outputs[0].aval, value.order, value.ones)]


@rule("dot_general")
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
        a, b = (graph.one("Cast", name, to=onnx_type(aval.dtype)) for name in (a, b))
    name = graph.one("MatMul", a, b)
    if not simple:
        name = graph.one("Reshape", name, graph.dims(aval.shape))
    return [graph.value(name, aval)]


@rule("conv2d")
def _conv2d(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    pads = [(k // 2, k // 2) for k in values[1].shape[:2]]
    specs = (0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)
    strides = (operation.params["stride"],) * 2
    return _conv(graph, operation, values, specs, pads, strides, (1, 1), 1)


@rule("conv_general_dilated")
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


@rule("reduce_window_sum", "reduce_window_max")
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
