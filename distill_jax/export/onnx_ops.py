"""ONNX operators for the primitives of JAX that networks use (operator set 18).

Elementwise ones are here; `onnx_shapes` and `onnx_products` have the others.

A rule takes the graph, the operation and its operands and returns its results. It raises
`ExportError` for what ONNX has no operator for. https://onnx.ai/onnx/operators
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distill_jax.core.errors import ExportError
from distill_jax.export.flatten import Operation
from distill_jax.export.onnx_graph import Graph, Value, broadcast_order, fold

Rule = Callable[[Graph, Operation, Sequence[Value]], list[Value]]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
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


def onnx_type(dtype: Any) -> int:
    from onnx import helper

    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


# Elementwise.


def _elementwise(compute: Callable[[Graph, Operation, list[str]], str]) -> Rule:
    def apply(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
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

    return apply


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


@rule("max")
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
    return names[0] if old == new else graph.one("Cast", names[0], to=onnx_type(new))


RULES["round"] = _elementwise(_round)
RULES["integer_pow"] = _elementwise(_integer_pow)
RULES["select_n"] = _elementwise(_select)
RULES["convert_element_type"] = _elementwise(_cast)


@rule("copy", "copy_p", "name", "sharding_constraint", "pvary", "optimization_barrier")
def _identity(graph: Graph, operation: Operation, values: Sequence[Value]) -> list[Value]:
    return list(values)
