"""The walk over the equations of a traced function.

`interpret` evaluates a jaxpr over any domain: arrays, sets of inputs, positions of rows. A `Rules`
object defines an equation, a constant and a join of two paths in that domain. Only this module
handles control flow (`scan`, `while`, `cond`, and everything that calls one function).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal

Equation = Any
"""An equation of a jaxpr; JAX does not export its type."""

_INLINED = ("jit", "pjit", "checkpoint", "remat2")


class Rules:
    """A domain of values for `interpret`, and what equations do in it.

    Attributes:
      enters_all: whether loops, branches and functions with derivative rules of their own are
        entered, and not only `jit` and `jax.checkpoint`, which change nothing where they are
        inlined.
    """

    enters_all = True

    def constant(self, value: Any) -> Any:
        """Returns the value of a constant or a literal."""
        return value

    def equation(self, eqn: Equation, inputs: list[Any]) -> Sequence[Any]:
        """Returns the values of the outputs of an equation that is not entered."""
        raise NotImplementedError

    def join(self, values: Sequence[Any], test: Any = None) -> Any:
        """Returns the join of the values of several paths; `test` selects one of them."""
        raise NotImplementedError


class Trace(NamedTuple):
    """A traced function.

    Attributes:
      jaxpr: closed.
      names: the path of each flat input, the position of its argument first: "0/student/kernel".
      structure: of the result.
    """

    jaxpr: Any
    names: list[str]
    structure: Any


def trace(fn: Callable[..., Any], *args: Any) -> Trace:
    """Traces a pure function of arrays or `jax.ShapeDtypeStruct`s."""
    jaxpr, out = jax.make_jaxpr(fn, return_shape=True)(*args)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(args)]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    return Trace(jaxpr, names, jax.tree.structure(out))


def interpret(jaxpr: Any, inputs: Sequence[Any], rules: Rules) -> list[Any]:
    """Returns the values of the outputs of a traced function.

    Args:
      jaxpr: closed, or open without constants of its own.
      inputs: the value of each flat argument.
      rules: the domain. A loop that is entered is walked until its carry stays as it is, so `join`
        must not rise forever.
    """
    consts = getattr(jaxpr, "consts", ())
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    values = dict(zip(jaxpr.constvars, map(rules.constant, consts), strict=True))
    values |= dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Any:
        return rules.constant(atom.val) if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        given = [read(atom) for atom in eqn.invars]
        enters = rules.enters_all or eqn.primitive.name in _INLINED
        outputs = _enter(eqn, given, rules) if enters else None
        outputs = rules.equation(eqn, given) if outputs is None else outputs
        values |= dict(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _enter(eqn: Equation, given: list[Any], rules: Rules) -> list[Any] | None:
    """Returns the outputs of an equation that calls functions, `None` for any other."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        n, c = params["num_consts"], params["num_carry"]
        consts, carry, xs = given[:n], given[n : n + c], given[n + c :]
        body = lambda carry: interpret(params["jaxpr"], [*consts, *carry, *xs], rules)  # noqa: E731
        carry, out = _fixed_point(body, carry, rules)
        return [*carry, *out[c:]]
    if name == "while":
        m, n = params["cond_nconsts"], params["body_nconsts"]
        tests, consts, carry = given[:m], given[m : m + n], given[m + n :]
        body = lambda carry: interpret(params["body_jaxpr"], [*consts, *carry], rules)  # noqa: E731
        carry, _ = _fixed_point(body, carry, rules)
        [test] = interpret(params["cond_jaxpr"], [*tests, *carry], rules)
        return [rules.join([value], test) for value in carry]
    if name == "cond":
        test, *operands = given
        branches = [interpret(branch, operands, rules) for branch in params["branches"]]
        return [rules.join(values, test) for values in zip(*branches, strict=True)]
    called = params.get("jaxpr", params.get("call_jaxpr"))
    if called is None or len(getattr(called, "jaxpr", called).invars) != len(given):
        return None
    return interpret(called, given, rules)


def _fixed_point(
    body: Callable[[list[Any]], list[Any]], carry: list[Any], rules: Rules
) -> tuple[list[Any], list[Any]]:
    """Returns the carry at the fixed point of the body, and the body's results for it."""
    while True:
        out = body(carry)
        joined = [rules.join(pair) for pair in zip(carry, out, strict=False)]
        if joined == carry:
            return carry, out
        carry = joined


def evaluate(
    jaxpr: Any, inputs: Sequence[Any], apply: Callable[[Equation, list[Any]], Sequence[Any]]
) -> list[Any]:
    """Returns the outputs of a function whose equations are computed by `apply`, as by `bind`.

    Calls are inlined; a loop or a branch is one equation. The inputs may be traced.
    """
    return interpret(jaxpr, inputs, _Evaluation(apply))


class _Evaluation(Rules):
    enters_all = False

    def __init__(self, apply: Callable[[Equation, list[Any]], Sequence[Any]]):
        self.apply = apply

    def equation(self, eqn: Equation, inputs: list[Any]) -> Sequence[Any]:
        return self.apply(eqn, inputs)


def bind(eqn: Equation, inputs: Sequence[Any]) -> list[Any]:
    """Returns the outputs of an equation as it stands."""
    outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
    return outputs if eqn.primitive.multiple_results else [outputs]


def equations(jaxpr: Any) -> Iterator[Equation]:
    """Yields every equation of a traced function, those of the functions that it calls included."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for part in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(part):
                yield from equations(part)


def primitives(jaxpr: Any) -> set[str]:
    """Returns the names of the primitives of a traced function, at any depth."""
    return {eqn.primitive.name for eqn in equations(jaxpr)}


def _is_jaxpr(x: Any) -> bool:
    return hasattr(getattr(x, "jaxpr", x), "eqns")
