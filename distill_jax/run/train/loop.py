"""The loop of one run: steps, and the events between them, in a fixed order."""

import pathlib
from collections.abc import Callable, Collection
from typing import Any

from distill_jax.core.api import TrainState
from distill_jax.core.errors import NonFiniteError, UserError
from distill_jax.run import build as build_lib
from distill_jax.run import environment, loggers, preflight, processes
from distill_jax.run import workdir as workdir_lib
from distill_jax.run.arguments import located
from distill_jax.run.build import Experiment
from distill_jax.run.config import ConfigDict
from distill_jax.run.train import continuing, hooks
from distill_jax.run.train.finish import Group, evaluate, finish
from distill_jax.run.train.program import SingleRun
from distill_jax.run.train.run import Run
from distill_jax.run.train.stepping import Clock, Schedule, Stepper, Stop
from distill_jax.trainer.io.step_index import newest_meta


def train(
    config: ConfigDict,
    workdir: pathlib.Path,
    *,
    arm: str = "",
    reported: str = "",
    make_experiment: Callable[[ConfigDict], Experiment] = build_lib.build,
    start_over: bool = False,
    changes: Collection[str] = (),
    stop_at: str = "",
    log_line: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains, or continues, the run in a folder, and returns its result.

    Args:
      config: a config that passes `config.validate`.
      workdir: the run folder.
      arm: name of the run in a study, for titles.
      reported: the metric that a study compares, checked before the first step.
      make_experiment: how the experiment is built; a study passes a cached builder.
      start_over: whether the files of an earlier run in the folder are set aside.
      changes: keys in which the config may differ from that of the run in the folder, which goes on
        with the new values: "total", longer than before, and those of `workdir.changes.TRAINING`.
      stop_at: a duration: training stops after the first evaluation from there on.
      log_line: prints a line.

    Raises:
      UserError: the config, the data or a checkpoint does not fit, the folder is not this
        program's or another process writes to it, or a loss became NaN.
      Preempted: a signal stopped the run, or it reached `stop_at`; its state is saved, if it had
        begun.
    """
    clock = Clock()
    loggers.check_installed(tuple(config.log.to), where="log.to")
    with (
        workdir_lib.claim(workdir, "run", start_over=start_over, log_line=log_line),
        located(config),
    ):
        going_on = continuing.plan(config, workdir, changes)
        finished = processes.from_first(
            lambda: workdir_lib.read_result(workdir, log_line=log_line), where=str(workdir)
        )
        if finished is not None and not going_on.longer:
            continuing.check_finished(going_on, finished["steps"], workdir)
            log_line(f"{workdir} is finished; its result is read from result.json")
            return finished
        processes.stop_if_asked("before the run began")
        experiment = make_experiment(config)
        if going_on.changes or not workdir_lib.is_run(workdir):  # others were looked at before
            preflight.warn(experiment, log_line, alone=not arm)
        if going_on.changes:
            continuing.check(
                going_on, experiment, make_experiment=make_experiment, log_line=log_line
            )
        run = Run(
            config,
            workdir,
            experiment,
            arm=arm,
            reported=reported,
            going_on=going_on,
            log_line=log_line,
        )
        last = _planned_end(experiment, config, workdir, stop_at) if stop_at else None
        program, title = SingleRun(run), f"{arm} seed {config.seed}" if arm else "train"
        with environment.stop_on_signal() as stop:
            stepper = Stepper(program, [run], clock=clock, log_line=log_line)
            with stepper.opened(title) as (state, step):
                try:
                    state = steps(run, program, stepper, Stop(stop, last), state, step)
                    with stepper.ending():
                        [outcome] = finish(Group([run]), program, stepper, state)
                except NonFiniteError as error:
                    outcome = error
                failed = isinstance(outcome, NonFiniteError)
                stepper.watch.enter("failed" if failed else "done")
        if failed and not arm:
            raise workdir_lib.explain_divergence(outcome, workdir)
    if failed:
        raise outcome  # out of the claim: a study keeps the log of a run that diverged
    return outcome


def _planned_end(
    experiment: Experiment, config: ConfigDict, workdir: pathlib.Path, stop_at: str
) -> int:
    """Returns the step of the evaluation after which `--stop_at` ends a run.

    Raises:
      UserError: there is none, or nothing to evaluate on.
      Paused: the run is there already.
    """
    if not len(experiment.dataset.held_out):
        hint = "set data.held_out above 0"
        raise UserError("there is no held-out part to evaluate on", where="--stop_at", hint=hint)
    step = Schedule(config, experiment).evaluation_from(stop_at, where="--stop_at")
    read = lambda: newest_meta(workdir / "checkpoints")  # noqa: E731
    meta = processes.from_first(read, where=str(workdir))
    if meta is not None and meta["step"] >= step:
        raise environment.Paused(f"step {step} is reached and saved")
    return step


def steps(
    run: Run, program: SingleRun, stepper: Stepper, stop: Stop, state: TrainState, step: int
) -> TrainState:
    """Takes the remaining steps, with the events between them."""
    schedule, group = stepper.schedule, Group([run])
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
        measured = evaluate(group, program, state, step, "held_out") if due.evaluate else {}
        if due.evaluate:
            run.draw(step)
        if run.error is not None:
            raise run.error
        stopping = stop.asked(step)
        if due.save or stopping or run.improves(measured.get(0)):
            hooks.save(run, state, measured.get(0))
        if stopping and step < schedule.total:
            hooks.stop([run], step, planned=stop.planned(step))
    return state
