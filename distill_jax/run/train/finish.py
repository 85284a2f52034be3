"""Measuring and ending runs: one run, or several side by side."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distill_jax.core.api import TrainState
from distill_jax.core.errors import NonFiniteError
from distill_jax.run import watch
from distill_jax.run.train import artifacts, evaluation, hooks, result
from distill_jax.run.train.program import Program
from distill_jax.run.train.run import Run
from distill_jax.run.train.stepping import Stepper


class Group:
    """The runs of a program. One that diverges ends there, and the others go on.

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
        results = {}
        for i, run in self.going:
            try:
                results[i] = do(run, *(values[i] for values in by_run), **shared)
            except NonFiniteError as error:
                run.error = error
        return results


def evaluate(
    group: Group, program: Program, state: TrainState, step: int, split: str
) -> dict[int, dict[str, Any]]:
    """Measures a split, which may be empty, and logs it; returns the metrics of each run."""
    if len(getattr(group.runs[0].experiment.dataset, split)) == 0:
        group.each(lambda run: run.write_measured(step, {}))
        return {i: {} for i, _ in group.going}
    with watch.during("evaluation", f"evaluation of {split}"):
        outputs, example_info, parts = collect(group, program, state, split)
        return group.each(
            hooks.measure, outputs, parts, example_info=example_info, step=step, split=split
        )


def collect(
    group: Group, program: Program, state: TrainState, split: str
) -> tuple[list[Any], Any, list[dict[str, tuple[Any, Any]]]]:
    """Returns the outputs of each run on a split, facts, and the parts that evaluators need."""

    def gather(split, rows=None):
        return program.collect(state, split, rows)

    outputs, example_info = gather(split)
    by_part = evaluation.collect_parts(
        group.runs[0].experiment, gather, split, (outputs, example_info)
    )
    parts = [
        {name: (part[0][i], part[1]) for name, part in by_part.items()} for i in range(len(outputs))
    ]
    return outputs, example_info, parts


def finish(
    group: Group, program: Program, stepper: Stepper, state: TrainState
) -> list[dict[str, Any] | NonFiniteError]:
    """Measures the last and the best states on the test split and writes the results.

    Returns:
      The result of each run, or the error with which it diverged.
    """
    experiment, config = group.runs[0].experiment, group.runs[0].config
    with watch.during("checkpoint"):
        best = group.each(lambda run: run.best())
    if group.going and len(experiment.dataset.test):
        evaluate(group, program, state, experiment.total_steps, "test")
    if group.going and artifacts.has_example_weights(experiment):
        rows = artifacts.example_weight_rows(experiment)
        outputs, example_info = program.collect(state, "train", rows)
        for i, run in group.going:
            artifacts.write_example_weights(run, rows, outputs[i]["example_weights"], example_info)
    if group.going:
        with watch.during("evaluation", "pictures"):
            program.draw(state)
    measured = measure_earlier(group, program, state, best)
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
    results = group.each(lambda run, metrics: run.finish(metrics, compute), chosen)
    return [results[i] if run.error is None else run.error for i, run in enumerate(group.runs)]


def measure_earlier(
    group: Group, program: Program, state: TrainState, best: Mapping[int, Mapping[str, Any] | None]
) -> dict[int, dict[str, Any]]:
    """Measures, on the test split, the best states that are not the last; by run."""
    experiment = group.runs[0].experiment
    none: dict[int, dict[str, Any]] = {i: {} for i, _ in enumerate(group.runs)}
    earlier = {
        i: measured["step"]
        for i, measured in best.items()
        if measured is not None and measured["step"] != experiment.total_steps
    }
    if not len(experiment.dataset.test) or not any(i in earlier for i, _ in group.going):
        return none
    states = program.split(state)
    for i, run in group.going:
        if i in earlier:
            restored = run.checkpointer.restore(run.experiment.abstract_state, step=earlier[i])
            assert restored is not None
            states[i] = restored.state
    with watch.during("evaluation", "evaluation of the best state"):
        outputs, example_info, parts = collect(group, program, program.join(states), "test")
    going = [(i, run) for i, run in group.going if i in earlier]
    own = Group([run for _, run in going])  # an error ends the run, not its fellows
    measured = own.each(
        lambda run, outputs, parts: evaluation.measure(
            run.experiment, outputs, example_info, "test", parts
        ),
        [outputs[i] for i, _ in going],
        [parts[i] for i, _ in going],
    )
    return none | {going[k][0]: metrics for k, metrics in measured.items()}
