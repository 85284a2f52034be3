"""Detection of a softmax that is applied to the result of a softmax.

A softmax over the last axis is recognized as `exp(x) / sum(exp(x))`, and its logarithm as
`x - log(sum(exp(x)))`, whatever constant of each row is added to `x`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distill_jax.analysis import walk


def repeated(trace: walk.Trace) -> bool:
    """Returns whether a traced function applies a softmax to a softmax, or to `exp` of its log."""
    return _walk(trace)[0].repeated


def gives_probabilities(fn: Callable[..., Any], *args: Any) -> bool:
    """Returns whether a leaf of `fn(*args)` is a softmax."""
    return any(value.kind == "softmax" for value in _walk(walk.trace(fn, *args))[1])


def _walk(trace: walk.Trace) -> tuple["_Rules", list["_Value"]]:
    rules = _Rules()
    return rules, walk.interpret(trace.jaxpr, [_Value() for _ in trace.names], rules)


@dataclasses.dataclass(frozen=True)
class _Value:
    """What a value is on the way to a softmax over its last axis.

    Attributes:
      kind: "exp", "sum", "log sum", "log softmax" or "softmax"; "row" for what is the same along
        the last axis; "" for anything else.
      of: identity of the value whose `exp` it is or sums up.
    """

    kind: str = ""
    of: int = 0


# Leave a softmax over the last axis one where they leave that axis alone.
_ALONE = {
    *("convert_element_type", "reduce_precision", "copy", "copy_p", "stop_gradient", "slice"),
    *("dynamic_slice", "reshape", "squeeze", "sharding_constraint", "abs", "broadcast_in_dim"),
}


class _Rules(walk.Rules):
    def __init__(self):
        self.repeated = False
        self.exponents: list[_Value] = []  # alive, so that no other value has its identity

    def constant(self, value: Any) -> _Value:
        return _Value("" if np.ndim(value) else "row")

    def join(self, values: Sequence[_Value], test: Any = None) -> _Value:
        return values[0] if len(set(values)) == 1 else _Value()

    def equation(self, eqn: walk.Equation, inputs: list[_Value]) -> list[_Value]:
        if eqn.primitive.name == "optimization_barrier":
            return inputs
        if len(eqn.outvars) > 1:
            return [_Value() for _ in eqn.outvars]
        # A copy, for every value has an identity of its own.
        return [dataclasses.replace(self._value(eqn, inputs) or _Value())]

    def _value(self, eqn: walk.Equation, given: list[_Value]) -> _Value | None:
        name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
        if not shape or not given:
            return None if shape else _Value("row")
        shapes = [getattr(atom.aval, "shape", ()) for atom in eqn.invars]
        rows = [v.kind == "row" or not s or s[-1] == 1 for v, s in zip(given, shapes, strict=True)]
        first, same = given[0], bool(shapes[0]) and shapes[0][-1] == shape[-1]
        if name == "exp":
            if first.kind == "softmax" and shape[-1] > 1:
                self.repeated = True
            if first.kind == "log softmax":
                return _Value("softmax")
            self.exponents.append(first)
            return _Value("exp", id(first))
        if name == "reduce_sum":
            last = tuple(eqn.params["axes"]) == (len(shapes[0]) - 1,)
            return _Value("sum", first.of) if first.kind == "exp" and last else None
        if first.kind in ("sum", "log sum"):
            if name == "log":
                return _Value("log sum", first.of)
            shifted = name == "add" and first.kind == "log sum"
            return first if shifted or name in _ALONE else None
        if name == "div" and first.kind == "exp" and given[1] == _Value("sum", first.of):
            return _Value("softmax")
        if name == "sub" and given[1].kind == "log sum":
            return _Value("log softmax")
        if name == "broadcast_in_dim":
            along = eqn.params["broadcast_dimensions"]
            return first if len(shape) - 1 in along and same else _Value("row")
        if name in _ALONE:
            return first if same else None
        if name == "concatenate":
            last = eqn.params["dimension"] == len(shape) - 1
            return first if not last and len(set(given)) == 1 else None
        if name in ("add", "sub", "mul", "div", "max", "min") and len(given) == 2:
            if rows[1]:
                return first if same else None
            return given[1] if rows[0] and name in ("add", "mul", "max", "min") else None
        if name == "clamp":
            return given[1]
        return None
