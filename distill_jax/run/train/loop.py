"""The loop of one run: steps, and what is due between them, in a fixed order."""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from distill_jax.core.api import TrainState
from distill_jax.core.errors import NonFiniteError
from distill_jax.run import build as build_lib
from distill_jax.run import environment, preflight, processes
from distill_jax.run import workdir as workdir_lib
from distill_jax.run.build import Experiment
from distill_jax.run.config import ConfigDict
from distill_jax.run.train import artifacts, evaluation, hooks, result
from distill_jax.run.train.program import SingleRun
from distill_jax.run.train.run import Run
from distill_jax.run.train.stepping import Clock, Stepper, Stop


def train(
    config: ConfigDict,
    workdir: pathlib.Path,
    *,
    arm: str = "",
    reported: str = "",
    make_experiment: Callable[[ConfigDict], Experiment] = build_lib.build,
    start_over: bool = False,
    log_line: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains, or continues, the run in a folder, and returns its result.

    Args:
      config: a config that passes `config.validate`.
      workdir: the run folder.
      arm: name of the run in a study, for titles.
      reported: the metric that a study compares, checked before the first step.
      make_experiment: how the experiment is built; a study passes a cached builder.
      start_over: whether what the folder holds of an earlier run is set aside.
      log_line: prints a line.

    Raises:
      UserError: the config, the data or a checkpoint does not fit, the folder is not this
        program's or another process writes to it, or a loss became NaN.
      Preempted: a signal asked the run to stop; its state is saved, where it had begun.
    """
    clock = Clock()
    with workdir_lib.claim(workdir, "run", start_over=start_over, log_line=log_line):
        processes.from_first(lambda: workdir_lib.check_config(config, workdir), where=str(workdir))
        finished = processes.from_first(
            lambda: workdir_lib.read_result(workdir, log_line=log_line), where=str(workdir)
        )
        if finished is not None:
            log_line(f"{workdir} is finished; its result is read from result.json")
            return finished
        processes.stop_if_asked("before the run began")
        experiment = make_experiment(config)
        if not workdir_lib.is_run(workdir):  # one that goes on was looked at before
            preflight.warn(experiment, log_line, alone=not arm)
        run = Run(config, workdir, experiment, arm=arm, reported=reported, log_line=log_line)
        with environment.stop_on_signal() as stop:
            outcome = train_run(run, Stop(stop), clock, log_line)
        if isinstance(outcome, NonFiniteError) and not arm:
            raise workdir_lib.explain_divergence(outcome, workdir)
    if isinstance(outcome, NonFiniteError):
        raise outcome  # out of the claim: a study keeps the log of a run that diverged
    return outcome


def train_run(
    run: Run, stop: Stop, clock: Clock, log_line: Callable[[str], None]
) -> dict[str, Any] | NonFiniteError:
    """Returns the result of a run, or the error with which it diverged."""
    program = SingleRun(run)
    stepper = Stepper(
        program, [run.workdir], run.config, run.experiment, clock=clock, log_line=log_line
    )
    title = f"{run.arm} seed {run.config.seed}" if run.arm else "train"
    with stepper.opened([run], title) as (state, step):
        try:
            state = steps(run, program, stepper, stop, state, step)
            with stepper.ending():
                found = finish(run, program, stepper, state)
        except NonFiniteError as error:
            stepper.watch.enter("failed")
            return error
        stepper.watch.enter("done")
        return found


def steps(
    run: Run, program: SingleRun, stepper: Stepper, stop: Stop, state: TrainState, step: int
) -> TrainState:
    """Takes the steps that are left, with what is due between them."""
    schedule = stepper.schedule
    while step < schedule.total:
        event = schedule.next(step)
        state, step, rows = stepper.advance(state, step, until=event, stop=stop)
        means = hooks.read(run, rows, step=step, stalls=stepper.stalls(), seconds=stepper.seconds)
        stepper.progress.update(step, loss=means.get("loss"))
        due = schedule.at(step, event=event)
        if step == event:
            run.unlogged = []
        if due.log:
            hooks.log(run, means, step=step)
        measured = {}
        if due.evaluate:
            collect = functools.partial(program.collect, state)
            measured = hooks.evaluate(run, collect, step, "held_out")
        stopping = stop.asked(step)
        if due.save or stopping or run.improves(measured):
            hooks.save(run, state, measured)
        if stopping and step < schedule.total:
            hooks.stop(run, step)
    return state


def finish(run: Run, program: SingleRun, stepper: Stepper, state: TrainState) -> dict[str, Any]:
    """Measures the last and the best state on the test split and writes the result."""
    experiment, total = run.experiment, run.experiment.total_steps

    collect = functools.partial(program.collect, state)
    with stepper.watch.during("checkpoint"):
        best = run.best()
    if len(experiment.dataset.test):
        hooks.evaluate(run, collect, total, "test")
    if artifacts.has_example_weights(experiment):
        rows = artifacts.example_weight_rows(experiment)
        outputs, example_info = collect("train", rows=rows)
        artifacts.write_example_weights(run, rows, outputs["example_weights"], example_info)
    with stepper.watch.during("evaluation", "pictures"):
        program.draw(state)
    measured = measure_earlier(run, program, stepper, best)
    stepper.clock.lap("finish")
    for stall in stepper.stalls():
        run.alarms.add(stall)
    compute = result.of_compute(
        experiment,
        run.config,
        flops_per_step=program.flops_per_step,
        paces=stepper.paces,
        phases=stepper.clock.phases,
        watch=stepper.watch,
    )
    return run.finish(hooks.chosen(run, best, measured), compute)


def measure_earlier(
    run: Run, program: SingleRun, stepper: Stepper, best: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Measures the best state on the test split, where it is not the last."""
    experiment = run.experiment
    if best is None or best["step"] == experiment.total_steps or not len(experiment.dataset.test):
        return {}
    restored = run.checkpointer.restore(experiment.abstract_state, step=best["step"])
    assert restored is not None
    collect = functools.partial(program.collect, restored.state)
    with stepper.watch.during("evaluation", "evaluation of the best state"):
        outputs, example_info = collect("test")
        parts = evaluation.collect_parts(experiment, collect, "test", (outputs, example_info))
    return evaluation.measure(experiment, outputs, example_info, "test", parts)
