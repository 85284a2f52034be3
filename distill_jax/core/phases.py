"""Phases of training: steps from which on a method has another objective.

Each phase is compiled by itself. A network that only some phases call, such as a teacher, is no
argument of the steps of the others.
"""

import bisect
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from distill_jax.core import durations, state
from distill_jax.core.api import Array, Batch, Model, Objective, Role
from distill_jax.core.errors import ArgumentError


class Phase(NamedTuple):
    """A part of training.

    Attributes:
      start: its first step.
      objective: what is trained on from there on.
    """

    start: int
    objective: Objective


def of(
    objective: Objective, *, total_steps: int | None = None, steps_per_epoch: float | None = None
) -> tuple[Phase, ...]:
    """Returns the phases of a method, whose durations become steps.

    Args:
      objective: the method.
      total_steps: length of training; starts in percent need it.
      steps_per_epoch: length of an epoch; starts in epochs need it.

    Raises:
      ArgumentError: the phases do not ascend from step 0, a start has no known length, or a phase
        calls a network or needs a dataset pass that the method does not declare.
    """
    given, who = tuple(objective.phases()), type(objective).__name__
    lengths: dict[str, Any] = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
    starts = [durations.steps(start, f"{who}.phases", **lengths) for start, _ in given]
    starts = [max(1, round(start)) if start else 0 for start in starts]
    if not starts or starts[0] or any(a >= b for a, b in itertools.pairwise(starts)):
        raise ArgumentError(
            f"the phases of {who} begin at the steps {starts}",
            where="objective",
            hint="the first at 0, each later than the one before",
        )
    phases = tuple(Phase(s, one) for s, (_, one) in zip(starts, given, strict=True))
    for phase in phases:
        name = f"the phase of {who} from step {phase.start} on"
        undeclared = [role for role in phase.objective.roles if role not in objective.roles]
        if undeclared:
            raise ArgumentError(
                f"{name} calls {', '.join(undeclared)}, which {who} does not declare",
                where="objective",
                hint="roles of a method are those of all its phases",
            )
        if phase.objective.needs_dataset_pass and not objective.needs_dataset_pass:
            raise ArgumentError(
                f"{name} needs a dataset pass, which comes before step 0",
                where="objective",
                hint=f"needs_dataset_pass of {who}",
            )
    return phases


def at(phases: Sequence[Phase], step: int) -> int:
    """Returns the index of the phase of a step."""
    return bisect.bisect_right([phase.start for phase in phases], step) - 1


def used(phases: Sequence[Phase], index: int, networks: Mapping[Role, Any]) -> dict[Role, Any]:
    """Returns those of the networks that a phase calls, all of them if there is only one phase."""
    roles: Collection[Role] = networks if len(phases) == 1 else phases[index].objective.roles
    return {role: network for role, network in networks.items() if role in roles}


class Clock:
    """Tells the phase of a state, without waiting for the device if it is the latest state.

    Args:
      phases: of training.
    """

    def __init__(self, phases: Sequence[Phase]):
        self._phases = phases
        self._latest: Any = None
        self._step = 0

    def phase(self, step: Array) -> int:
        """Returns the index of the phase of a step."""
        if len(self._phases) == 1:
            return 0
        if step is not self._latest:
            self._latest, self._step = step, int(step)
        return at(self._phases, self._step)

    def advance(self, step: Array) -> None:
        """Notes the step of the state after that of the last call of `phase`."""
        self._latest, self._step = step, self._step + 1


def infer_shapes(
    objective: Objective,
    phases: Sequence[Phase],
    models: Mapping[Role, Model],
    batch: Batch,
    *,
    trainable: Collection[Role],
) -> state.Shapes:
    """Runs each phase on shapes only, see `state.infer_shapes`.

    Args:
      objective: the method.
      phases: from `of`.
      models: a network for each role.
      batch: `jax.ShapeDtypeStruct`s of a batch after transforms.
      trainable: roles that learn by gradient.

    Returns:
      The shapes of the first phase, with the networks of all phases; those of each are in `phases`.

    Raises:
      ArgumentError: as `state.infer_shapes`, or a phase does not call a network that learns, has
        another memory, or calls a network with other parameters.
    """
    if len(phases) == 1:
        return state.infer_shapes(phases[0].objective, models, batch)
    who = type(objective).__name__
    shapes: list[state.Shapes] = []
    roles: dict[Role, state.RoleShapes] = {}
    for i, phase in enumerate(phases):
        name = f"the phase of {who} from step {phase.start} on"
        absent = [role for role in trainable if role not in phase.objective.roles]
        if absent:
            raise ArgumentError(
                f"{name} does not call {', '.join(absent)}, which learns",
                where=absent[0],
                hint="phases have the same networks that learn, and may differ in the others",
            )
        found = state.infer_shapes(phase.objective, used(phases, i, models), batch)
        for role, network in found.roles.items():
            first = roles.setdefault(role, network)
            if not _alike((first.params, first.state), (network.params, network.state)):
                what = f"{name} calls {role} on inputs for which it has other parameters"
                raise ArgumentError(what, where=role, hint="inputs of the same size in all phases")
        shapes.append(found)
    memory = jax.eval_shape(lambda b: objective.memory(jax.random.key(0), b), batch)
    for phase, found in zip(phases, shapes, strict=True):
        if not _alike(memory, found.memory):
            raise ArgumentError(
                f"the phase of {who} from step {phase.start} on has another memory",
                where="objective",
                hint="the same names, shapes and types as the memory of the method",
            )
    idle = [role for role in models if role not in roles]
    if idle:
        raise ArgumentError(
            f"no phase of {who} calls the network {idle[0]!r}",
            where=idle[0],
            hint=f"they call {', '.join(roles)}; delete the role",
        )
    predictions = state.prediction_shapes(objective, models, batch, memory)
    return shapes[0]._replace(roles=roles, predictions=predictions, phases=tuple(shapes))


def _alike(first: Any, second: Any) -> bool:
    """Whether two trees have the same structure, shapes and types."""
    spec = [jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree) for tree in (first, second)]
    return spec[0] == spec[1]
