"""Moving averages that look ahead (Du et al. 2022, "Learning from Future", arXiv:2209.06993).

A student that learns from a moving average of itself first takes K virtual steps. They update the
average, the student is restored, and the real step learns from the advanced average. The deep
variant (FST-D) takes the virtual steps in sequence on the same batch. The wide variant (FST-W)
takes each of them from the current student, on K batches that begin with the current one, and
averages the results. With K = 1 both are the basic method. A step costs K + 1 times as much.

As in the semi-supervised variant of the authors, the real step also updates the average. The
look-ahead starts in the first step and the rate of the average is constant. The authors skip the
look-ahead in the first iteration and increase the rate.
"""

from collections.abc import Iterable
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax

from distill_jax.core import rng
from distill_jax.core.api import Array, Batch, Key, PyTree, Role, TrainState
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.core.steps import Frozen, StepFn

KINDS = ("deep", "wide")
RESTORE = ("all", "params+opt", "params")
"""State that is restored after the virtual steps: everything except the averages; parameters and
optimizer, but not batch statistics and the objective's memory; or only the parameters, as in the
authors' program, so that the moments of the optimizer and their count are not restored either. The
position in the learning-rate schedule is always restored."""


def make_lookahead_step(
    step: StepFn,
    *,
    steps: int,
    kind: str = "deep",
    restore: str = "all",
    ema: Iterable[Role],
    unroll: bool | None = None,
) -> StepFn:
    """Wraps a pure step `(state, frozen, batch, key) -> (state, metrics)`.

    With the wide kind, the step takes K stacked batches, leaves `[k, b, ...]`, and the real step
    uses the first.

    Args:
      step: from `steps.make_train_step`, which moves the averages after its update.
      steps: K, virtual steps before each real one, at least 1.
      kind: "deep" or "wide".
      restore: one of `RESTORE`.
      ema: the roles that are moving averages.
      unroll: whether virtual steps are unrolled instead of scanned; by default on CPU only.

    Raises:
      ArgumentError: an argument is invalid, or no role is a moving average.
    """
    if steps < 1:
        raise ArgumentError(f"steps is {steps}", where="steps", hint="1 or more; 0 is off")
    for name, value, options in (("kind", kind, KINDS), ("restore", restore, RESTORE)):
        if value not in options:
            hint = nearest(value, options)
            raise ArgumentError(f"unknown value {value!r}", where=name, hint=hint)
    averages = tuple(ema)
    if not averages:
        raise ArgumentError(
            "no role is a moving average, so lookahead would change nothing",
            where="steps",
            hint="make the teacher a moving average of the student, or set steps to 0",
        )
    if unroll is None:
        unroll = jax.default_backend() == "cpu"

    def back(state: TrainState, ahead: TrainState) -> TrainState:
        """Returns `state` with the effects of virtual steps that are not restored."""
        if restore == "all":
            return state
        model_state = {
            role: value if role in averages else ahead.model_state[role]
            for role, value in state.model_state.items()
        }
        state = replace(state, model_state=model_state, memory=ahead.memory)
        if restore == "params":
            state = replace(state, opt_state=_same_schedule(ahead.opt_state, state.opt_state))
        return state

    def lookahead(state: TrainState, frozen: Frozen, batch: Batch, key: Key):
        current = jax.tree.map(lambda x: x[0], batch) if kind == "wide" else batch

        def virtual(ahead: TrainState, k: Array):
            begin = ahead if kind == "deep" else back(state, ahead)
            seen = jax.tree.map(lambda x: x[k], batch) if kind == "wide" else batch
            begin = replace(
                begin, step=state.step, opt_state=_same_schedule(begin.opt_state, state.opt_state)
            )
            own = jax.random.fold_in(rng.stream(key, "lookahead"), k)
            ahead = step(begin, frozen, seen, own)[0]
            return ahead, _averages(ahead, averages) if kind == "wide" else None

        ahead, branches = jax.lax.scan(virtual, state, jnp.arange(steps), unroll=unroll or 1)
        targets, moved = _averages(ahead, averages)
        if kind == "wide":
            # The moving average is linear: the mean over branches is that of the mean student.
            targets, moved = jax.tree.map(lambda x: x.mean(0).astype(x.dtype), branches)
        begin = back(state, ahead)
        begin = replace(begin, targets=targets, model_state={**begin.model_state, **moved})
        return step(begin, frozen, current, key)

    return lookahead


def _averages(state: TrainState, roles: tuple[Role, ...]) -> tuple[PyTree, PyTree]:
    return dict(state.targets), {role: state.model_state[role] for role in roles}


def _same_schedule(opt_state: PyTree, like: PyTree) -> PyTree:
    """Returns `opt_state` at the position of `like` in the learning-rate schedule."""

    def one(new, old):
        return old if isinstance(new, optax.ScaleByScheduleState) else new

    is_leaf = lambda x: isinstance(x, optax.ScaleByScheduleState)  # noqa: E731
    return jax.tree.map(one, opt_state, like, is_leaf=is_leaf)
