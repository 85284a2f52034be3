"""ONNX from a traced program: operator set 18, a batch of any size, standard operators alone.

Nothing but `onnx` is needed. https://onnx.ai/onnx/intro/concepts.html
"""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray

from distill_jax.core.errors import ExportError
from distill_jax.export import onnx_products, onnx_shapes, onnx_simplify
from distill_jax.export.flatten import Operation, Slot, flatten
from distill_jax.export.onnx_graph import Graph, Node, Value, fold, numpy_dtype, static_size
from distill_jax.export.onnx_ops import RULES
from distill_jax.export.program import BATCH, Program, any_batch, require, symbolic_batch

OPSET = 18
IR_VERSION = 8
"""That of operator set 18; ONNX Runtime reads both from 1.14 on."""

RULE_MODULES = (onnx_products, onnx_shapes)
"""Modules that fill `RULES` beside `onnx_ops`."""

_LAZY = ("broadcast_in_dim", "transpose")
"""Primitives of constants that take no memory."""

_ALONG = ("cummax", "cummin", "cumsum", "cumprod", "cumlogsumexp", "sort")
"""Primitives that see each example alone and whose parameters hold no shape."""

_MAX_FOLDED = 2**26
"""Elements of a computed constant."""


def to_onnx(program: Program) -> bytes:
    """Returns an ONNX model; inputs and outputs have the names of the program's.

    Constants are called by the path of their parameter.

    Args:
      program: what to export.

    Raises:
      ExportError: ONNX has no operator for a primitive; all of them are named, with their place
        in the network. Or onnx is not installed.
    """
    onnx = require("onnx", extra="export", what="onnx")
    graph, inputs, outputs = _convert(program)
    model = _assemble(onnx, program, graph, inputs, outputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _convert(program: Program) -> tuple[Graph, dict[str, Any], dict[str, Any]]:
    symbol = symbolic_batch()
    batch = program.batch(symbol)
    with any_batch():
        closed, shapes = jax.make_jaxpr(program.traced, return_shape=True)(program.weights, batch)
    named = program.named_weights
    slots = [Slot(jax.typeof(x), x) for x in named.values()]
    slots += [Slot(ShapedArray(x.shape, x.dtype)) for _, x in sorted(batch.items())]
    operations, results, depends = flatten(closed, slots)
    _check(operations, depends)
    graph = Graph(symbol)
    values: dict[int, Value] = {}
    for name in (*batch, *shapes):
        graph.unique(name)
    for name, slot in zip([*named, *sorted(batch)], slots, strict=True):
        if slot.constant is None:
            values[id(slot)] = graph.value(name, slot.aval)
            graph.batch_of = graph.batch_of or name
        else:
            values[id(slot)] = graph.folded(slot.constant, slot.aval, name)
    for operation in operations:
        graph.place = operation.place
        operands = [_read(graph, values, slot) for slot in operation.inputs]
        for slot, value in zip(operation.outputs, _apply(graph, operation, operands), strict=True):
            values[id(slot)] = value
    graph.place = ""
    found = [graph.plain(_read(graph, values, slot)) for slot in results]
    outputs = dict(zip(sorted(shapes), found, strict=True))
    names_of = _name_outputs(graph, outputs, set(batch))
    onnx_simplify.simplify(graph, names_of)
    return graph, batch, {name: shapes[name] for name in sorted(shapes)}


def _check(operations: Sequence[Operation], depends: Sequence[bool]) -> None:
    """Raises `ExportError` where a primitive of the inputs has no operator."""
    missing: dict[str, Operation] = {}
    for operation, depending in zip(operations, depends, strict=True):
        if depending and operation.primitive.name not in RULES:
            missing.setdefault(operation.primitive.name, operation)
    if missing:
        lines = [
            f"{name} in {operation.place or 'the network'}"
            + (f" ({operation.source})" if operation.source else "")
            for name, operation in missing.items()
        ]
        raise ExportError(
            f"there is no ONNX operator for {', '.join(lines)}",
            where="formats: onnx",
            hint="export it as stablehlo, which holds every program, or change the layer",
        )


def _read(graph: Graph, values: dict[int, Value], slot: Slot) -> Value:
    if id(slot) in values:
        return values[id(slot)]
    constant = slot.constant
    if not jnp.issubdtype(slot.aval.dtype, jax.dtypes.extended):
        constant = np.asarray(constant, slot.aval.dtype)
    return graph.folded(constant, slot.aval)


def _apply(graph: Graph, operation: Operation, operands: Sequence[Value]) -> list[Value]:
    name = operation.primitive.name
    constant = all(value.is_constant for value in operands)
    if constant and name not in _LAZY:
        static = all(value.is_static for value in operands)
        sizes = [static_size(out.aval.shape) for out in operation.outputs]
        if static and all(size is not None and size <= _MAX_FOLDED for size in sizes):
            arrays = [graph.expanded(graph.reordered(value)).array for value in operands]
            label = next((value.label for value in operands if value.label), "")
            results = fold(operation, arrays)
            return [
                graph.folded(array, out.aval, label)
                for array, out in zip(results, operation.outputs, strict=True)
            ]
    if constant and name in _ALONG:
        return _fold_one(graph, operation, operands)
    if name not in RULES:
        raise ExportError(
            f"there is no ONNX operator for {name}",
            where=operation.place or "the network",
            hint="export it as stablehlo",
        )
    for slot in operation.outputs:
        numpy_dtype(slot.aval.dtype, operation.place)
    return RULES[name](graph, operation, operands)


def _fold_one(graph: Graph, operation: Operation, operands: Sequence[Value]) -> list[Value]:
    """Returns the results of constants that are the same for every example, from one example."""
    arrays = []
    for value in operands:
        known = [axis for axis, size in enumerate(value.shape) if isinstance(size, int)]
        arrays.append(graph.expanded(graph.reordered(value), known).array)
    label = next((value.label for value in operands if value.label), "")
    results = []
    for array, out in zip(fold(operation, arrays), operation.outputs, strict=True):
        ones = [axis for axis, size in enumerate(out.aval.shape) if not isinstance(size, int)]
        results.append(graph.folded(array, out.aval, label, ones=ones))
    return results


def _name_outputs(graph: Graph, outputs: dict[str, str], inputs: set[str]) -> list[str]:
    """Gives the tensors of the outputs their names."""
    made = {name: node for node in graph.nodes for name in node.outputs}
    renamed: dict[str, str] = {}
    for name, tensor in outputs.items():
        if tensor in made and tensor not in renamed:
            renamed[tensor] = name
        else:
            graph.nodes.append(Node("Identity", [tensor], [name], {}, ""))
    for node in graph.nodes:
        node.inputs = [renamed.get(name, name) for name in node.inputs]
        node.outputs = [renamed.get(name, name) for name in node.outputs]
    return list(outputs)


def _assemble(
    onnx: Any, program: Program, graph: Graph, inputs: dict[str, Any], outputs: dict[str, Any]
) -> Any:
    from distill_jax import __version__

    def info(name: str, spec: Any) -> Any:
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
        shape = [size if isinstance(size, int) else str(size) for size in spec.shape]
        return onnx.helper.make_tensor_value_info(name, kind, shape)

    nodes = []
    for i, node in enumerate(graph.nodes):
        made = onnx.helper.make_node(
            node.op, node.inputs, node.outputs, name=f"{i}:{node.place or node.op}"
        )
        for key, value in node.attributes.items():
            made.attribute.append(onnx.helper.make_attribute(key, value))
        nodes.append(made)
    body = onnx.helper.make_graph(
        nodes,
        "network",
        [info(name, inputs[name]) for name in sorted(inputs)],
        [info(name, outputs[name]) for name in outputs],
        [onnx.numpy_helper.from_array(x, name) for name, x in graph.constants.items()],
    )
    model = onnx.helper.make_model(
        body,
        producer_name="distill_jax",
        producer_version=__version__,
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    onnx.helper.set_model_props(model, {"batch": BATCH, **program.metadata})
    return model
