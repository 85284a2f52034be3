"""The loop of runs side by side; what is due between steps is that of the loop of one run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.contrib.replicas_program import Replicas
from distill_jax.core.api import TrainState
from distill_jax.core.errors import NonFiniteError
from distill_jax.run.environment import Preempted
from distill_jax.run.train import artifacts, evaluation, hooks, result
from distill_jax.run.train.run import Run
from distill_jax.run.train.stepping import Clock, Stepper, Stop


class Group:
    """Runs side by side. One that diverges ends there, and the others go on.

    Args:
      runs: of the same length and the same events.
    """

    def __init__(self, runs: Sequence[Run]):
        self.runs = runs

    @property
    def going(self) -> list[tuple[int, Run]]:
        return [(i, run) for i, run in enumerate(self.runs) if run.error is None]

    def each(self, do: Callable[..., Any], *by_run: Any, **shared: Any) -> dict[int, Any]:
        """Calls `do(run, *own, **shared)` for every run that is still going.

        Args:
          do: what is called.
          *by_run: arguments that are a run's own, by its number.
          **shared: arguments that are the same for all runs.
        """
        found = {}
        for i, run in self.going:
            try:
                found[i] = do(run, *(values[i] for values in by_run), **shared)
            except NonFiniteError as error:
                run.error = error
        return found

    @property
    def title(self) -> str:
        arms = dict.fromkeys(run.arm for run in self.runs)
        if not any(arms):
            return "train"
        seeds = dict.fromkeys(str(run.config.seed) for run in self.runs)
        return f"{' '.join(arms)} seed{'s'[: len(seeds) > 1]} {' '.join(seeds)}"


def train_runs(
    runs: Sequence[Run],
    program: Replicas,
    stop: Stop,
    clock: Clock,
    log_line: Callable[[str], None],
) -> list[dict[str, Any] | NonFiniteError]:
    """Returns the result of each run, or the error with which it diverged.

    Raises:
      Preempted: a signal asked to stop; the states are saved.
    """
    group, first = Group(runs), runs[0]
    folders = [run.workdir for run in runs]
    stepper = Stepper(
        program, folders, first.config, first.experiment, clock=clock, log_line=log_line
    )
    with stepper.opened(runs, group.title) as (state, step):
        state = steps(group, program, stepper, stop, state, step)
        with stepper.ending():
            results = finish(group, program, stepper, state)
        stepper.watch.enter("done" if group.going else "failed")
        return results


def steps(
    group: Group, program: Replicas, stepper: Stepper, stop: Stop, state: TrainState, step: int
) -> TrainState:
    """Takes the steps that are left, with what is due between them."""
    schedule = stepper.schedule
    while step < schedule.total and group.going:
        event = schedule.next(step)
        state, step, rows = stepper.advance(state, step, until=event, stop=stop)
        own = [[(variant, values[i]) for variant, values in rows] for i, _ in enumerate(group.runs)]
        reported = {"stalls": stepper.stalls(), "seconds": stepper.seconds}
        means = group.each(hooks.read, own, step=step, **reported)
        losses = [found["loss"] for found in means.values() if "loss" in found]
        stepper.progress.update(step, loss=float(np.mean(losses)) if losses else None)
        due = schedule.at(step, event=event)
        if step == event:
            for run in group.runs:
                run.unlogged = []
        if due.log:
            group.each(hooks.log, means, step=step)
        measured: dict[int, dict[str, Any] | None] = dict.fromkeys(range(len(group.runs)))
        if due.evaluate:
            measured |= evaluate(group, program, stepper, state, step, "held_out")
        stopping = stop.asked(step)
        if due.save or stopping or any(run.improves(measured[i]) for i, run in group.going):
            group.each(hooks.save, program.split(state), measured)
        if stopping and step < schedule.total:
            for run in group.runs:
                run.checkpointer.wait()
            raise Preempted(hooks.stopped_at(step, schedule.total))
    return state


def evaluate(
    group: Group, program: Replicas, stepper: Stepper, state: TrainState, step: int, split: str
) -> dict[int, dict[str, Any]]:
    """Measures a split and logs it; returns the metrics of each run."""
    if len(getattr(group.runs[0].experiment.dataset, split)) == 0:
        group.each(lambda run: run.write_measured(step, {}))
        return {i: {} for i, _ in group.going}
    with stepper.watch.during("evaluation", f"evaluation of {split}"):
        outputs, example_info, parts = collect(group, program, state, split)
        return group.each(
            hooks.measure, outputs, parts, example_info=example_info, step=step, split=split
        )


def collect(
    group: Group, program: Replicas, state: TrainState, split: str
) -> tuple[list[Any], Any, list[dict[str, tuple[Any, Any]]]]:
    """Returns the outputs of each run on a split, facts, and the parts that evaluators need."""

    def gather(split, rows=None):
        return program.collect(state, split, rows)

    outputs, example_info = gather(split)
    found = evaluation.collect_parts(
        group.runs[0].experiment, gather, split, (outputs, example_info)
    )
    parts = [
        {name: (part[0][i], part[1]) for name, part in found.items()} for i in range(len(outputs))
    ]
    return outputs, example_info, parts


def finish(
    group: Group, program: Replicas, stepper: Stepper, state: TrainState
) -> list[dict[str, Any] | NonFiniteError]:
    """Measures the last and the best states on the test split and writes the results."""
    experiment, config = group.runs[0].experiment, group.runs[0].config
    with stepper.watch.during("checkpoint"):
        best = group.each(lambda run: run.best())
    if group.going and len(experiment.dataset.test):
        evaluate(group, program, stepper, state, experiment.total_steps, "test")
    if group.going and artifacts.has_example_weights(experiment):
        rows = artifacts.example_weight_rows(experiment)
        outputs, example_info = program.collect(state, "train", rows)
        for i, run in group.going:
            artifacts.write_example_weights(run, rows, outputs[i]["example_weights"], example_info)
    measured = measure_earlier(group, program, stepper, state, best)
    stepper.clock.lap("finish")
    for stall in stepper.stalls():
        group.each(lambda run, stall=stall: run.alarms.add(stall))
    compute = result.of_compute(
        experiment,
        config,
        flops_per_step=program.flops_per_step,
        paces=stepper.paces,
        phases=stepper.clock.phases,
        watch=stepper.watch,
        side_by_side=len(group.runs),
    )
    chosen = group.each(hooks.chosen, best, measured)
    results = group.each(lambda run, found: run.finish(found, compute), chosen)
    return [results[i] if run.error is None else run.error for i, run in enumerate(group.runs)]


def measure_earlier(
    group: Group,
    program: Replicas,
    stepper: Stepper,
    state: TrainState,
    best: Mapping[int, Mapping[str, Any] | None],
) -> dict[int, dict[str, Any]]:
    """Measures, on the test split, the best states that are not the last; by run."""
    experiment = group.runs[0].experiment
    none: dict[int, dict[str, Any]] = {i: {} for i, _ in enumerate(group.runs)}
    earlier = {
        i: found["step"]
        for i, found in best.items()
        if found is not None and found["step"] != experiment.total_steps
    }
    if not len(experiment.dataset.test) or not any(i in earlier for i, _ in group.going):
        return none
    states = program.split(state)
    for i, run in group.going:
        if i in earlier:
            restored = run.checkpointer.restore(run.experiment.abstract_state, step=earlier[i])
            assert restored is not None
            states[i] = restored.state
    with stepper.watch.during("evaluation", "evaluation of the best state"):
        outputs, example_info, parts = collect(group, program, program.join(states), "test")
    going = [(i, run) for i, run in group.going if i in earlier]
    own = Group([run for _, run in going])  # an error ends the run, not its fellows
    found = own.each(
        lambda run, outputs, parts: evaluation.measure(
            run.experiment, outputs, example_info, "test", parts
        ),
        [outputs[i] for i, _ in going],
        [parts[i] for i, _ in going],
    )
    return none | {going[k][0]: metrics for k, metrics in found.items()}
