"""Evaluation: outputs of networks on a split, and the metrics of the evaluators."""

import functools
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np

from distill_jax.core.api import TrainState
from distill_jax.core.errors import CheckpointError
from distill_jax.core.steps import teacher_view
from distill_jax.data import loader
from distill_jax.data.source import Subset
from distill_jax.evaluators._features import spread
from distill_jax.report import tables
from distill_jax.run import build as build_lib
from distill_jax.run import diagnosis, processes, watch
from distill_jax.run import workdir as workdir_lib
from distill_jax.run.arguments import located
from distill_jax.run.build import Experiment
from distill_jax.run.build.experiment import evaluation_batch
from distill_jax.run.config import ConfigDict
from distill_jax.run.train import elsewhere
from distill_jax.run.train.inputs import read_inputs
from distill_jax.run.train.result import lost_line
from distill_jax.trainer.io.checkpoint import Checkpointer
from distill_jax.trainer.io.step_index import newest_meta
from distill_jax.trainer.passes import dataset_pass


def evaluate(
    experiment: Experiment,
    state: TrainState,
    frozen: Any,
    split: str,
    *,
    rows: np.ndarray | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs every evaluator over a split, or over those of its examples that `rows` lists.

    Returns:
      `{"<split>/<metric>": value}` of scalars and arrays, and the collected outputs
      `{role: {name: [n, ...]}}` beside `label` and `index` `[n]`. Examples whose class is unknown
      are left out, unless every evaluator takes them.
    """
    gather = _known(experiment, functools.partial(predictions, experiment, state, frozen))
    outputs, example_info = gather(split, rows=rows)
    parts = collect_parts(experiment, gather, split, (outputs, example_info))
    with diagnosis.evaluating(experiment, split):
        return measure(experiment, outputs, example_info, split, parts), {
            "outputs": outputs,
            **example_info,
        }


def predictions(
    experiment: Experiment,
    state: TrainState,
    frozen: Any,
    split: str,
    *,
    rows: np.ndarray | None = None,
) -> tuple[Any, dict[str, np.ndarray]]:
    """Returns the outputs `{role: {name: [n, ...]}}` that evaluators read, and facts `[n]`."""
    frozen = build_lib.for_evaluation(experiment, frozen)
    predict = lambda batch: experiment.predict(state, frozen, batch)  # noqa: E731
    outputs, example_info = collect(experiment, predict, split, rows=rows)
    return {**outputs, **asked_outputs(experiment, split, rows=rows)}, example_info


def asked_outputs(
    experiment: Experiment, split: str, *, rows: np.ndarray | None = None
) -> dict[str, Any]:
    """Returns the outputs, which evaluators read, of functions that replace networks.

    Their inputs are transformed as in evaluation and do not depend on the step: each is called
    once.
    """
    wanted = {role for e in experiment.evaluators.values() for role in e.outputs}
    read = wanted & experiment.asked.keys()
    key = split, None if rows is None else rows.tobytes()
    if read and key not in experiment.caches.asked:
        see = jax.jit(lambda batch: teacher_view(evaluation_batch(experiment, batch, 0)))

        def ask(batch: Any) -> dict[str, Any]:
            view = jax.device_get(see(batch))
            return {role: dict(experiment.asked[role](view)) for role in read}

        experiment.caches.asked[key] = collect(experiment, ask, split, rows=rows)[0]
    return experiment.caches.asked[key] if read else {}


def collect(
    experiment: Experiment,
    predict: Callable[[Any], Any],
    split: str,
    *,
    rows: np.ndarray | None = None,
    axis: int = 0,
) -> tuple[Any, dict[str, np.ndarray]]:
    """Returns the outputs of `predict` on a split, without padding, and the facts `[n]`.

    Args:
      experiment: of the data set.
      predict: `batch -> outputs`, arrays whose axis `axis` is that of the batch.
      split: name of a part of the data.
      rows: examples of it, by default all.
      axis: of the examples in the outputs.
    """
    source = getattr(experiment.dataset, split)
    if rows is not None:
        source = Subset(source, rows, f"{len(rows)} of them")
    batches = loader.eval_batches(source, batch_size=experiment.eval_batch_size)
    return dataset_pass(predict, batches, axis=axis, on_batch=watch.alive)


def _known(experiment: Experiment, gather: Callable[..., tuple[Any, Any]]) -> Callable[..., Any]:
    """Returns `gather` without the examples whose class is unknown: they count in no metric.

    They stay where every evaluator takes them. Classes that a fault of the data hides from training
    are known, and evaluators see them.
    """
    faults = experiment.config.data.corrupt
    hidden = faults.get("labels_per_class") or faults.get("labels_percent")
    taken = all(getattr(e, "unlabelled", False) for e in experiment.evaluators.values())

    def known(split: str, *, rows: np.ndarray | None = None) -> tuple[Any, Any]:
        outputs, example_info = gather(split, rows=rows)
        labelled = example_info.get("labelled")
        if hidden or taken or labelled is None or labelled.ndim != 1 or not labelled.any():
            return outputs, example_info
        keep = np.flatnonzero(labelled > 0)
        return jax.tree.map(lambda x: x[keep], (outputs, example_info))

    return known


def collect_parts(
    experiment: Experiment,
    gather: Callable[..., tuple[Any, Any]],
    split: str,
    own: tuple[Any, Any],
) -> dict[str, tuple[Any, Any]]:
    """Collects, once for all evaluators, the outputs that they need besides the measured split.

    Args:
      experiment: whose evaluators.
      gather: `(split, rows=None) -> (outputs, facts)`.
      split: the measured split.
      own: outputs and facts of it, used if it is one of the parts.

    Returns:
      `{part: (outputs, facts)}`.
    """
    parts = {}
    for part, most in experiment.parts.items():
        n = len(getattr(experiment.dataset, part))
        rows = spread(n, most) if most is not None and most < n else None
        parts[part] = own if part == split else gather(part, rows=rows)
    return parts


def measure(
    experiment: Experiment,
    outputs: Any,
    example_info: Mapping[str, np.ndarray],
    split: str,
    parts: Mapping[str, tuple[Any, Any]] | None = None,
) -> dict[str, Any]:
    """Returns `{"<split>/<metric>": value}` of every evaluator over collected outputs."""
    metrics: dict[str, Any] = {}
    with located(experiment.config):
        for evaluator in experiment.evaluators.values():
            values = build_lib.ask(evaluator, outputs, example_info, split=split, parts=parts or {})
            metrics |= {f"{split}/{name}": value for name, value in values.items()}
    return metrics


def measure_controls(experiment: Experiment, seed: int, split: str = "test") -> dict[str, Any]:
    """Returns `{"<split>/<metric>_<control>": value}` of evaluators that have controls.

    These are measured as the networks are, but on their inputs and on networks without training,
    and depend on no state; see `api.Evaluator`.
    """
    if not experiment.controls:
        return {}
    networks = build_lib.untrained(experiment, jax.random.key(seed))
    gather = _known(
        experiment,
        functools.partial(
            collect,
            experiment,
            lambda batch: build_lib.predict_controls(experiment, networks, batch),
        ),
    )
    collected = gather(split)
    parts = collect_parts(experiment, gather, split, collected)
    metrics: dict[str, Any] = {}
    for evaluator in experiment.evaluators.values():
        for control in getattr(evaluator, "controls", ()):
            if not set(evaluator.outputs) & set(experiment.controls.get(control, {})):
                continue
            measured = build_lib.ask(
                evaluator,
                collected[0][control],
                collected[1],
                split=split,
                parts={name: (part[0][control], part[1]) for name, part in parts.items()},
            )
            metrics |= {f"{split}/{name}_{control}": value for name, value in measured.items()}
    return metrics


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(v) for name, v in metrics.items() if np.ndim(v) == 0}


def evaluate_run(
    config: ConfigDict,
    workdir: pathlib.Path,
    *,
    make_experiment: Callable[[ConfigDict], Experiment] = build_lib.build,
    changes: Collection[str] = (),
) -> str:
    """Evaluates the last and the best checkpoint of a run; returns a table.

    Also written to a file of the folder, by step and metric: `eval.json`, or with other data or
    evaluators one of its own, see `elsewhere.write`.

    Next to a run that is training, this only reads.

    Args:
      config: of the run.
      workdir: the run folder.
      make_experiment: how the experiment is built. For a config that was read from the folder, pass
        the trusted names to `build`.
      changes: keys in which the config may differ from that of the run, see
        `workdir.changes.EVALUATION`.

    Raises:
      CheckpointError: the folder holds no undamaged checkpoint.
      ConfigError: the config, the data or a network differs from the run's, or other data do not
        fit its networks.
    """
    if not workdir_lib.is_run(workdir):
        raise CheckpointError(
            "holds no finished checkpoint", where=str(workdir), hint="train it first"
        )
    found = processes.from_first(
        lambda: workdir_lib.check_config(config, workdir, allowed=changes), where=str(workdir)
    )
    of_run = elsewhere.with_data_of_run(config, workdir) if elsewhere.has_other(found) else config
    experiment = make_experiment(of_run)
    meta = processes.from_first(lambda: newest_meta(workdir / "checkpoints"), where=str(workdir))
    if meta is not None:
        workdir_lib.check_inputs(meta.get("inputs"), read_inputs(experiment, of_run), workdir)
    own = experiment.dataset
    if elsewhere.has_other(found):
        experiment = elsewhere.on_data_of(config, experiment)
    by_state, warnings = _measure_states(experiment, config, workdir)
    table = tables.metrics(by_state, chosen_by=config.eval.metric or "")
    if not found:
        workdir_lib.write_json(workdir / "eval.json", by_state)
        return "\n".join([table, *warnings])
    path = elsewhere.write(workdir, experiment, found, by_state)
    lines = workdir_lib.changes.spell(found)
    if elsewhere.has_other(found) and elsewhere.same_parts(own, experiment.dataset):
        warnings.append("warning: the held-out and test parts are those of the run, by checksum")
    return "\n".join(["measured with:", *(f"  {x}" for x in lines), table, *warnings, str(path)])


def _measure_states(
    experiment: Experiment, config: ConfigDict, workdir: pathlib.Path
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Returns the metrics of the last and of the best state, and warnings."""
    checkpointer = Checkpointer(
        workdir / "checkpoints",
        mode=config.eval.mode,
        read_only=True,
        rescue=workdir_lib.RESCUE,
    )
    frozen = build_lib.frozen_networks(experiment, config)
    by_state: dict[str, dict[str, float]] = {}
    warnings: dict[str, None] = {}
    best: float | None = None
    for name in ("last", "best"):
        if name == "best" and checkpointer.best() is None:
            continue
        restored = _read(checkpointer, experiment, best=name == "best")
        if restored is None:
            raise CheckpointError(
                "holds no finished checkpoint", where=str(workdir), hint="train it first"
            )
        warnings |= dict.fromkeys(f"warning: damaged checkpoint: {x}" for x in restored.skipped)
        if name == "best":
            best = restored.meta.get("metric")
        metrics: dict[str, float] = {"step": restored.meta["step"]}
        if by_state.get("last", {}).get("step") == metrics["step"]:  # the same state
            by_state[name] = by_state["last"]
            continue
        for split in ("held_out", "test"):
            if len(getattr(experiment.dataset, split)):
                metrics |= scalars(evaluate(experiment, restored.state, frozen, split)[0])
        by_state[name] = metrics
    if len(experiment.dataset.test):
        controls = scalars(measure_controls(experiment, config.seed))
        by_state = {name: metrics | controls for name, metrics in by_state.items()}
    checkpointer.close()
    if config.eval.metric:
        warnings |= dict.fromkeys(lost_line(checkpointer.lost(best)))
    return by_state, list(warnings)


def _read(checkpointer: Checkpointer, experiment: Experiment, *, best: bool) -> Any:
    """Restores the best or the newest step, again where a run that trains has deleted it."""
    for _ in range(3):
        before = checkpointer.steps()
        try:
            step = checkpointer.best() if best else None
            return checkpointer.restore(experiment.abstract_state, step=step)
        except CheckpointError:
            if processes.count() > 1 or checkpointer.steps() == before:
                raise
    return checkpointer.restore(experiment.abstract_state)
