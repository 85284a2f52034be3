"""What is done between the steps of a run. Runs side by side share these functions."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from distill_jax.core.api import TrainState
from distill_jax.run import alarms, choices, diagnosis, watch
from distill_jax.run.environment import Paused, Preempted
from distill_jax.run.train import artifacts, evaluation
from distill_jax.run.train.run import Run
from distill_jax.run.train.stepping import Rows


def read(
    run: Run, rows: Rows, *, step: int, stalls: Sequence[alarms.Alarm], seconds: float
) -> dict[str, float]:
    """Returns the means of the metrics since the last event.

    Args:
      run: the run.
      rows: metrics `[m]` of the steps since the last call.
      step: the last of them.
      stalls: stalls since the last call.
      seconds: time since the first step began.

    Raises:
      NonFiniteError: one of them is not finite.
    """
    run.training_seconds = seconds
    means = run.read(rows, step)
    for stall in stalls:
        run.alarms.add(stall)
    return means


def log(run: Run, means: Mapping[str, float], *, step: int) -> None:
    """Writes the means of the training metrics."""
    with watch.during("other", "the log"):
        run.write_means(step, means)


def measure(
    run: Run,
    outputs: Any,
    parts: Mapping[str, tuple[Any, Any]],
    *,
    example_info: Mapping[str, Any],
    step: int,
    split: str,
) -> dict[str, Any]:
    """Measures collected outputs of a split, logs and stores the metrics, and returns them."""
    with diagnosis.evaluating(run.experiment, split):
        metrics = evaluation.measure(run.experiment, outputs, example_info, split, parts)
    if split == "test":
        run.controls = evaluation.measure_controls(run.experiment, run.config.seed)
        metrics |= run.controls
    if split == "held_out" and "held_out/right" in metrics:
        run.right = choices.packed(metrics["held_out/right"], example_info["index"])
    run.write_measured(step, metrics)
    if split == "test" and jax.process_index() == 0:
        artifacts.write_predictions(run, outputs, example_info)
        artifacts.write_embeddings(run, outputs, example_info, metrics)
    return metrics


def save(run: Run, state: TrainState, measured: Mapping[str, Any] | None) -> None:
    """Saves a state with its measurements."""
    with watch.during("checkpoint", "saving"):
        run.save(state, measured)


def stop(runs: Sequence[Run], step: int, *, planned: bool = False) -> None:
    """Ends runs whose states are saved.

    Args:
      runs: of the same step.
      step: that was reached.
      planned: whether the command line names it, in place of a signal.

    Raises:
      Preempted: always.
    """
    for run in runs:
        run.checkpointer.wait()
    total = runs[0].experiment.total_steps
    kind = Paused if planned else Preempted
    raise kind(f"stopped at step {step} of {total}; the state is saved")


def chosen(
    run: Run, best: Mapping[str, Any] | None, measured: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Returns the entry of a result for the best state: its step and all its metrics.

    Args:
      run: the run.
      best: from `Run.best`.
      measured: metrics of the test split, if there is one and the best state is not the last.
    """
    if best is None:
        return {}
    metrics = {"step": best["step"], **best["metrics"]}
    if best["step"] == run.experiment.total_steps:
        return metrics | {k: v for k, v in run.latest.items() if k.startswith("test/")}
    return metrics | evaluation.scalars({**measured, **run.controls}) if measured else metrics
