"""MCL: pre-training an encoder by several courses (Chen et al. 2023, "Pre-training Language Model
as a Multi-perspective Course Learner", arXiv:2305.03981), after ELECTRA (Clark et al. 2020,
arXiv:2003.10555).

A small generator restores masked tokens (`mlm`), and the student says of each position whether its
token was altered. Courses:

* `replaced`: masked tokens are drawn from the generator, and differ from the original (`rtd`);
* `swapped`: some tokens have changed places (`std`), which the generator restores (`slm`);
* `inserted`: the generator's tokens stand in new places (`itd`).

With `correction`, both networks go back to where the student was wrong: these positions of the
original are masked (`re_mlm`, `re_rtd`) or change places (`re_slm`, `re_std`). The loss is the sum
of the generator's cross-entropies over altered positions and of lambda times the student's binary
cross-entropies over all positions. No gradient flows through drawn tokens.

Without courses, the student restores the masked tokens itself (BERT, Devlin et al. 2018): a
baseline.

Deviations: the generator does not learn at inserted places, which have no true token; the networks
share no embedding; corrections use one set of wrong positions, not four; checkpoints of different
courses are not averaged.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from distill_jax.core import ranges
from distill_jax.core.api import TASKS, Array, Batch, Nets, Objective, PyTree, State, Terms
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.core.sequences import rotation

COURSES = ("replaced", "swapped", "inserted")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MCL(Objective):
    """Terms of the generator and of the student; see above.

    Rows are those of the transform `token_courses`. `generator` returns `logits` `[b, t, v]` for
    the token at each position, `student` `tokens` `[b, t, d]`, and `detector` maps these to
    `output` `[b, t, 3]`, one for each course. For each detection the share of altered positions is
    logged as `altered_<term>`, and as `unchanged` the share of masked positions at which the
    generator drew the original.

    Attributes:
      courses: some of "replaced", "swapped" and "inserted"; none for the baseline.
      correction: whether both networks go back to the student's mistakes.
      detection_weight: lambda.
      mask_token: id in place of a masked token; 0 is a byte that text does not have.
    """

    courses: tuple[str, ...] = COURSES
    correction: bool = True
    detection_weight: float = 50.0
    mask_token: int = 0

    tasks: ClassVar[tuple[str, ...]] = TASKS
    auxiliary: ClassVar[tuple[str, ...]] = ("student", "generator", "detector")

    def __post_init__(self):
        ranges.within("[0, inf)", detection_weight=self.detection_weight)
        ranges.counts(mask_token=self.mask_token)
        for course in self.courses:
            if course not in COURSES:
                hint = nearest(course, COURSES)
                raise ArgumentError(f"no course {course!r}", where="courses", hint=hint)

    @property
    def roles(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("student", "generator", "detector") if self.courses else ("student",)

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        if "course_masked" not in batch:
            raise ArgumentError(
                "a batch has no courses",
                where="batch",
                hint="the transform token_courses, after next_token",
            )
        lesson = _Lesson(nets, batch, self.mask_token)
        x, valid, draws = lesson.x, lesson.valid, batch["course_draws"]
        masked = batch["course_masked"]
        if not self.courses:
            lesson.restore("mlm", jnp.where(masked, self.mask_token, x), masked, role="student")
            return lesson.terms({})
        # The generator learns its first course in all of them: it draws the tokens of two.
        replaced = lesson.filled("mlm", masked, draws[:, 0])
        same = ((replaced == x) & masked).sum(1)
        lesson.add("unchanged", same, masked.sum(1))
        if "replaced" in self.courses:
            wrong = lesson.detect("rtd", replaced, replaced != x, course=0)
            if self.correction:
                again = lesson.filled("re_mlm", wrong, draws[:, 2])
                lesson.detect("re_rtd", again, again != x, course=0)
        if "swapped" in self.courses:
            order = batch["course_order"]
            for prefix in ("", "re_") if self.correction else ("",):
                swapped = jnp.take_along_axis(x, order, axis=1)
                lesson.restore(f"{prefix}slm", swapped, swapped != x)
                wrong = lesson.detect(f"{prefix}std", swapped, swapped != x, course=1)
                order = rotation(wrong, jnp.arange(x.shape[1], dtype=jnp.float32)[None])
        if "inserted" in self.courses:
            source = batch["course_inserted"]
            new, at = source < 0, jnp.maximum(source, 0)
            moved = jnp.where(new, self.mask_token, jnp.take_along_axis(x, at, axis=1))
            # An inserted token belongs to the document of the token before it.
            before = jnp.cumsum(~new, axis=1) - 1
            segments = lesson.segments
            if segments is not None:
                segments = jnp.take_along_axis(segments, before, axis=1)
            real = jnp.take_along_axis(valid, before, axis=1)
            z, state = lesson.ask("generator", moved, segments)
            lesson.states["generator"] = state
            moved = jnp.where(new, draw(z["logits"], draws[:, 1]), moved)
            lesson.detect("itd", moved, new, course=2, segments=segments, real=real)
        weighted = {"rtd", "re_rtd", "std", "re_std", "itd"} & set(lesson.values)
        return lesson.terms(dict.fromkeys(weighted, self.detection_weight))


class _Lesson:
    """Collects the terms of a batch."""

    def __init__(self, nets: Nets, batch: Batch, mask_token: int):
        view = batch["input"]
        mapping = isinstance(view, Mapping)
        self.x = view["tokens"] if mapping else view
        self.segments = view.get("segments") if mapping else None
        self.nets, self.valid, self.mask_token = nets, batch["course_valid"] > 0, mask_token
        self.values: dict[str, Array] = {}
        self.counts: dict[str, Array] = {}
        self.states: dict[str, State] = {}

    def add(self, name: str, value: Array, count: Array) -> None:
        self.values[name] = value.astype(jnp.float32)
        self.counts[name] = count.astype(jnp.float32)

    def ask(self, role: str, tokens: Array, segments: Array | None = None) -> Any:
        segments = self.segments if segments is None else segments
        view = tokens if segments is None else {"tokens": tokens, "segments": segments}
        return self.nets(role, view, train=True)

    def restore(self, name: str, tokens: Array, at: Array, *, role: str = "generator") -> Array:
        """Adds the cross-entropy of the original at some positions; returns the logits."""
        outputs, self.states[role] = self.ask(role, tokens)
        logits = outputs["logits"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, self.x)
        self.add(name, (losses * at).sum(1), at.sum(1))
        return logits

    def filled(self, name: str, masked: Array, u: Array) -> Array:
        """Restores masked positions, and returns the row with drawn tokens there."""
        logits = self.restore(name, jnp.where(masked, self.mask_token, self.x), masked)
        return jnp.where(masked, draw(logits, u), self.x)

    def detect(
        self,
        name: str,
        tokens: Array,
        altered: Array,
        *,
        course: int,
        segments: Array | None = None,
        real: Array | None = None,
    ) -> Array:
        """Adds the binary cross-entropy of altered positions; returns where it is wrong."""
        valid: Array = self.valid if real is None else real
        student, self.states["student"] = self.ask("student", tokens, segments)
        detector, self.states["detector"] = self.nets("detector", student["tokens"], train=True)
        logits = detector["output"][..., course]
        losses = optax.sigmoid_binary_cross_entropy(logits, altered.astype(logits.dtype))
        self.add(name, (losses * valid).sum(1), valid.sum(1))
        self.add(f"altered_{name}", (altered & valid).sum(1), valid.sum(1))
        return jax.lax.stop_gradient(((logits > 0) != altered) & valid)

    def terms(self, coef: dict[str, float]) -> Terms:
        logged = [n for n in self.values if n == "unchanged" or n.startswith("altered_")]
        return Terms(
            values=self.values,
            counts=self.counts,
            coef={**coef, **dict.fromkeys(logged, 0.0)},
            state=self.states,
        )


def draw(logits: Array, u: Array) -> Array:
    """Draws tokens by their distribution function, without gradient, `[b, t, v] -> int32 [b, t]`.

    Args:
      logits: `[b, t, v]`.
      u: uniform numbers in [0, 1), `[b, t]`.
    """
    p = jax.nn.softmax(jax.lax.stop_gradient(logits), axis=-1)
    below = (jnp.cumsum(p, axis=-1) <= u[..., None]).sum(-1)
    return jnp.minimum(below, logits.shape[-1] - 1).astype(jnp.int32)


make = MCL
