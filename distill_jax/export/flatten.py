"""A traced program as one flat list of operations, without calls and without dead code."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive

CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "composite": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
"""Primitives that stand for the program in one of their parameters."""


@dataclasses.dataclass(eq=False)
class Slot:
    """A value of the program.

    Attributes:
      aval: its shape and type.
      constant: its value where the program knows it.
    """

    aval: Any
    constant: Any = None


@dataclasses.dataclass(frozen=True)
class Operation:
    """One primitive applied to values.

    Attributes:
      primitive: what is computed.
      params: its parameters.
      inputs: its operands.
      outputs: its results.
      place: where in the network, `ConvNet/Dense_0`; empty outside of named layers.
      source: file and line of the code that called for it.
    """

    primitive: Primitive
    params: Mapping[str, Any]
    inputs: Sequence[Slot]
    outputs: Sequence[Slot]
    place: str
    source: str


def flatten(
    closed: ClosedJaxpr, inputs: Sequence[Slot]
) -> tuple[list[Operation], list[Slot], list[bool]]:
    """Returns the part of a program that its outputs need.

    Args:
      closed: the program.
      inputs: a value for each of its inputs.

    Returns:
      The operations in order, the outputs, and for each operation whether its result depends on an
      input without a constant.
    """
    operations: list[Operation] = []
    consts = [Slot(jax.typeof(value), value) for value in closed.consts]
    outputs = _inline(closed.jaxpr, [*consts, *inputs], operations, ("", ""))
    needed, kept = set(map(id, outputs)), []
    for operation in reversed(operations):
        if any(id(slot) in needed for slot in operation.outputs):
            kept.append(operation)
            needed |= set(map(id, operation.inputs))
    kept.reverse()
    varies = {id(slot) for slot in inputs if slot.constant is None}
    depends = []
    for operation in kept:
        depends.append(any(id(slot) in varies for slot in operation.inputs))
        if depends[-1]:
            varies |= set(map(id, operation.outputs))
    return kept, outputs, depends


def _inline(
    jaxpr: Jaxpr, inputs: Sequence[Slot], operations: list[Operation], above: tuple[str, str]
) -> list[Slot]:
    """Appends the operations of a program; `above` is place and source of the call of it."""
    slots: dict[Any, Slot] = dict(zip([*jaxpr.constvars, *jaxpr.invars], inputs, strict=True))

    def read(atom: Any) -> Slot:
        return Slot(atom.aval, atom.val) if isinstance(atom, Literal) else slots[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        place = "/".join(part for part in (above[0], str(eqn.source_info.name_stack)) if part)
        source = _source(eqn.source_info.traceback) or above[1]
        inner = eqn.params.get(CALLS.get(eqn.primitive.name, ""))
        if inner is not None:
            if isinstance(inner, ClosedJaxpr):
                consts = [Slot(jax.typeof(value), value) for value in inner.consts]
                results = _inline(inner.jaxpr, [*consts, *operands], operations, (place, source))
            else:
                results = _inline(inner, operands, operations, (place, source))
        else:
            results = [Slot(var.aval) for var in eqn.outvars]
            operations.append(
                Operation(eqn.primitive, eqn.params, operands, results, place, source)
            )
        slots.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _source(traceback: Any) -> str:
    """Returns file and line of the innermost frame that is not of an installed package."""
    for frame in getattr(traceback, "frames", ()):
        if "site-packages" not in frame.file_name and not frame.file_name.startswith("<"):
            return f"{frame.file_name.rpartition('/')[2]}:{frame.line_num}"
    return ""
