"""What the structure of a traced function shows without computing anything.

Which inputs a result depends on, which results are zero whatever the inputs, and where a softmax is
taken of what is a softmax already. Loops are followed to a fixed point, branches are joined, and
derivative rules of functions that bring their own are seen as they are once a gradient is traced.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from distill_jax.core.api import PyTree


class Dependence(NamedTuple):
    """What is known of one value of a traced function.

    Attributes:
      inputs: bit i is set where it depends on flat input i.
      zero: whether every element is zero whatever the inputs.
      tag: what it is on the way to a softmax over its last axis, and of which value: "exp", "sum",
        "log sum", "log softmax", "softmax"; "row" for what is the same along the last axis.
    """

    inputs: int = 0
    zero: bool = False
    tag: tuple[str, Any] | None = None


class Structure(NamedTuple):
    """The findings about a function.

    Attributes:
      dependences: in the structure of its result.
      repeated: inputs, as bits, of every value of which a softmax was taken twice in a row.
    """

    dependences: PyTree
    repeated: list[int]


def analyse(fn: Callable[..., PyTree], *args: Any) -> Structure:
    """Returns what is known of each leaf of `fn(*args)`.

    Args:
      fn: a pure function.
      *args: its arguments, arrays or `jax.ShapeDtypeStruct`s.
    """
    closed, out = jax.make_jaxpr(fn, return_shape=True)(*args)
    walk = _Walk()
    inputs = [Dependence(1 << i) for i in range(len(closed.jaxpr.invars))]
    dependences = walk.closed(closed, inputs)
    return Structure(jax.tree.unflatten(jax.tree.structure(out), dependences), walk.repeated)


def dependencies(fn: Callable[..., PyTree], *args: Any) -> PyTree:
    """Returns, for each leaf of `fn(*args)`, the set of flat input positions it depends on.

    By structure: an input that enters only through `stop_gradient` of a derivative, only times a
    constant zero, or not at all, is absent whatever its value.

    Args:
      fn: a pure function.
      *args: its arguments, arrays or `jax.ShapeDtypeStruct`s.
    """
    return jax.tree.map(
        lambda dependence: positions(dependence.inputs),
        dependence_of(fn, *args),
        is_leaf=is_dependence,
    )


def dependence_of(fn: Callable[..., PyTree], *args: Any) -> PyTree:
    """Returns the `Fact` of each leaf of `fn(*args)`."""
    return analyse(fn, *args).dependences


def dead_leaves(grad_fn: Callable[..., PyTree], *args: Any) -> list[bool]:
    """Says of each leaf of a gradient whether it is zero by structure, or depends on no input."""
    dependences = jax.tree.leaves(dependence_of(grad_fn, *args), is_leaf=is_dependence)
    return [dependence.zero or not dependence.inputs for dependence in dependences]


def positions(inputs: int) -> set[int]:
    """Returns the positions of the bits that are set."""
    return {i for i in range(inputs.bit_length()) if inputs >> i & 1}


def is_dependence(x: Any) -> bool:
    return isinstance(x, Dependence)


ZERO = Dependence(zero=True)

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
    *("gt", "lt", "ne", "optimization_barrier"),
}
# Leave a softmax over the last axis one where they leave that axis alone.
_ALONE = {
    *("convert_element_type", "reduce_precision", "copy", "copy_p", "stop_gradient", "slice"),
    *("dynamic_slice", "reshape", "squeeze", "sharding_constraint", "abs", "broadcast_in_dim"),
}
_ROW = ("row", None)


class _Walk:
    def __init__(self):
        self.repeated: list[int] = []
        self.exponents: list[Dependence] = []

    def closed(self, closed: Any, inputs: Sequence[Dependence]) -> list[Dependence]:
        if not hasattr(closed, "jaxpr"):  # an open one, whose constants are arguments
            return self.jaxpr(closed, [], inputs)
        consts = [_constant(x) for x in closed.consts]
        return self.jaxpr(closed.jaxpr, consts, inputs)

    def jaxpr(
        self, jaxpr: Any, consts: Sequence[Dependence], inputs: Sequence[Dependence]
    ) -> list[Dependence]:
        dependences: dict[Any, Dependence] = dict(zip(jaxpr.constvars, consts, strict=True))
        dependences |= dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Dependence:
            return _constant(atom.val) if isinstance(atom, Literal) else dependences[atom]

        for eqn in jaxpr.eqns:
            given = [read(atom) for atom in eqn.invars]
            dependences |= dict(zip(eqn.outvars, self.equation(eqn, given), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, given: list[Dependence]) -> list[Dependence]:
        name, params = eqn.primitive.name, eqn.params
        if name == "scan":
            return self._scan(params, given)
        if name == "while":
            return self._while(params, given)
        if name == "cond":
            chosen, *operands = given
            branches = [self.closed(branch, operands) for branch in params["branches"]]
            joined = [_join(*dependences) for dependences in zip(*branches, strict=True)]
            return [one._replace(inputs=one.inputs | chosen.inputs) for one in joined]
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        if inner is not None and _arity(inner) == len(given):
            return self.closed(inner, given)
        dependence = Dependence(_union(*given))
        if len(eqn.outvars) > 1 or name in ("random_bits", "random_wrap", "random_fold_in"):
            if name == "optimization_barrier":
                return given
            return [dependence] * len(eqn.outvars)
        if _is_zero(name, params, given):
            return [ZERO]
        if name in ("add", "sub", "add_any"):
            dependence = Dependence(_union(*(one for one in given if not one.zero)))
        return [dependence._replace(tag=self._tag(eqn, name, given))]

    def _tag(self, eqn: Any, name: str, given: list[Dependence]) -> tuple[str, Any] | None:
        """Recognizes exp(x) / sum(exp(x)) over the last axis, and exp of what that gives."""
        shape = eqn.outvars[0].aval.shape
        if not shape or not given:
            return _ROW if not shape else None
        shapes = [getattr(atom.aval, "shape", ()) for atom in eqn.invars]
        tags = [dependence.tag for dependence in given]
        rows = [t == _ROW or not s or s[-1] == 1 for t, s in zip(tags, shapes, strict=True)]
        first, same = tags[0], bool(shapes[0]) and shapes[0][-1] == shape[-1]
        kind = first[0] if first else ""
        if name == "exp":
            if kind == "softmax" and shape[-1] > 1:
                self.repeated.append(given[0].inputs)
            if kind == "log softmax":
                return ("softmax", None)
            self.exponents.append(given[0])  # alive, so that no other value has its identity
            return ("exp", id(given[0]))
        if name == "reduce_sum":
            last = tuple(eqn.params["axes"]) == (len(shapes[0]) - 1,)
            return ("sum", first[1]) if first and kind == "exp" and last else None
        if kind in ("sum", "log sum"):
            if name == "log":
                return ("log sum", first and first[1])
            shifted = name == "add" and kind == "log sum"
            return first if shifted or name in _ALONE else None
        if name == "div" and kind == "exp" and tags[1] == ("sum", first and first[1]):
            return ("softmax", None)
        if name == "sub" and tags[1] and tags[1][0] == "log sum":
            return ("log softmax", None)
        if name == "broadcast_in_dim":
            along = eqn.params["broadcast_dimensions"]
            kept = len(shape) - 1 in along and same
            return first if kept else _ROW
        if name in _ALONE:
            return first if same else None
        if name == "concatenate":
            last = eqn.params["dimension"] == len(shape) - 1
            return first if not last and len(set(tags)) == 1 else None
        if name in ("add", "sub", "mul", "div", "max", "min") and len(given) == 2:
            if rows[1]:
                return first if same else None
            return tags[1] if rows[0] and name in ("add", "mul", "max", "min") else None
        if name == "clamp":
            return tags[1]
        return None

    def _scan(self, params: Any, given: list[Dependence]) -> list[Dependence]:
        n, c = params["num_consts"], params["num_carry"]
        consts, carry, xs = given[:n], given[n : n + c], given[n + c :]
        while True:
            out = self.closed(params["jaxpr"], [*consts, *carry, *xs])
            joined = [_join(a, b) for a, b in zip(carry, out[:c], strict=True)]
            if joined == carry:
                return [*carry, *out[c:]]
            carry = joined

    def _while(self, params: Any, given: list[Dependence]) -> list[Dependence]:
        m, n = params["cond_nconsts"], params["body_nconsts"]
        tests, consts, carry = given[:m], given[m : m + n], given[m + n :]
        while True:
            [test] = self.closed(params["cond_jaxpr"], [*tests, *carry])
            out = self.closed(params["body_jaxpr"], [*consts, *carry])
            joined = [_join(a, b) for a, b in zip(carry, out, strict=True)]
            if joined == carry:
                return [one._replace(inputs=one.inputs | test.inputs) for one in carry]
            carry = joined


def _arity(jaxpr: Any) -> int:
    return len(getattr(jaxpr, "jaxpr", jaxpr).invars)


def _union(*dependences: Dependence) -> int:
    found = 0
    for dependence in dependences:
        found |= dependence.inputs
    return found


def _join(*dependences: Dependence) -> Dependence:
    tags = {dependence.tag for dependence in dependences}
    tag = dependences[0].tag if len(tags) == 1 else None
    return Dependence(_union(*dependences), all(dependence.zero for dependence in dependences), tag)


def _constant(value: Any) -> Dependence:
    if isinstance(value, jax.Array):  # a key, or spread over other processes: not to be looked at
        plain = not jnp.issubdtype(value.dtype, jax.dtypes.extended)
        if not (plain and value.is_fully_addressable):
            return Dependence()
    return Dependence(0, not np.any(value), _ROW if np.ndim(value) == 0 else None)


def _is_zero(name: str, params: Any, given: list[Dependence]) -> bool:
    if not given:
        return False
    if name in _PRODUCTS:
        return any(dependence.zero for dependence in given)
    if name in _FIRST:
        return given[0].zero
    if name in _ALL:
        return all(dependence.zero for dependence in given)
    if name == "select_n":
        return all(dependence.zero for dependence in given[1:])
    if name in ("scatter-add", "scatter_add"):  # wherever nothing is added
        return given[0].zero and given[2].zero
    return name == "integer_pow" and params["y"] > 0 and given[0].zero
