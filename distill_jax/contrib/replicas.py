"""Runs of a study side by side: seeds, and arms that differ in scalars, as replicas of one program.

Each replica has the state, the order of examples, the key and the scalars of its own run, and
leaves the folder that its run alone would leave. The data are shared.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from distill_jax.contrib.replicas_program import Replicas
from distill_jax.core import replicas
from distill_jax.core.api import TrainState
from distill_jax.core.errors import NonFiniteError
from distill_jax.run import build as build_lib
from distill_jax.run import environment, preflight, processes, workdir
from distill_jax.run.build import Experiment
from distill_jax.run.config import ConfigDict
from distill_jax.run.members import NO_REPLICAS, Member, kind, scalars_of
from distill_jax.run.train import hooks
from distill_jax.run.train.finish import Group, evaluate, finish
from distill_jax.run.train.run import Run
from distill_jax.run.train.stepping import Clock, Stepper, Stop

__all__ = ["NO_REPLICAS", "Member", "Replicas", "kind", "make_experiments", "refusal", "train"]


def refusal(experiment: Experiment) -> str:
    """Returns the reason why the runs of an experiment cannot be replicas, empty if they can."""
    config = experiment.config
    reasons = {
        "several processes": jax.process_count() > 1,
        "data that are streamed": not experiment.resident,
        "stored answers of a teacher": experiment.cache is not None,
        "sharded parameters": (config.mesh.fsdp, config.mesh.model) != (1, 1)
        or len(config.partition.rules) > 0,
        "a method of several phases": len(experiment.phases) > 1,
    }
    return ", ".join(reason for reason, holds in reasons.items() if holds)


def train(
    members: Sequence[Member],
    *,
    make_experiment: Callable[[ConfigDict], Experiment] = build_lib.build,
    only_if_faster: bool = False,
    strategy: str = "",
    log_line: Callable[[str], None] = print,
) -> list[dict[str, Any] | NonFiniteError]:
    """Trains, or continues, runs of one `kind` side by side.

    Args:
      members: runs that are not finished.
      make_experiment: how an experiment is built.
      only_if_faster: whether to refuse where runs one after the other are as fast.
      strategy: see `replicas.over_replicas`; by default the fastest.
      log_line: prints a line.

    Returns:
      The result of each run, or the error with which it diverged.

    Raises:
      NotImplementedError: these runs cannot be replicas; nothing was computed.
      jax.errors.JAXTypeError: a scalar that differs decides what is computed.
      UserError: as `loop.train`.
      Preempted: stopped by a signal; the states are saved.
    """
    clock = Clock()
    with contextlib.ExitStack() as stack:
        for member in members:
            stack.enter_context(workdir.claim(member.workdir, "run", log_line=log_line))
        return _train(members, clock, make_experiment, only_if_faster, strategy, log_line)


def _train(
    members: Sequence[Member],
    clock: Clock,
    make_experiment: Callable[[ConfigDict], Experiment],
    only_if_faster: bool,
    strategy: str,
    log_line: Callable[[str], None],
) -> list[dict[str, Any] | NonFiniteError]:
    processes.stop_if_asked("before the runs began")
    experiments = make_experiments(members, make_experiment)
    preflight.warn(experiments[0], log_line, alone=False)
    program = Replicas(members, experiments, strategy=strategy)
    if only_if_faster and program.strategy != "vmap":
        raise NotImplementedError("convolutions on CPU gain little side by side")
    runs = [
        Run(
            member.config,
            member.workdir,
            experiment,
            arm=member.arm,
            reported=member.reported,
            share=1 / len(members),
            log_line=log_line,
        )
        for member, experiment in zip(members, program.experiments, strict=True)
    ]
    program.runs = runs
    group = Group(runs)
    with environment.stop_on_signal() as stop:
        stepper = Stepper(program, runs, clock=clock, log_line=log_line)
        with stepper.opened(title(members)) as (state, step):
            state = steps(group, program, stepper, Stop(stop), state, step)
            with stepper.ending():
                results = finish(group, program, stepper, state)
            stepper.watch.enter("done" if group.going else "failed")
            return results


def title(members: Sequence[Member]) -> str:
    """Returns the label of the progress display."""
    arms = dict.fromkeys(member.arm for member in members)
    if not any(arms):
        return "train"
    seeds = dict.fromkeys(str(member.seed) for member in members)
    return f"{' '.join(arms)} seed{'s'[: len(seeds) > 1]} {' '.join(seeds)}"


def steps(
    group: Group, program: Replicas, stepper: Stepper, stop: Stop, state: TrainState, step: int
) -> TrainState:
    """Takes the remaining steps and performs the actions due between them."""
    schedule = stepper.schedule
    while step < schedule.total and group.going:
        event = schedule.next(step)
        state, step, rows = stepper.advance(state, step, until=event, stop=stop)
        own = [[(variant, values[i]) for variant, values in rows] for i, _ in enumerate(group.runs)]
        reported = {"stalls": stepper.stalls(), "seconds": stepper.seconds}
        means = group.each(hooks.read, own, step=step, **reported)
        losses = [metrics["loss"] for metrics in means.values() if "loss" in metrics]
        stepper.progress.update(step, loss=float(np.mean(losses)) if losses else None)
        due = schedule.at(step, event=event)
        if step == event:
            for run in group.runs:
                run.unlogged = []
        if due.log:
            group.each(hooks.log, means, step=step)
        measured: dict[int, dict[str, Any] | None] = dict.fromkeys(range(len(group.runs)))
        if due.evaluate:
            measured |= evaluate(group, program, state, step, "held_out")
            group.each(lambda run, step=step: run.draw(step))
        stopping = stop.asked(step)
        if due.save or stopping or any(run.improves(measured[i]) for i, run in group.going):
            group.each(hooks.save, program.split(state), measured)
        if stopping and step < schedule.total:
            hooks.stop(group.runs, step)
    return state


def make_experiments(members: Sequence[Member], make_experiment) -> list[Experiment]:
    """Builds the experiment of each arm and its settings; they share data and mesh."""
    first = make_experiment(members[0].config)
    if why := refusal(first):
        raise NotImplementedError(why)
    devices = list(first.mesh.devices.flat)
    mesh = replicas.make_replica_mesh(len(members), devices)
    numbers = [json.dumps(scalars_of(member.config)) for member in members]
    keys = [(member.arm, own) for member, own in zip(members, numbers, strict=True)]
    made = {keys[0]: first.on_mesh(mesh)}
    for key, member in zip(keys, members, strict=True):
        if key not in made:
            built = build_lib.build(member.config, trusted=first.trusted)
            made[key] = dataclasses.replace(built.on_mesh(mesh), dataset=first.dataset)
    return [made[key] for key in keys]
