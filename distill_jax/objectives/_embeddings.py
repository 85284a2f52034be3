"""Embeddings of a student and a teacher, for methods that compare them as vectors."""

from distill_jax.core.api import Array, Nets, Outputs, Role, State
from distill_jax.core.errors import ArgumentError
from distill_jax.objectives._distillation import endpoint


def flat_pair(student: Outputs, teacher: Outputs, feature: str) -> tuple[Array, Array]:
    """Returns an output of both networks as vectors, `[b, d]` and `[b, e]`.

    Raises:
      ArgumentError: a network has no such output.
    """
    s, t = (
        endpoint(outputs, feature, role=role, where="feature")
        for role, outputs in (("student", student), ("teacher", teacher))
    )
    return s.reshape(s.shape[0], -1), t.reshape(t.shape[0], -1)


def project_pair(
    nets: Nets, student: Array, teacher: Array
) -> tuple[tuple[Array, Array], dict[Role, State]]:
    """Maps both features into one space by `projector` and `projector_of_teacher`, both trained.

    Returns:
      Two embeddings `[b, d]`, and the projectors' new state.

    Raises:
      ArgumentError: the projectors differ in width.
    """
    s, state = nets("projector", student, train=True)
    t, teacher_state = nets("projector_of_teacher", teacher, train=True)
    s, t = s["output"], t["output"]
    if s.shape != t.shape:
        raise ArgumentError(
            f"projector gives {s.shape[-1]} features and projector_of_teacher {t.shape[-1]}",
            where="projector_of_teacher.kwargs.features",
            hint="both map into one space",
        )
    return (s, t), {"projector": state, "projector_of_teacher": teacher_state}
