"""Rewrites of a finished graph: affine maps go into convolutions, softmax becomes one operator."""

from collections import Counter

import numpy as np

from distill_jax.export.onnx_graph import Graph, Node


def simplify(graph: Graph, outputs: list[str]) -> None:
    """Rewrites a graph in place; the values of its outputs stay but for rounding."""
    made = {name: node for node in graph.nodes for name in node.outputs}
    uses = Counter(name for node in graph.nodes for name in node.inputs)
    uses.update(outputs)
    renamed: dict[str, str] = {}
    for node in graph.nodes:
        node.inputs = [renamed.get(name, name) for name in node.inputs]
        parent = made.get(node.inputs[0]) if node.inputs else None
        if parent is None:
            continue
        only = uses[parent.outputs[0]] == 1
        kept = node.outputs[0] in outputs  # its name is that of an output
        if only and not kept and _into_convolution(graph, parent, node):
            renamed[node.outputs[0]] = parent.outputs[0]
            uses[parent.outputs[0]] = uses[node.outputs[0]]
        elif only and not kept and _undone(graph, parent, node):
            renamed[node.outputs[0]] = parent.inputs[0]
            uses[parent.inputs[0]] += uses[node.outputs[0]] - 1
        else:
            _softmax(graph, made, node)
    graph.prune(outputs)


def _scalar(graph: Graph, name: str) -> np.ndarray | None:
    array = graph.constants.get(name)
    return array if array is not None and array.ndim == 0 else None


def _undone(graph: Graph, first: Node, second: Node) -> bool:
    """Whether the second node divides by the factor of the first node."""
    if (first.op, second.op) != ("Mul", "Div"):
        return False
    factor, divisor = _scalar(graph, first.inputs[1]), _scalar(graph, second.inputs[1])
    return factor is not None and divisor is not None and bool(factor == divisor)


def _into_convolution(graph: Graph, conv: Node, node: Node) -> bool:
    """Puts a factor or a shift of each channel into the kernel or bias of a convolution."""
    if conv.op != "Conv" or node.op not in ("Mul", "Add"):
        return False
    kernel, row = graph.constants.get(conv.inputs[1]), graph.constants.get(node.inputs[1])
    if kernel is None or row is None:
        return False
    channels = kernel.shape[0]
    if row.shape != (1, channels) + (1,) * (kernel.ndim - 2):
        return False
    row = row.reshape(channels)
    bias = graph.constants[conv.inputs[2]] if len(conv.inputs) > 2 else None
    if node.op == "Mul":
        label = conv.inputs[1]
        scaled = kernel * row.reshape((channels,) + (1,) * (kernel.ndim - 1))
        conv.inputs[1] = graph.constant(scaled, label)
        bias = None if bias is None else bias * row
    else:
        bias = row if bias is None else bias + row
    if bias is not None:
        conv.inputs[2:] = [graph.constant(bias, node.inputs[1])]
    return True


def _softmax(graph: Graph, made: dict[str, Node], node: Node) -> None:
    """Recognises `exp(x - max(x)) / sum(exp(x - max(x)))` along the last axis."""
    if node.op != "Div":
        return
    exp, total = (made.get(name) for name in node.inputs)
    if exp is None or total is None or exp.op != "Exp" or total.op != "Unsqueeze":
        return
    total = made.get(total.inputs[0])
    shifted = made.get(exp.inputs[0])
    if total is None or shifted is None or total.op != "ReduceSum" or shifted.op != "Sub":
        return
    if total.inputs[0] != exp.outputs[0]:
        return
    top = made.get(shifted.inputs[1])
    while top is not None and top.op in ("Unsqueeze", "Identity", "Max"):
        top = made.get(top.inputs[-1] if top.op == "Max" else top.inputs[0])
    if top is None or top.op != "ReduceMax" or top.inputs[0] != shifted.inputs[0]:
        return
    axes = [graph.constants[n.inputs[1]].tolist() for n in (top, total)]
    if axes[0] != axes[1] or len(axes[0]) != 1:
        return
    node.op, node.inputs = "Softmax", [shifted.inputs[0]]
    node.attributes = {"axis": axes[0][0]}
