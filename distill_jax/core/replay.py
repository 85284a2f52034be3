"""Forward-mode products on a part of a batch without an additional forward pass.

The network has already been applied to the whole batch. `Plan.record` keeps the results of the
costly operations of that pass. `Plan.replay` runs the same function on some rows of the batch and
uses these results in place of computed ones, so that `jax.jvp` only has to compute the derivative.
If the function sums over the batch, as batch normalization does, the value is that of the whole
batch, and its derivative is estimated from the rows.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from distill_jax.analysis import walk
from distill_jax.core.api import Array, Batch, Params, PyTree


class _CannotReplay(Exception):
    """The function has a value whose rows are unknown, or are sampled anew for a part."""


class _Kept(NamedTuple):
    """A kept value of a pass: rows along `axis`, or a sum over the batch if there is no axis."""

    axis: int | None
    divisor: int


class _Lost:
    """In place of an axis: the value depends on the size of the batch in an unknown way."""


_LOST = _Lost()
_Axis = int | _Lost | None
"""Position of the rows of a batch: an axis of `b * n` entries holds `n` for each row in turn.
`None` if the value does not have rows."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A function of parameters and a batch, traced for the whole batch and for some rows.

    Attributes:
      whole: the function traced for the batch.
      some: the function traced for the rows.
      kept: the kept values of each equation; nested functions are inlined.
      structure: structure of the function's result.
    """

    whole: ClosedJaxpr
    some: ClosedJaxpr
    kept: list[_Kept | None]
    structure: Any

    def record(self, params: Params, batch: Batch) -> tuple[PyTree, list[Array]]:
        """Returns the function's result for the batch, and the values that `replay` needs."""
        known: list[Array] = []
        kept = iter(self.kept)

        def apply(eqn: walk.Equation, inputs: list[Any]) -> list[Any]:
            outputs = walk.bind(eqn, inputs)
            if next(kept):
                known.append(outputs[0])
            return outputs

        leaves = walk.evaluate(self.whole, jax.tree.leaves((params, batch)), apply)
        return jax.tree.unflatten(self.structure, leaves), known

    def replay(
        self,
        params: Params,
        rows: Batch,
        known: list[Array],
        take: Callable[[Array, int], Array],
    ) -> PyTree:
        """Returns the function's result for some rows, to be differentiated in `params`.

        Args:
          params: the parameters passed to `record`.
          rows: some rows of its batch.
          known: the values that it kept.
          take: `(x, axis) -> rows of x`, the same as `rows` are of the batch.
        """
        values, kept = iter(known), iter(self.kept)

        def apply(eqn: walk.Equation, inputs: list[Any]) -> list[Any]:
            outputs = walk.bind(eqn, inputs)
            if how := next(kept):
                value = next(values)
                value = value / how.divisor if how.axis is None else take(value, how.axis)
                outputs = [_instead(outputs[0], value)]
            return outputs

        leaves = walk.evaluate(self.some, jax.tree.leaves((params, rows)), apply)
        return jax.tree.unflatten(self.structure, leaves)


def make_plan(
    fn: Callable[[Params, Batch], PyTree], params: Params, batch: Batch, rows: Batch
) -> Plan | None:
    """Traces a function twice and finds the values that a pass over some rows can reuse.

    Args:
      fn: a pure function.
      params: its parameters, or their shapes.
      batch: leaves `[b, ...]`, or their shapes.
      rows: leaves `[b / m, ...]`, or their shapes.

    Returns:
      The plan, or `None` if rows cannot be tracked: random numbers are sampled for the whole batch
      at once, or there are loops and branches over it.
    """
    whole, shapes = jax.make_jaxpr(fn, return_shape=True)(params, batch)
    some = jax.make_jaxpr(fn)(params, rows)
    b, part = (jax.tree.leaves(x)[0].shape[0] for x in (batch, rows))
    of_params = [None] * len(jax.tree.leaves(params))
    axes = [*of_params, *(0 for _ in jax.tree.leaves(batch))]
    try:
        _, kept = _follow(whole, some, axes, b=b, stride=b // part)
    except _CannotReplay:
        return None
    return Plan(whole, some, kept, jax.tree.structure(shapes))


@jax.custom_jvp
def _instead(computed: Array, known: Array) -> Array:
    """The known value, with the derivative of the computed one."""
    del computed
    return known


@_instead.defjvp
def _(primals, tangents):
    return primals[1], tangents[0]


_ELEMENTWISE = {
    *("abs", "add", "add_any", "and", "cbrt", "ceil", "clamp", "convert_element_type", "copy"),
    *("copy_p", "cos", "div", "eq", "erf", "erf_inv", "exp", "exp2", "expm1", "floor", "ge", "gt"),
    *("integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul"),
    *("ne", "neg", "not", "or", "pow", "reduce_precision", "rem", "round", "rsqrt", "select_n"),
    *("sharding_constraint", "sign", "sin", "sqrt", "square", "stop_gradient", "sub", "tanh"),
}
_REARRANGED = {"broadcast_in_dim", "reshape", "squeeze", "transpose"}
_RANDOM = {"random_bits", "random_gamma", "threefry2x32", "rng_bit_generator", "rng_uniform"}
_COSTLY = {"dot_general", "conv2d", "conv_general_dilated"}
_SUMS = {"dot_general", "reduce_sum"}
_EXTREMES = {"reduce_max", "reduce_min"}


class _Listing(walk.Rules):
    """Lists the equations of a function and the shapes of its constants in evaluation order."""

    enters_all = False

    def __init__(self):
        self.listed: list[Any] = []

    def constant(self, value: Any) -> None:
        self.listed.append(np.shape(value))

    def equation(self, eqn: walk.Equation, inputs: list[Any]) -> list[None]:
        self.listed.append(eqn)
        return [None] * len(eqn.outvars)


def _follow(
    whole: ClosedJaxpr, some: ClosedJaxpr, axes: list[_Axis], *, b: int, stride: int
) -> tuple[list[_Axis], list[_Kept | None]]:
    """Tracks the rows of a batch through two traces of one function.

    Args:
      whole: the trace for the batch.
      some: the trace for the part.
      axes: positions of the rows of the arguments.
      b: size of the batch.
      stride: ratio of the batch size to the size of the part.

    Returns:
      Positions of the rows of the outputs, and the kept values of each equation.

    Raises:
      _CannotReplay: see `make_plan`.
    """
    listing = _Listing()
    walk.interpret(some, [None] * len(axes), listing)
    rows = _Rows(b, stride, iter(listing.listed))
    outputs = walk.interpret(whole, axes, rows)
    if next(rows.others, None) is not None:
        raise _CannotReplay
    return outputs, rows.kept


class _Rows(walk.Rules):
    """Positions of the rows of each value; `others` lists the trace for the part."""

    enters_all = False

    def __init__(self, b: int, stride: int, others: Iterator[Any]):
        self.b, self.stride, self.others = b, stride, others
        self.kept: list[_Kept | None] = []

    def constant(self, value: Any) -> _Axis:
        return None if next(self.others, None) == np.shape(value) else _LOST

    def equation(self, eqn: walk.Equation, inputs: list[_Axis]) -> list[_Axis]:
        other = next(self.others, None)
        if getattr(other, "primitive", None) is not eqn.primitive:
            raise _CannotReplay
        outputs, kept = self.follow(eqn, other, inputs)
        self.kept.append(kept)
        return outputs

    def follow(
        self, eqn: walk.Equation, other: walk.Equation, axes: list[_Axis]
    ) -> tuple[list[_Axis], _Kept | None]:
        """Returns the row positions of an equation's outputs, and its kept values."""
        name = eqn.primitive.name
        differ = [_differ(*pair) for pair in zip(eqn.outvars, other.outvars, strict=True)]
        rows = [axis for axis in axes if axis is not None]
        if name == "custom_jvp_call":  # one equation, so that its sums cannot be kept
            jaxprs = eqn.params["call_jaxpr"], other.params["call_jaxpr"]
            outputs, kept = _follow(*jaxprs, axes, b=self.b, stride=self.stride)
            if any(one and one.axis is None for one in kept):
                raise _CannotReplay
            return outputs, None
        if not rows:
            if name in _RANDOM and any(differ):
                raise _CannotReplay
            alike = name in _ELEMENTWISE or name in _REARRANGED
            return [_LOST if d and not alike else None for d in differ], None
        if any(isinstance(p, ClosedJaxpr | Jaxpr) for p in eqn.params.values()):
            raise _CannotReplay
        lost: list[_Axis] = [_LOST if d else None for d in differ]
        if any(isinstance(axis, _Lost) for axis in rows):
            return lost, None
        axis = self.axis(eqn, [axis for axis in axes if not isinstance(axis, _Lost)])
        if axis is None:
            if any(differ):
                return lost, None
            exact = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
            divisor = self.stride if name in _SUMS else 1
            keep = exact and (name in _SUMS or name in _EXTREMES)
            return lost, _Kept(None, divisor) if keep else None
        if isinstance(axis, _Lost):
            return lost, None
        return [axis for _ in differ], _Kept(axis, 1) if name in _COSTLY else None

    def axis(self, eqn: walk.Equation, axes: list[int | None]) -> _Axis:
        """Returns the row positions of the outputs, none if the equation mixes all rows."""
        name, params = eqn.primitive.name, eqn.params
        shape = eqn.outvars[0].aval.shape
        axis = next(a for a in axes if a is not None)
        same = all(a in (axis, None) for a in axes)
        if name == "dot_general":
            return _of_product(eqn, axes)
        if name == "conv2d":
            return 0 if axes == [0, None] else _LOST
        if name == "conv_general_dilated":
            spec = params["dimension_numbers"]
            whole = axes == [spec.lhs_spec[0], None] and params["batch_group_count"] == 1
            return spec.out_spec[0] if whole else _LOST
        if name in _ELEMENTWISE:
            tagged = [v.aval.shape for v, a in zip(eqn.invars, axes, strict=True) if a is not None]
            along = {(len(x), x[axis]) for x in tagged if same} == {(len(shape), shape[axis])}
            return axis if along else _LOST
        if name == "broadcast_in_dim":
            return params["broadcast_dimensions"][axis]
        if name == "reshape":
            return self._reshaped(eqn.invars[0].aval.shape, shape, axis)
        if name == "transpose":
            return params["permutation"].index(axis)
        if name == "squeeze":
            return axis - sum(d < axis for d in params["dimensions"])
        if name.startswith("reduce_") and "axes" in params:
            if axis in params["axes"]:
                return None
            return axis - sum(d < axis for d in params["axes"])
        return axis if same and _untouched(eqn, axis) else _LOST

    def _reshaped(self, old: tuple[int, ...], new: tuple[int, ...], axis: int) -> _Axis:
        before = math.prod(old[:axis])
        for i, size in enumerate(new):
            if math.prod(new[:i]) == before and size % self.b == 0:
                return i
        return _LOST


def _of_product(eqn: walk.Equation, axes: list[int | None]) -> _Axis:
    (contracted, batch) = eqn.params["dimension_numbers"]
    places: list[int | None] = []
    for side, axis in enumerate(axes):
        if axis is None:
            continue
        if axis in batch[side]:
            places.append(batch[side].index(axis))
        elif axis in contracted[side]:
            places.append(None)
        else:
            taken = {*batch[side], *contracted[side]}
            free = [d for d in range(eqn.invars[side].aval.ndim) if d not in taken]
            left = eqn.invars[0].aval.ndim - len(contracted[0]) if side else len(batch[0])
            places.append(left + free.index(axis))
    if len(places) == 1:
        return places[0]
    left, right = axes
    together = any(
        left == pair[0] and right == pair[1]
        for pair in (*zip(*batch, strict=True), *zip(*contracted, strict=True))
    )
    return places[0] if together else _LOST


def _untouched(eqn: walk.Equation, axis: int) -> bool:
    """Returns whether an operation along axes does not act on this axis."""
    name, params = eqn.primitive.name, eqn.params
    if name == "concatenate":
        return params["dimension"] != axis
    if name == "pad":
        return tuple(params["padding_config"][axis]) == (0, 0, 0)
    if name == "slice":
        size, strides = eqn.invars[0].aval.shape[axis], params["strides"]
        whole = (params["start_indices"][axis], params["limit_indices"][axis]) == (0, size)
        return whole and (strides is None or strides[axis] == 1)
    if name == "rev":
        return axis not in params["dimensions"]
    if name in ("split", "cumsum", "cumlogsumexp", "cummax", "cummin", "cumprod"):
        return params["axis"] != axis
    if name in ("reduce_window_max", "reduce_window_min", "reduce_window_sum"):
        window = params["window_dimensions"][axis], params["window_strides"][axis]
        return window == (1, 1) and tuple(params["padding"][axis]) == (0, 0)
    return False


def _differ(one: Any, other: Any) -> bool:
    return one.aval.shape != other.aval.shape
