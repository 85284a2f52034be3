"""An ONNX graph under construction: tensors in any order of axes, constants, nodes.

A `Value` of the program may be stored with its axes in another order and with size 1 where it is
constant along an axis. Convolutions work on channels first and the rest of the program does not
care, so most transposes and broadcasts never become nodes.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core.errors import ExportError

INT64 = np.dtype("int64")


@dataclasses.dataclass(frozen=True)
class Value:
    """A value of the program as it is stored.

    Attributes:
      shape: of the value; the batch is a symbol.
      dtype: of the value.
      order: axis i of the stored tensor is axis `order[i]` of the value.
      ones: axes of the value along which it is constant and stored with size 1.
      name: of the tensor; empty for a constant.
      array: the stored tensor of a constant.
      label: name of a constant.
    """

    shape: tuple[Any, ...]
    dtype: Any
    order: tuple[int, ...]
    ones: frozenset[int] = frozenset()
    name: str = ""
    array: Any = None
    label: str = ""

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def is_constant(self) -> bool:
        return self.array is not None

    @property
    def is_plain(self) -> bool:
        return self.order == tuple(range(self.rank)) and not self.ones

    @property
    def is_static(self) -> bool:
        return all(isinstance(size, int) for size in self.shape)


@dataclasses.dataclass
class Node:
    """One operator of the graph."""

    op: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]
    place: str


class Graph:
    """Nodes and constants; names are unique, equal constants are stored once.

    Attributes:
      nodes: in order of computation.
      constants: arrays by name.
      place: where in the network the nodes that are added now belong.
    """

    def __init__(self, symbol: Any):
        self.nodes: list[Node] = []
        self.constants: dict[str, np.ndarray] = {}
        self.place = ""
        self.batch_of = ""
        self._symbol = symbol
        self._by_content: dict[Any, str] = {}
        self._taken: dict[str, int] = {}
        self._batch = ""

    def unique(self, name: str) -> str:
        """Returns the name, with a number behind it where it is taken."""
        found = name
        while found in self._taken:
            self._taken[name] += 1
            found = f"{name}_{self._taken[name]}"
        self._taken[found] = 0
        return found

    def emit(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        """Adds a node and returns the names of its results."""
        stem = f"{self.place}/{op}" if self.place else op
        names = [self.unique(stem) for _ in range(outputs)]
        self.nodes.append(Node(op, list(inputs), names, attributes, self.place))
        return names

    def one(self, op: str, *inputs: str, **attributes: Any) -> str:
        return self.emit(op, *inputs, **attributes)[0]

    def constant(self, array: Any, label: str = "") -> str:
        """Returns the name of a constant; an equal one keeps its first name."""
        array = np.ascontiguousarray(array) if np.ndim(array) else np.asarray(array)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._by_content:
            name = self._by_content[key] = self.unique(label or "constant")
            self.constants[name] = array
        return self._by_content[key]

    def ints(self, values: Iterable[int]) -> str:
        return self.constant(np.array(list(values), INT64))

    def value(self, name: str, aval: Any, order: Sequence[int] = (), ones: Iterable[int] = ()):
        """Returns the value of the shape and type of `aval` that a tensor stores."""
        order = tuple(order) or tuple(range(len(aval.shape)))
        return Value(tuple(aval.shape), aval.dtype, order, frozenset(ones), name)

    def folded(self, array: Any, aval: Any, label: str = "", **layout: Any) -> Value:
        """Returns a constant."""
        value = self.value("", aval, layout.get("order", ()), layout.get("ones", ()))
        return dataclasses.replace(value, array=array, label=label)

    def stored(self, value: Value) -> str:
        """Returns the name of the tensor as it is stored."""
        return self.constant(value.array, value.label) if value.is_constant else value.name

    def reordered(self, value: Value, order: Sequence[int] = ()) -> Value:
        """Returns the value stored in an order of axes, by default its own."""
        order = tuple(order) or tuple(range(value.rank))
        if order == value.order:
            return value
        moves = [value.order.index(axis) for axis in order]
        if value.is_constant:
            return dataclasses.replace(value, order=order, array=np.transpose(value.array, moves))
        name = value.name
        if value.rank - len(value.ones) > 1:
            name = self.one("Transpose", name, perm=moves)
        else:
            name = self.one("Reshape", name, self._sizes(value, order))
        return dataclasses.replace(value, order=order, name=name)

    def _sizes(self, value: Value, order: Sequence[int]) -> str:
        return self.dims([1 if axis in value.ones else value.shape[axis] for axis in order])

    def expanded(self, value: Value, axes: Iterable[int] | None = None) -> Value:
        """Returns the value stored with its own size along some axes, by default along all."""
        axes = value.ones if axes is None else value.ones & set(axes)
        if not axes:
            return value
        ones = value.ones - axes
        sizes = [1 if axis in ones else value.shape[axis] for axis in value.order]
        if value.is_constant and all(isinstance(size, int) for size in sizes):
            array = np.broadcast_to(value.array, sizes)
            return dataclasses.replace(value, ones=ones, array=array)
        name = self.one("Expand", self.stored(value), self.dims(sizes))
        return dataclasses.replace(value, ones=ones, name=name, array=None)

    def plain(self, value: Value, order: Sequence[int] = ()) -> str:
        """Returns the name of a tensor that is the value itself, or in an order of its axes."""
        return self.stored(self.expanded(self.reordered(value, order)))

    def dims(self, sizes: Sequence[Any]) -> str:
        """Returns the name of a shape, computed where it holds the batch."""
        if all(isinstance(size, int) for size in sizes):
            return self.ints(sizes)
        parts = []
        for size in sizes:
            if isinstance(size, int):
                parts.append(self.ints([size]))
                continue
            times = self._multiple(size)
            if not self._batch:
                shape = self.one("Shape", self.batch_of, start=0, end=1)
                self._batch = shape
            name = self._batch
            parts.append(name if times == 1 else self.one("Mul", name, self.ints([times])))
        return parts[0] if len(parts) == 1 else self.one("Concat", *parts, axis=0)

    def _multiple(self, size: Any) -> int:
        """Returns how many times the batch a symbolic size is."""
        times = size // self._symbol
        if not isinstance(times, int) or times * self._symbol != size:
            raise ExportError(
                f"an axis has the size {size}, which is no multiple of the batch",
                where=self.place or "the network",
            )
        return times

    def reshape(self, value: Value, shape: Sequence[Any]) -> str:
        """Returns the name of a tensor of the value in another shape."""
        unknown = sum(not isinstance(size, int) for size in shape)
        empty = any(isinstance(size, int) and size == 0 for size in shape)
        if unknown == 1 and not empty:
            target = self.ints([size if isinstance(size, int) else -1 for size in shape])
        else:
            target = self.dims(shape)
        return self.one("Reshape", self.plain(value), target)

    def prune(self, outputs: Iterable[str]) -> None:
        """Drops nodes and constants that no output needs."""
        needed, kept = set(outputs), []
        for node in reversed(self.nodes):
            if needed & set(node.outputs):
                kept.append(node)
                needed |= set(node.inputs)
        self.nodes = kept[::-1]
        self.constants = {n: x for n, x in self.constants.items() if n in needed}


def broadcast_order(values: Sequence[Value]) -> tuple[int, ...]:
    """Returns the order of axes in which operands of one shape need the fewest transposes."""
    ranked = [v for v in values if v.rank]
    moving = [v for v in ranked if not v.is_constant and v.rank - len(v.ones) > 1]
    for value in moving or ranked:
        if value.order != tuple(range(value.rank)):
            return value.order
    return tuple(range(ranked[0].rank)) if ranked else ()


def fold(operation: Any, arrays: Sequence[Any]) -> list[Any]:
    """Returns the results of a primitive for constants, computed on the CPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        results = operation.primitive.bind(*map(jnp.asarray, arrays), **operation.params)
    results = results if operation.primitive.multiple_results else [results]
    return [x if jnp.issubdtype(x.dtype, jax.dtypes.extended) else np.asarray(x) for x in results]


def static_size(shape: Sequence[Any]) -> int | None:
    """Returns the number of elements, None where it depends on the batch."""
    return math.prod(shape) if all(isinstance(size, int) for size in shape) else None


def numpy_dtype(dtype: Any, place: str) -> np.dtype:
    """Returns the type with which ONNX Runtime computes.

    Raises:
      ExportError: ONNX Runtime does not support the type.
    """
    found = np.dtype(dtype)
    if found.kind not in "biuf":
        raise ExportError(f"{found} is no type of ONNX Runtime", where=place or "the network")
    return found
