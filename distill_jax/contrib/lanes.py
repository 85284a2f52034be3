"""Runs of a study side by side: seeds, and arms that differ in scalars, as lanes of one program.

Each lane has the state, the order of examples, the key and the scalars of its own run, and leaves
the folder that its run alone would leave. The data are shared.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from distill_jax.contrib import lanes_loop
from distill_jax.contrib.lanes_program import Lanes
from distill_jax.core import lanes
from distill_jax.core.errors import NonFiniteError
from distill_jax.run import build as build_lib
from distill_jax.run import environment, preflight, processes, workdir
from distill_jax.run.build import Experiment
from distill_jax.run.config import ConfigDict
from distill_jax.run.members import NO_LANES, Member, kind
from distill_jax.run.train.run import Run
from distill_jax.run.train.stepping import Clock, Stop

__all__ = ["NO_LANES", "Lanes", "Member", "kind", "make_experiments", "refusal", "train"]


def refusal(experiment: Experiment) -> str:
    """Says why the runs of an experiment cannot be lanes; empty where they can."""
    config = experiment.config
    reasons = {
        "several processes": jax.process_count() > 1,
        "data that are streamed": not experiment.resident,
        "stored answers of a teacher": experiment.cache is not None,
        "sharded parameters": (config.mesh.fsdp, config.mesh.model) != (1, 1)
        or len(config.partition.rules) > 0,
    }
    return ", ".join(reason for reason, holds in reasons.items() if holds)


def train(
    members: Sequence[Member],
    *,
    make_experiment: Callable[[ConfigDict], Experiment] = build_lib.build,
    only_if_faster: bool = False,
    way: str = "",
    say: Callable[[str], None] = print,
) -> list[dict[str, Any] | NonFiniteError]:
    """Trains, or continues, runs of one `kind` side by side.

    Args:
      members: runs that are not finished.
      make_experiment: how an experiment is built.
      only_if_faster: whether to refuse where runs one after the other are as fast.
      way: see `lanes.over_lanes`; by default the fastest.
      say: prints a line.

    Returns:
      The result of each run, or the error with which it diverged.

    Raises:
      NotImplementedError: saying why these runs cannot be lanes; nothing was computed.
      jax.errors.JAXTypeError: a scalar that differs decides what is computed.
      UserError: as `loop.train`.
      Preempted: stopped by a signal; the states are saved.
    """
    clock = Clock()
    with contextlib.ExitStack() as stack:
        for member in members:
            stack.enter_context(workdir.claim(member.workdir, "run", say=say))
        return _train(members, clock, make_experiment, only_if_faster, way, say)


def _train(
    members: Sequence[Member],
    clock: Clock,
    make_experiment: Callable[[ConfigDict], Experiment],
    only_if_faster: bool,
    way: str,
    say: Callable[[str], None],
) -> list[dict[str, Any] | NonFiniteError]:
    processes.stop_if_asked("before the runs began")
    experiments = make_experiments(members, make_experiment)
    preflight.warn(experiments[0], say, alone=False)
    program = Lanes(members, experiments, way=way)
    if only_if_faster and program.way != "vmap":
        raise NotImplementedError("convolutions on CPU gain little side by side")
    runs = [
        Run(
            member.config,
            member.workdir,
            experiment,
            arm=member.arm,
            reported=member.reported,
            share=1 / len(members),
            say=say,
        )
        for member, experiment in zip(members, program.experiments, strict=True)
    ]
    program.runs = runs
    with environment.stop_on_signal() as stop:
        return lanes_loop.train_runs(runs, program, Stop(stop), clock, say)


def make_experiments(members: Sequence[Member], make_experiment) -> list[Experiment]:
    """Builds the experiment of each arm; they share data and mesh."""
    first = make_experiment(members[0].config)
    if why := refusal(first):
        raise NotImplementedError(why)
    devices = list(first.mesh.devices.flat)
    mesh = lanes.make_lane_mesh(len(members), devices)
    made = {members[0].arm: dataclasses.replace(first, mesh=mesh)}
    for member in members:
        if member.arm not in made:
            built = build_lib.build(member.config, trusted=first.trusted)
            made[member.arm] = dataclasses.replace(built, mesh=mesh, dataset=first.dataset)
    return [made[member.arm] for member in members]
