"""Base class of the methods that match features of several stages."""

import dataclasses
import re
from collections.abc import Sequence
from typing import ClassVar

from distill_jax.core.api import TASKS, Array, Nets, Outputs, Role, State
from distill_jax.core.errors import ArgumentError
from distill_jax.losses.features import as_map, check_same_shape, match_sizes
from distill_jax.objectives._distillation import Distillation, endpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageDistillation(Distillation):
    """Distillation of features between pairs of stages.

    Features are maps. Tokens and vectors are converted to maps (`losses.features.as_map`).

    Attributes:
      student_stages: outputs of the student, shallow to deep; empty takes all `stage<i>`.
      teacher_stages: as many outputs of the teacher; empty takes all `stage<i>`.
    """

    student_stages: tuple[str, ...] = ()
    teacher_stages: tuple[str, ...] = ()

    suffix: ClassVar[str] = ""
    tasks: ClassVar[tuple[str, ...]] = TASKS

    def maps(self, student: Outputs, teacher: Outputs) -> tuple[list[Array], list[Array]]:
        """Returns the maps of both networks, paired.

        Raises:
          ArgumentError: an output is missing or is not a map, or the numbers of stages differ.
        """
        maps = []
        for role, outputs, names in (
            ("student", student, self.student_stages),
            ("teacher", teacher, self.teacher_stages),
        ):
            names = tuple(names) or stages(outputs, role=role, suffix=self.suffix)
            where = f"{role}_stages"
            maps.append([feature(outputs, name, role=role, where=where) for name in names])
        if len(maps[0]) != len(maps[1]):
            raise ArgumentError(
                f"{len(maps[0])} stages of the student and {len(maps[1])} of the teacher",
                where="student_stages",
                hint="name as many of each, shallow to deep",
            )
        return maps[0], maps[1]


def stages(outputs: Outputs, *, role: Role, suffix: str = "") -> tuple[str, ...]:
    """Returns the names `stage<i><suffix>` of a network, shallow to deep."""
    matches = [re.fullmatch(rf"stage(\d+){suffix}", name) for name in outputs]
    numbers = sorted(int(match[1]) for match in matches if match)
    if not numbers:
        raise ArgumentError(
            f"{role} has no outputs stage<i>{suffix}",
            where=role,
            hint=f"it has {', '.join(sorted(outputs))}",
        )
    return tuple(f"stage{i}{suffix}" for i in numbers)


def feature(outputs: Outputs, name: str, *, role: Role, where: str) -> Array:
    """Returns a named output of a network as a map; an empty name means its last stage."""
    output = endpoint(outputs, name or stages(outputs, role=role)[-1], role=role, where=where)
    return as_map(output, where=where)


def connect(
    nets: Nets,
    role: Role,
    student: Sequence[Array],
    teacher: Sequence[Array],
    *,
    train: bool = True,
) -> tuple[Outputs, list[Array], list[Array], State]:
    """Maps the student's features to the teacher's shapes by the network of `role`.

    If two maps differ in size, the larger is average-pooled first.

    Args:
      nets: the networks.
      role: a connector that is called with all maps of the student, then all maps of the teacher,
        and returns `output1`, `output2`, ... Only the shapes of the teacher's maps are used.
      student: maps of the student.
      teacher: maps of the teacher.
      train: training mode of the connector.

    Returns:
      All outputs of the connector; `output1`, ...; the teacher's maps to compare them with; the new
      state of the connector.
    """
    where = f"roles.{role}"
    pairs = [match_sizes(s, t, where=where) for s, t in zip(student, teacher, strict=True)]
    targets = [t for _, t in pairs]
    outputs, state = nets(role, *(s for s, _ in pairs), *targets, train=train)
    mapped = connected(outputs, targets, role=role)
    return outputs, mapped, targets, state


def connected(outputs: Outputs, targets: Sequence[Array], *, role: Role) -> list[Array]:
    """Returns `output1`, ... of a connector, checked against the shapes of the targets."""
    mapped = []
    for i, target in enumerate(targets, start=1):
        if f"output{i}" not in outputs:
            raise ArgumentError(
                f"{role} returns no output{i}, only {', '.join(outputs)}",
                where=role,
                hint="use the model that the objective names for this role",
            )
        mapped.append(outputs[f"output{i}"])
        hint = "a connector must return the shapes of the teacher's features"
        check_same_shape(mapped[-1], target, where=role, hint=hint)
    return mapped
