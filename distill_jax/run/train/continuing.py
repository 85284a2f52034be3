"""A run that goes on differently: with a longer schedule, or with changes that were asked for.

Every schedule is a function of the step and of the length of training, never of a state. From the
step at which a run goes on, the schedules are those of the new length: a cosine that had reached 0
rises again to the value that the longer cosine has at this step. Nothing before that step changes.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from distill_jax.core import optim, phases
from distill_jax.core.errors import CheckpointError, ConfigError
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.run import build as build_lib
from distill_jax.run import config as config_lib
from distill_jax.run import processes
from distill_jax.run import workdir as workdir_lib
from distill_jax.run.build import Experiment
from distill_jax.run.build.method import schedule_args
from distill_jax.run.config import ConfigDict
from distill_jax.run.workdir.changes import LENGTH, within
from distill_jax.trainer.io.step_index import newest_meta


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation:
    """How a run goes on.

    Attributes:
      allowed: keys that may differ from the stored config.
      changes: those that do, `{path: [old, new]}`.
      before: the stored config, None where nothing changes.
      step: from which the run goes on.
      old_total: length of training so far planned, in steps; 0 where nothing changes.
      total: new length of training, in steps.
    """

    allowed: Collection[str] = ()
    changes: Mapping[str, list[str]] = dataclasses.field(default_factory=dict)
    before: ConfigDict | None = None
    step: int = 0
    old_total: int = 0
    total: int = 0

    @property
    def longer(self) -> bool:
        return self.total > self.old_total


def plan(config: ConfigDict, workdir: pathlib.Path, allowed: Collection[str]) -> Continuation:
    """Compares a config with that of the run in a folder, and says how the run goes on.

    Args:
      config: of this start.
      workdir: the run folder.
      allowed: keys that may differ, `workdir.changes.LENGTH` among them for a longer schedule.

    Raises:
      ConfigError: something else differs, a declared change is none, or the length is no longer
        one.
    """
    where = str(workdir)
    found = processes.from_first(lambda: _compare(config, workdir, allowed), where=where)
    if not found["changes"]:
        return Continuation(allowed=allowed)
    before = config_lib.from_json(found.pop("before"), where=where)
    return Continuation(allowed=allowed, before=before, **found)


def _compare(config: ConfigDict, workdir: pathlib.Path, allowed: Collection[str]) -> dict[str, Any]:
    changes = workdir_lib.check_config(config, workdir, allowed=allowed)
    if not allowed:
        return {"changes": {}}
    flag = "--extend" if LENGTH in allowed else "--change"
    workdir_lib.changes.check_extendable(workdir, flag)
    for key in allowed:
        differs = any(within(path, (key,)) for path in changes)
        if key != LENGTH and not differs and not workdir_lib.segments.changed(workdir, key):
            raise ConfigError(
                f"nothing of {key} differs from the run",
                where="--change",
                hint=f"set it: --config.{key}=VALUE; or leave the flag out",
            )
    before = workdir_lib.stored_config(workdir)
    meta = newest_meta(workdir / "checkpoints")
    if before is None or meta is None:
        hint = "its result remains; a new run needs another --workdir"
        raise CheckpointError("holds no readable checkpoint", where=f"{flag}: {workdir}", hint=hint)
    step, lengths = meta["step"], None
    if LENGTH in allowed:
        lengths = _lengths(before, config, meta)
        _check_length(*lengths, step, given=str(config.total))
    if not changes:
        return {"changes": {}}
    old, new = lengths or (0, 0)
    return {
        "changes": changes,
        "before": config_lib.to_json(before),
        "step": step,
        "old_total": old,
        "total": new,
    }


def _lengths(before: ConfigDict, config: ConfigDict, meta: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the stored and the new length of training, in steps."""
    part = ((meta.get("inputs") or {}).get("data") or {}).get("train") or {}
    if not isinstance(n := part.get("n"), int):
        raise ConfigError(
            "its checkpoint, of an earlier version, does not say how many examples it trained on",
            where="--extend",
            hint="train a new run with the longer total",
        )
    return config_lib.total_steps(before, n), config_lib.total_steps(config, n)


def _check_length(old: int, new: int, step: int, *, given: str) -> None:
    if new >= old:
        return
    done = f"and has done {step} of them" if step < old else "and has done them all"
    given = given if given.endswith("steps") else f"{given}, {new} steps"
    raise ConfigError(
        f"{given}: the run has a schedule of {old} steps, {done}",
        where="--extend",
        hint="it takes the new total, longer than before; a shorter run needs another --workdir",
    )


def check_finished(going_on: Continuation, steps: int, workdir: pathlib.Path) -> None:
    """Refuses changes to a run that is finished and is not to train longer.

    Raises:
      ConfigError: naming them.
    """
    changes = [path for path in going_on.changes if path != LENGTH]
    if changes:
        raise ConfigError(
            f"is finished after {steps} steps, so a change of {', '.join(changes)} has no effect",
            where=str(workdir),
            hint="--extend=TOTAL trains longer; --mode=eval measures with other evaluators",
        )


def check(
    going_on: Continuation,
    experiment: Experiment,
    *,
    make_experiment: Callable[[ConfigDict], Experiment],
    log_line: Callable[[str], None],
) -> None:
    """Refuses what would move parts of training that the run has behind it; says what is new.

    Args:
      going_on: from `plan`, with changes.
      experiment: with the new config.
      make_experiment: as in `loop.train`.
      log_line: prints a line.

    Raises:
      ConfigError: naming it.
    """
    before, step = going_on.before, going_on.step
    assert before is not None
    _check_selection(going_on, experiment)
    if going_on.longer:
        _check_outer(going_on, experiment)
        if len(experiment.phases) > 1:
            _check_phases(make_experiment(before).phases, experiment.phases, going_on)
        log_line(f"extending from step {step} to step {going_on.total}, the new total")
    for line in workdir_lib.changes.spell(going_on.changes):
        log_line(f"changed from step {step} on: {line}")
    old, new = rates(going_on, experiment, step)
    if old != new:
        log_line(f"the learning rate goes on at {new:.4g}; it was {old:.4g} in the step before")
    for line in _follow(experiment, step) if going_on.longer else ():
        log_line(line)


def rates(going_on: Continuation, experiment: Experiment, step: int) -> tuple[float, float]:
    """Returns the learning rate of the step before `step`, as it was, and that of `step`."""
    per_epoch = experiment.steps_per_epoch
    assert going_on.before is not None
    total = going_on.old_total or experiment.total_steps
    arguments = schedule_args(going_on.before, per_epoch, total)
    names = ("lr", "warmup_steps")
    schedule = optim.make_schedule(
        arguments["schedule"],
        total_steps=total,
        kwargs=arguments["schedule_kwargs"],
        **{name: arguments[name] for name in names},
    )
    first, second = np.asarray(schedule(max(step - 1, 0))), np.asarray(experiment.schedule(step))
    return float(first), float(second)


def _check_selection(going_on: Continuation, experiment: Experiment) -> None:
    """Refuses another evaluator for the metric that selects the best of all checkpoints."""
    metric = experiment.config.eval.metric
    changed = {path.split(".")[1] for path in going_on.changes if within(path, ("evaluators",))}
    if not metric or not changed:
        return
    build_lib.check_metric(experiment, metric, where="eval.metric")
    name = build_lib.evaluator_of(experiment, metric)
    if name in changed:
        raise ConfigError(
            f"it measures {metric}, which selects the best checkpoint; those before and after the "
            "change could not be compared",
            where=f"evaluators.{name}",
            hint="leave it as it is and add others, or measure later with --mode=eval",
        )


def _check_outer(going_on: Continuation, experiment: Experiment) -> None:
    """Refuses a weighting whose first step the longer schedule would move."""
    outer, before = experiment.outer, going_on.before
    if outer is None or before is None:
        return
    per_epoch = experiment.steps_per_epoch
    old, new = (
        config_lib.duration(
            config, "bilevel.warmup", default=0, steps_per_epoch=per_epoch, total_steps=total
        )
        for config, total in ((before, going_on.old_total), (experiment.config, going_on.total))
    )
    if old != new and min(old, new) < going_on.step:
        raise ConfigError(
            f"a share of training: the weighting learns from step {old} on, and the longer "
            f"schedule would move that to step {new}, which the run has behind it or would wait "
            "for again",
            where="bilevel.warmup",
            hint="only runs with bilevel.warmup in steps or epochs can be extended",
        )


def _check_phases(
    old: tuple[phases.Phase, ...], new: tuple[phases.Phase, ...], going_on: Continuation
) -> None:
    """Refuses phases that would begin again, or would already have begun."""
    for was, now in zip(old, new, strict=True):
        if was.start != now.start and min(was.start, now.start) < going_on.step:
            raise ConfigError(
                f"its phase of {type(now.objective).__name__} began at step {was.start}, and the "
                f"longer schedule would move that to step {now.start}",
                where="objective.kwargs",
                hint="only runs whose phases begin at steps or epochs, not at shares of training, "
                "can be extended past them",
            )


def _follow(experiment: Experiment, step: int) -> list[str]:
    """Returns lines on what else follows the new length."""
    lines, at = [], jnp.asarray(step)
    for role, (_, decay) in experiment.ema.items():
        if callable(decay):
            lines.append(f"the decay of the average {role} goes on at {float(decay(at)):.6g}")
    objective: Any = experiment.objective
    parts = [objective]
    if isinstance(objective, WeightedObjective):
        parts = [objective.objective, objective.weighting]
    lines += [
        f"{type(part).__name__} depends on the length of training: its schedule is now that of "
        f"{experiment.total_steps} steps"
        for part in parts
        if getattr(part, "total_steps", None) is not None
    ]
    config = experiment.config
    for path in config_lib.DURATIONS:
        value = str(config_lib.lookup(config, path) or "")
        if path != LENGTH and ("%" in value or "percent" in value):
            lines.append(f"{path} is {value} of the new length")
    return lines
