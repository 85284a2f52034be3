"""On which inputs each result of a traced function depends, and which results are always zero.

Nothing is computed. Loops are followed to a fixed point and branches are joined. Trace the gradient
of a function to see its custom derivative rules at work.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.analysis import walk

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Dependence:
    """What is known of one result.

    Attributes:
      on: paths of the inputs that it depends on, as in `walk.Trace.names`. An input that enters
        only through a derivative that is stopped, or only times a constant zero, is absent.
      zero: whether every element is zero whatever the inputs.
    """

    on: frozenset[str]
    zero: bool

    @property
    def dead(self) -> bool:
        """Whether the result is constant for all inputs, like a gradient without effect."""
        return self.zero or not self.on


def of(fn: Callable[..., PyTree], *args: Any) -> PyTree:
    """Returns the `Dependence` of each leaf of `fn(*args)`.

    Args:
      fn: a pure function.
      *args: its arguments, arrays or `jax.ShapeDtypeStruct`s.
    """
    return of_trace(walk.trace(fn, *args))


def of_trace(trace: walk.Trace) -> PyTree:
    """Returns the `Dependence` of each leaf of the result of a traced function."""
    inputs = [_Value(1 << i) for i in range(len(trace.names))]
    values = walk.interpret(trace.jaxpr, inputs, _Rules())
    return jax.tree.unflatten(trace.structure, [_named(value, trace.names) for value in values])


def inputs_used(fn: Callable[..., PyTree], *args: Any) -> frozenset[str]:
    """Returns the paths of the inputs that any leaf of `fn(*args)` depends on."""
    return union(of(fn, *args))


def union(dependences: PyTree) -> frozenset[str]:
    """Returns the paths of the inputs that any of some results depends on."""
    return frozenset().union(*(leaf.on for leaf in jax.tree.leaves(dependences)))


def dead_leaves(grad_fn: Callable[..., PyTree], *args: Any) -> list[bool]:
    """Returns for each leaf of a gradient whether it is structurally zero or input-independent."""
    return [leaf.dead for leaf in jax.tree.leaves(of(grad_fn, *args))]


class _Value(NamedTuple):
    """Bit i of `inputs` is set where the value depends on flat input i."""

    inputs: int = 0
    zero: bool = False


def _named(value: _Value, names: Sequence[str]) -> Dependence:
    on = frozenset(name for i, name in enumerate(names) if value.inputs >> i & 1)
    return Dependence(on, value.zero)


# Zero as soon as one operand is.
_PRODUCTS = {"mul", "dot_general", "conv_general_dilated", "conv2d", "conv2d_kernel_gradient"}
# Zero where the first operand is, whatever indexes, sizes or divides it.
_FIRST = {
    *("broadcast_in_dim", "reshape", "transpose", "squeeze", "expand_dims", "rev", "copy"),
    *("convert_element_type", "reduce_precision", "slice", "dynamic_slice", "gather", "neg"),
    *("reduce_sum", "reduce_max", "reduce_min", "cumsum", "abs", "sign", "div", "sqrt", "tanh"),
    *("sin", "real", "imag", "copy_p", "expm1", "log1p", "erf", "square", "stop_gradient"),
}
# Zero where all operands are.
_ALL = {
    *("add", "sub", "add_any", "max", "min", "concatenate", "pad", "dynamic_update_slice"),
    *("gt", "lt", "ne"),
}


class _Rules(walk.Rules):
    def constant(self, value: Any) -> _Value:
        if isinstance(value, jax.Array):  # a key, or spread over other processes: not to be read
            plain = not jnp.issubdtype(value.dtype, jax.dtypes.extended)
            if not (plain and value.is_fully_addressable):
                return _Value()
        return _Value(zero=not np.any(value))

    def equation(self, eqn: walk.Equation, inputs: list[_Value]) -> list[_Value]:
        name = eqn.primitive.name
        if name == "optimization_barrier":
            return inputs
        if len(eqn.outvars) > 1 or name in ("random_bits", "random_wrap", "random_fold_in"):
            return [_Value(_union(inputs))] * len(eqn.outvars)
        if _is_zero(name, eqn.params, inputs):
            return [_Value(zero=True)]
        if name in ("add", "sub", "add_any"):
            inputs = [value for value in inputs if not value.zero]
        return [_Value(_union(inputs))]

    def join(self, values: Sequence[_Value], test: _Value | None = None) -> _Value:
        on = _union(values if test is None else [*values, test])
        return _Value(on, all(value.zero for value in values))


def _union(values: Sequence[_Value]) -> int:
    inputs = 0
    for value in values:
        inputs |= value.inputs
    return inputs


def _is_zero(name: str, params: Any, given: list[_Value]) -> bool:
    if not given:
        return False
    if name in _PRODUCTS:
        return any(value.zero for value in given)
    if name in _FIRST:
        return given[0].zero
    if name in _ALL:
        return all(value.zero for value in given)
    if name == "select_n":
        return all(value.zero for value in given[1:])
    if name in ("scatter-add", "scatter_add"):  # wherever nothing is added
        return given[0].zero and given[2].zero
    return name == "integer_pow" and params["y"] > 0 and given[0].zero
