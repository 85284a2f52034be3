"""The loop: batch, step, log, evaluate, save, in a fixed order."""

import collections
import contextlib
import functools
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from distill_jax.core import collapse
from distill_jax.core.api import TrainState
from distill_jax.core.errors import CheckpointError, NonFiniteError
from distill_jax.core.partition import named_leaves
from distill_jax.data import loader
from distill_jax.data.source import Subset
from distill_jax.evaluators._features import spread
from distill_jax.run import (
    alarms,
    crash,
    diagnosis,
    embeddings,
    environment,
    masked,
    paths,
    preflight,
    processes,
    speed,
    tables,
    watch,
    writers,
)
from distill_jax.run import build as build_lib
from distill_jax.run import config as config_lib
from distill_jax.run import workdir as workdir_lib
from distill_jax.run.checkpoint import Checkpointer, network_checksum
from distill_jax.run.config import ConfigDict
from distill_jax.run.environment import Preempted
from distill_jax.run.sharing import scrubbed
from distill_jax.trainer.passes import dataset_pass

IN_FLIGHT = 8
"""After this many steps the loop waits for the first of them: the device never idles, and the rate
shown and the answer to a signal are at most so many steps off."""

SKIPPED_IN_A_ROW = 100
"""After so many steps in a row that were skipped for not being finite, a run is given up."""

EXAMPLES = 64
"""How many test inputs are stored with their predictions, for the report to show."""

TRUST_EXAMPLES, EXTREMES = 10_000, 12
"""How many training examples are stored with their weights, and images of the extreme ones."""


def evaluate(
    experiment: build_lib.Experiment,
    state: TrainState,
    frozen: Any,
    split: str,
    *,
    rows: np.ndarray | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs every evaluator over a split, or over those of its examples that `rows` lists.

    Returns:
      `{"<split>/<metric>": value}` of scalars and arrays, and the collected outputs
      `{role: {name: [n, ...]}}` beside `label` and `index` `[n]`.
    """
    gather = functools.partial(predictions, experiment, state, frozen)
    outputs, facts = gather(split, rows=rows)
    parts = collect_parts(experiment, gather, split, (outputs, facts))
    with diagnosis.evaluating(experiment, split):
        return measure(experiment, outputs, facts, split, parts), {"outputs": outputs, **facts}


def predictions(
    experiment: build_lib.Experiment,
    state: TrainState,
    frozen: Any,
    split: str,
    *,
    rows: np.ndarray | None = None,
) -> tuple[Any, dict[str, np.ndarray]]:
    """Returns the outputs `{role: {name: [n, ...]}}` that evaluators read, and facts `[n]`."""
    frozen = experiment.for_evaluation(frozen)
    predict = lambda batch: experiment.predict(state, frozen, batch)  # noqa: E731
    return collect(experiment, predict, split, rows=rows)


def collect(
    experiment: build_lib.Experiment,
    predict: Callable[[Any], Any],
    split: str,
    *,
    rows: np.ndarray | None = None,
    axis: int = 0,
) -> tuple[Any, dict[str, np.ndarray]]:
    """Returns what `predict` says of a split, padding removed, and the facts `[n]` beside it.

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


def collect_parts(
    experiment: build_lib.Experiment,
    gather: Callable[..., tuple[Any, Any]],
    split: str,
    found: tuple[Any, Any],
) -> dict[str, tuple[Any, Any]]:
    """Collects, once for all evaluators, what they need beside the split that is measured.

    Args:
      experiment: whose evaluators.
      gather: `(split, rows=None) -> (outputs, facts)`.
      split: what is measured.
      found: of it, where it is among the parts itself.

    Returns:
      `{part: (outputs, facts)}`.
    """
    parts = {}
    for part, most in experiment.parts.items():
        n = len(getattr(experiment.dataset, part))
        rows = spread(n, most) if most is not None and most < n else None
        parts[part] = found if part == split else gather(part, rows=rows)
    return parts


def measure(
    experiment: build_lib.Experiment,
    outputs: Any,
    facts: Mapping[str, np.ndarray],
    split: str,
    parts: Mapping[str, tuple[Any, Any]] | None = None,
) -> dict[str, Any]:
    """Returns `{"<split>/<metric>": value}` of every evaluator over collected outputs."""
    metrics: dict[str, Any] = {}
    for evaluator in experiment.evaluators.values():
        found = build_lib.ask(evaluator, outputs, facts, split=split, parts=parts or {})
        metrics |= {f"{split}/{name}": value for name, value in found.items()}
    return metrics


def measure_controls(
    experiment: build_lib.Experiment, seed: int, split: str = "test"
) -> dict[str, Any]:
    """Returns `{"<split>/<metric>_<control>": value}` of evaluators that have controls.

    These are measured as the networks are, but on their inputs and on networks without training,
    and depend on no state; see `api.Evaluator`.
    """
    if not experiment.controls:
        return {}
    networks = experiment.untrained(jax.random.key(seed))
    gather = functools.partial(
        collect, experiment, lambda batch: experiment.predict_controls(networks, batch)
    )
    found = gather(split)
    parts = collect_parts(experiment, gather, split, found)
    metrics: dict[str, Any] = {}
    for evaluator in experiment.evaluators.values():
        for control in getattr(evaluator, "controls", ()):
            if not set(evaluator.outputs) & set(experiment.controls.get(control, {})):
                continue
            measured = build_lib.ask(
                evaluator,
                found[0][control],
                found[1],
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
    make_experiment: Callable[[ConfigDict], build_lib.Experiment] = build_lib.build,
) -> str:
    """Evaluates the last and the best checkpoint of a run; returns a table.

    Also written to `eval.json` in the folder, by step and metric.

    Beside a run that trains it reads, and takes part in nothing else.

    Args:
      config: of the run.
      workdir: the run folder.
      make_experiment: how the experiment is built. Of a config that was read from the folder,
        `build` must be told what is trusted.

    Raises:
      CheckpointError: the folder holds no undamaged checkpoint.
      ConfigError: the config, the data or a network differs from the run's.
    """
    if not workdir_lib.is_run(workdir):
        raise CheckpointError(
            "holds no finished checkpoint", where=str(workdir), hint="train it first"
        )
    workdir_lib.check_config(config, workdir)
    experiment = make_experiment(config)
    meta = processes.from_first(
        lambda: workdir_lib.newest_meta(workdir / "checkpoints"), where=str(workdir)
    )
    if meta is not None:
        workdir_lib.check_inputs(meta.get("inputs"), read_inputs(experiment, config), workdir)
    checkpointer = Checkpointer(workdir / "checkpoints", mode=config.eval.mode, read_only=True)
    frozen = experiment.frozen_networks(config)
    found: dict[str, dict[str, float]] = {}
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
        for split in ("held_out", "test"):
            if len(getattr(experiment.dataset, split)):
                metrics |= scalars(evaluate(experiment, restored.state, frozen, split)[0])
        found[name] = metrics
    if len(experiment.dataset.test):
        controls = scalars(measure_controls(experiment, config.seed))
        found = {name: metrics | controls for name, metrics in found.items()}
    checkpointer.close()
    if config.eval.metric:
        warnings |= dict.fromkeys(_lost_line(checkpointer.lost(best)))
    workdir_lib.write_json(workdir / "eval.json", found)
    table = tables.metrics(found, chosen_by=config.eval.metric or "")
    return "\n".join([table, *warnings])


def _read(checkpointer: Checkpointer, experiment: build_lib.Experiment, *, best: bool) -> Any:
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


def _lost_line(lost: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the warning that better states than the chosen one were lost, if any."""
    if not lost:
        return []
    steps = ", ".join(str(row["step"]) for row in lost)
    return [f"warning: the checkpoint of step {steps}, lost since, may have been the best"]


def read_inputs(experiment: build_lib.Experiment, config: ConfigDict) -> dict[str, Any]:
    """Returns checksums of the data and of the networks that a run starts from.

    `{"data": see workdir.data_checksums, "networks": {role: checksum}}`; a network that is gone,
    which a run that goes on may not need, has None.
    """

    def networks() -> dict[str, str | None]:
        found = {}
        for role, spec in config.roles.items():
            if spec.init:
                where = f"roles.{role}.init"
                path, source, _ = paths.parse_origin(spec.init, where=where)
                found[role] = network_checksum(path, role=source, where=where)
        return found

    return {
        "data": workdir_lib.data_checksums(experiment.dataset),
        "networks": processes.from_first(networks, where="roles"),
    }


def format_result(result: Mapping[str, Any]) -> str:
    """Formats the metrics of a finished run: the last state, and the best by held-out metric."""
    states = {"last": {"step": result["steps"], **result["metrics"]}, "best": result["best"]}
    lines = [tables.metrics(states, chosen_by=result.get("chosen_by") or "")]
    lines += _lost_line(result.get("selection_lost", ()))
    if result.get("skipped"):
        lines.append(f"{result['skipped']} steps were skipped: their loss was not finite")
    lines += [alarms.spell(alarm) for alarm in result.get("alarms", ())]
    if speed_line := speed.line(result.get("compute", {})):
        lines.append(speed_line)
    return "\n".join(lines)


class Clock:
    """Wall time by phase, in seconds, from the start of the process for its first run."""

    def __init__(self):
        self.phases: dict[str, float] = {"import": environment.startup_seconds()}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self._last
        self._last = now


def train(
    config: ConfigDict,
    workdir: pathlib.Path,
    *,
    arm: str = "",
    reported: str = "",
    make_experiment: Callable[[ConfigDict], build_lib.Experiment] = build_lib.build,
    start_over: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains, or continues, the run in a folder, and returns its result.

    Args:
      config: a config that passes `config.validate`.
      workdir: the run folder.
      arm: name of the run in a study, for titles.
      reported: the metric that a study compares, checked before the first step.
      make_experiment: how the experiment is built; a study passes a cached builder.
      start_over: whether what the folder holds of an earlier run is set aside.
      say: prints a line.

    Raises:
      UserError: the config, the data or a checkpoint does not fit, the folder is not this
        program's or another process writes to it, or a loss became NaN.
      Preempted: a signal asked the run to stop; its state is saved, where it had begun.
    """
    clock = Clock()
    with workdir_lib.claim(workdir, "run", start_over=start_over, say=say):
        processes.from_first(lambda: workdir_lib.check_config(config, workdir), where=str(workdir))
        finished = processes.from_first(
            lambda: workdir_lib.read_result(workdir, say=say), where=str(workdir)
        )
        if finished is not None:
            say(f"{workdir} is finished; its result is read from result.json")
            return finished
        processes.stop_if_asked("before the run began")
        experiment = make_experiment(config)
        if not workdir_lib.is_run(workdir):  # one that goes on was looked at before
            preflight.warn(experiment, say, alone=not arm)
        run = Run(config, workdir, experiment, arm=arm, reported=reported, say=say)
        with environment.stop_on_signal() as stop:
            [outcome] = Loop([run], Alone(run), clock, say).run(stop)
        if isinstance(outcome, NonFiniteError) and not arm:
            raise workdir_lib.explain_divergence(outcome, workdir)
    if isinstance(outcome, NonFiniteError):
        raise outcome  # out of the claim: a study keeps the log of a run that diverged
    return outcome


class Run:
    """One run folder: what is logged, kept and reported of it.

    Args:
      config: of the run.
      workdir: its folder, which is made.
      experiment: what is run.
      arm: its name in a study.
      reported: the metric that a study compares.
      share: the part of the time of a step that is its own, where runs go side by side.
      say: prints a line.

    Attributes:
      error: why the run ended before its time.

    Raises:
      ConfigError: the folder holds another run, or nothing measures a metric that is chosen by.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: pathlib.Path,
        experiment: build_lib.Experiment,
        *,
        arm: str,
        reported: str,
        share: float = 1.0,
        say: Callable[[str], None],
    ):
        processes.from_first(lambda: workdir_lib.check_config(config, workdir), where=str(workdir))
        self.inputs = read_inputs(experiment, config)
        self.environment = environment.describe_environment()
        if config.eval.metric:
            build_lib.check_metric(experiment, config.eval.metric, where="eval.metric")
        if reported:
            build_lib.check_metric(experiment, reported, where="study.metric")
        self._check_inputs(workdir)
        self.config, self.workdir, self.experiment = config, workdir, experiment
        self.arm, self.share, self.say = arm, share, say
        # Side by side, one run may be a checkpoint ahead of another when the process dies.
        keep = config.checkpoint.keep if share == 1 else max(2, config.checkpoint.keep)
        folder = workdir / "checkpoints"
        self.checkpointer = Checkpointer(folder, keep=keep, mode=config.eval.mode)
        self.error: NonFiniteError | None = None
        self.log: Any = None
        self.latest: dict[str, float] = {}
        # Metrics of the steps since the last event, where a stop comes between two.
        self.unlogged: list[tuple[str, np.ndarray]] = []
        self.first_spread: dict[str, float] = {}  # what others are compared with
        self.last_losses: collections.deque[float] = collections.deque(maxlen=diagnosis.KEPT)
        self.skipped = self._skipped_in_a_row = 0
        self.alarms: Any = None
        self.controls: dict[str, Any] = {}
        self.spectra: dict[int, np.ndarray] = {}
        self.earlier_seconds = 0.0
        self.training_seconds = 0.0

    def _check_inputs(self, workdir: pathlib.Path) -> None:
        read = lambda: workdir_lib.newest_meta(workdir / "checkpoints")  # noqa: E731
        meta = processes.from_first(read, where=str(workdir))
        if meta is not None:
            workdir_lib.check_inputs(meta.get("inputs"), self.inputs, workdir)

    def _tell_changes(self, meta: Mapping[str, Any]) -> None:
        """Warns of an environment that differs from that of the start before."""
        before = meta.get("environment")
        if before is None:  # a checkpoint of version 0.1
            before = workdir_lib.arithmetic(workdir_lib.peek(self.workdir / "env.json") or {})
        now = workdir_lib.arithmetic(self.environment)
        changes = workdir_lib.environment_changes(before, now)
        if changes:
            self.say(
                f"warning: the run goes on in another environment, which may change the last bits "
                f"of its numbers: {', '.join(changes)}"
            )

    def restore(self, step: int | None = None) -> tuple[TrainState, int] | None:
        """Returns a saved state and its step, by default the newest; None where there is none."""
        restored = self.checkpointer.restore(self.experiment.abstract_state, step=step)
        if restored is None:
            return None
        for skipped in restored.skipped:
            self.say(f"damaged checkpoint set aside: {skipped}")
        self._tell_changes(restored.meta)
        self.earlier_seconds = restored.meta.get("seconds", 0.0)
        self.skipped = restored.meta.get("skipped", 0)
        self.latest = dict(restored.meta.get("metrics", {}))
        self.first_spread = dict(restored.meta.get("first_spread", {}))
        rows = ((v, np.asarray(x)) for v, x in restored.meta.get("unlogged", ()))
        # Those of another `log.grad_norm` have other metrics.
        length = lambda variant: len(self.experiment.metric_names(variant))  # noqa: E731
        self.unlogged = [(v, x) for v, x in rows if len(x) == length(v)]
        return restored.state, restored.meta["step"]

    def begin(self, key: Any, frozen: Any) -> TrainState:
        """Returns the state before the first step."""
        state = self.experiment.initial_state(key, self.config)
        state = self.experiment.with_class_means(state, frozen)
        return self.experiment.with_survey(state, frozen, self.config.seed)

    def open(self, step: int) -> None:
        """Opens the log at the step from which the run goes on."""
        if processes.is_main():
            self.workdir.mkdir(parents=True, exist_ok=True)
            shared = scrubbed(self.environment, self.workdir)
            workdir_lib.describe(self.config, self.workdir, shared, step)
        self.log = writers.make_writer(
            self.workdir,
            resume_step=step,
            tensorboard=self.config.log.tensorboard,
            is_main=jax.process_index() == 0,
            say=self.say,
        )
        self.alarms = alarms.Alarms(
            self.workdir if jax.process_index() == 0 else None,
            alarms.default_rules(spike_deviations=self.config.watch.spike),
            resume_step=step,
            say=self.say,
        )

    def close(self, kind: type[BaseException] | None = None, *_: Any) -> None:
        """Lets go of files and threads; called as `__exit__` is."""
        try:
            if self.log is not None:
                self.log.close()
        finally:
            self.checkpointer.close(failed=kind not in (None, Preempted))

    @property
    def seconds(self) -> float:
        return self.earlier_seconds + self.training_seconds * self.share

    def read(self, pending: list[tuple[str, np.ndarray]], step: int) -> dict[str, float]:
        """Averages the metrics since the last event; refuses what is not finite."""
        new = len(pending)
        self.unlogged = pending = [*self.unlogged, *pending]
        found: dict[str, list[float]] = {}
        for i, (variant, values) in enumerate(pending):
            row = dict(zip(self.experiment.metric_names(variant), values, strict=True))
            skipped = int(row.pop("skipped", 0))
            if "skipped" in self.experiment.metric_names(variant):
                found.setdefault("skipped", []).append(skipped)
            if skipped:
                if i >= len(pending) - new:
                    self._skip(step - len(pending) + i + 1)
                continue
            self._skipped_in_a_row = 0
            gradient = row.pop("nonfinite", 0) > 0
            bad = [name for name, value in row.items() if not np.isfinite(value)]
            bad = [name for name in bad if name != "loss"] or bad
            if bad or gradient:
                what = f"{', '.join(bad)} is {row[bad[0]]}" if bad else "the gradient is not finite"
                at = step - len(pending) + i + 1
                what += f" at step {at}" + ("" if bad else f", where the loss is {row['loss']:.4g}")
                raise self._nonfinite(what, at, float(row["loss"]))
            self.last_losses.append(float(row["loss"]))
            count, every = step - len(pending) + i + 1, self.config.log.every_steps
            spread = {name: row.pop(name) for name in [*row] if name.startswith(collapse.PREFIX)}
            if spread and collapse.due(count - 1, every):
                if count == 1:
                    self.first_spread = {f"train/{n}": float(x) for n, x in spread.items()}
                else:
                    found |= {name: [float(value)] for name, value in spread.items()}
            for name, value in row.items():
                found.setdefault(name, []).append(float(value))
        means = {name: float(np.mean(values)) for name, values in found.items()}
        return means | ({"skipped": float(sum(found["skipped"]))} if "skipped" in found else {})

    def _skip(self, step: int) -> None:
        """Counts a step that changed nothing; gives up where nothing else happens."""
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row == 1:
            self.say(f"step {step} is skipped: its loss or gradient is not finite")
        if self._skipped_in_a_row >= SKIPPED_IN_A_ROW:
            raise self._nonfinite(
                f"{SKIPPED_IN_A_ROW} steps in a row, the last of them step {step}, were skipped: "
                "loss or gradient not finite",
                step,
            )

    def _nonfinite(
        self, what: str, step: int, loss: float = float("nan"), *, updated: bool = False
    ) -> NonFiniteError:
        """Returns the error with its cause, of the step of that number from 1, see `diagnosis`."""
        self.checkpointer.wait()
        return diagnosis.of_step(
            self.experiment,
            self.config,
            step=step,
            updates=step if updated else step - 1,
            what=what,
            loss=loss,
            losses=list(self.last_losses),
            saved=self.checkpointer.steps(),
            where=str(self.workdir),
        )

    def epoch(self, step: int) -> float:
        return round(step / self.experiment.steps_per_epoch, 4)

    def write_means(self, step: int, means: Mapping[str, float]) -> None:
        """Logs the training metrics since the last event."""
        if self.first_spread:
            self.log.write(1, {"epoch": self.epoch(1), **self.first_spread})
            self.alarms.see(1, self.first_spread)
            self.first_spread = {}
        last = max(step - 1 - self.skipped, 0)  # a skipped step does not move the schedule
        facts = {
            "epoch": self.epoch(step),
            "seconds": round(self.seconds, 3),
            "train/lr": float(np.asarray(self.experiment.schedule(last))),
        }
        found = {f"train/{name}": value for name, value in means.items()}
        self.log.write(step, facts | found)
        self.alarms.see(step, found)

    def write_measured(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Logs what was measured on a split."""
        self.latest |= scalars(metrics)
        if "held_out/spectrum" in metrics:
            self.spectra[step] = metrics["held_out/spectrum"]
        self.log.write(step, {"epoch": self.epoch(step), **scalars(metrics)})
        self.alarms.see(step, scalars(metrics))

    def improves(self, measured: Mapping[str, Any] | None) -> bool:
        """Says whether a state is better than all that were saved."""
        if not measured or not self.config.eval.metric:
            return False
        best = self.best()
        if best is None:
            return True
        sign = 1.0 if self.config.eval.mode == "max" else -1.0
        return sign * float(measured[self.config.eval.metric]) > sign * best["metric"]

    def best(self) -> dict[str, Any] | None:
        """Returns step, metric and measurements of the best state that was saved, if any."""
        self.checkpointer.wait()

        def find() -> dict[str, Any] | None:
            if (step := self.checkpointer.best()) is None:
                return None
            meta = self.checkpointer.meta(step)
            return {name: meta[name] for name in ("step", "metric", "metrics")}

        return processes.from_first(find, where=str(self.workdir))

    def save(self, state: TrainState, measured: Mapping[str, Any] | None) -> None:
        """Saves a state, unless it is not finite."""
        workdir_lib.check_held(self.workdir)
        if not self.experiment.is_finite(state.params):
            step = int(state.step)
            raise self._nonfinite(
                f"parameters are not finite after step {step}, which is not saved",
                step,
                updated=True,
            )
        chosen = self.config.eval.metric
        metric = float(measured[chosen]) if measured and chosen else None
        meta = {
            "config": json.loads(config_lib.to_json(self.config)),
            "inputs": self.inputs,
            "signature": self.experiment.signature,
            "environment": workdir_lib.arithmetic(self.environment),
            "seconds": self.seconds,
            "skipped": self.skipped,
            "metrics": scalars(measured or {}),
            "unlogged": [(variant, values.tolist()) for variant, values in self.unlogged],
            "first_spread": self.first_spread,
        }
        self.checkpointer.save(state, meta, metric=metric)

    def finish(self, best: Mapping[str, Any], compute: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the result: the last measurements, and what is known of the best state."""
        experiment, total = self.experiment, self.experiment.total_steps
        result = {
            "status": "done",
            "arm": self.arm,
            "seed": self.config.seed,
            "steps": total,
            "classes": list(experiment.dataset.classes),
            "metrics": self.latest,
            "best": best,
            "chosen_by": self.config.eval.metric,
            "provenance": {
                split: getattr(experiment.dataset, split).provenance._asdict()
                for split in ("train", "held_out", "test")
            },
            "data": {
                "scanned": experiment.data.scanned,
                "in_training": {
                    name: {"repeated": found.repeated, "of": found.of, "text": found.spell(name)}
                    for name, found in experiment.overlaps.items()
                    if found.repeated
                },
            },
            "parameters": {
                role: sum(int(np.prod(x.shape)) for x in named_leaves(found.params).values())
                for role, found in experiment.shapes.roles.items()
            },
            "alarms": [alarm._asdict() for alarm in self.alarms.found],
            "skipped": self.skipped,
            "inputs": self.inputs,
            "compute": {"seconds": round(self.seconds, 3), **compute},
        }
        lost = processes.from_first(
            lambda: self.checkpointer.lost(best.get(self.config.eval.metric)),
            where=str(self.workdir),
        )
        if lost and self.config.eval.metric:
            result["selection_lost"] = lost
        workdir_lib.check_held(self.workdir)
        workdir_lib.write_result(self.workdir, scrubbed(result, self.workdir))
        return result


class Program(Protocol):
    """What the loop calls to compute: for one run, or for several that go side by side.

    Every array has a leading axis of runs where there are several.
    """

    def start(self) -> tuple[TrainState, int]:
        """Returns the state to go on from, and its step."""
        ...

    def compile(self, step: int) -> None:
        """Compiles what is needed from `step` on."""
        ...

    def __call__(self, state: TrainState, step: int) -> tuple[TrainState, tuple[str, Any]]:
        """Takes a step; returns the new state, the step's name and its metrics `[(r,) m]`."""
        ...

    def collect(
        self, state: TrainState, split: str, rows: np.ndarray | None = None
    ) -> tuple[list[Any], dict[str, np.ndarray]]:
        """Returns the outputs of each run on a split, and the facts beside them, see `collect`."""
        ...

    def split(self, state: TrainState) -> list[TrainState]:
        """Returns the state of each run."""
        ...

    def join(self, states: list[TrainState]) -> TrainState:
        """Undoes `split`."""
        ...

    @property
    def flops_per_step(self) -> float | None:
        """Floating-point operations of a step of one run over all its devices."""
        ...

    def close(self) -> None:
        """Lets go of threads."""
        ...


class Alone:
    """A run by itself, its batch split over all devices (`Program`)."""

    def __init__(self, run: Run):
        self.run, self.experiment = run, run.experiment

    def start(self) -> tuple[TrainState, int]:
        replicated = build_lib.partition.replicated(self.experiment.mesh)
        # As an array of numbers, which unlike a key can be put on the devices of other processes.
        numbers = np.asarray(jax.random.key_data(jax.random.key(self.run.config.seed)))
        self.key = jax.random.wrap_key_data(jax.device_put(numbers, replicated))
        self.frozen = self.experiment.frozen_networks(self.run.config)
        self.online = self.experiment.online(self.frozen)
        self._compiling = None
        if self.experiment.resident and not self.experiment.cached:
            # Known before the state is: what steps take, whichever is the first.
            self.feed = build_lib.Feed(self.experiment, seed=self.run.config.seed, start=0)
            self._compiling = environment.in_background(lambda: self._compile(0))
        if (found := self.run.restore()) is not None:
            self.run.say(f"continuing from step {found[1]}")
            return found
        return self.run.begin(self.key, self.frozen), 0

    def compile(self, step: int) -> None:
        if self._compiling is not None:
            self.update = self._compiling()
            return
        experiment, config = self.experiment, self.run.config
        answers = experiment.stored_answers(config, self.frozen, self.run.say)
        self.feed = build_lib.Feed(experiment, seed=config.seed, start=step, answers=answers)
        self.update = self._compile(step)

    def _compile(self, step: int) -> dict[str, Callable]:
        compile_step = self.experiment.compile_step
        return {v: compile_step(self.feed(step, v), v) for v in self.experiment.variants}

    def __call__(self, state: TrainState, step: int) -> tuple[TrainState, tuple[str, Any]]:
        variant = self.experiment.variant(step)
        watch.enter("data")
        fed = self.feed(step, variant)
        watch.enter("dispatch")
        state, metrics = self.update[variant](state, self.online, fed, self.key)
        return state, (variant, metrics)

    def collect(self, state, split, rows=None):
        outputs, facts = predictions(self.experiment, state, self.frozen, split, rows=rows)
        return [outputs], facts

    def draw(self, state: TrainState) -> None:
        """Stores pictures for the report."""
        masked.store(
            self.run.workdir,
            self.experiment,
            state,
            self.experiment.for_evaluation(self.frozen),
            seed=self.run.config.seed,
            write=processes.is_main(),
        )

    def split(self, state: TrainState) -> list[TrainState]:
        return [state]

    def join(self, states: list[TrainState]) -> TrainState:
        return states[0]

    @property
    def flops_per_step(self) -> float | None:
        return self.experiment.flops_per_step

    def close(self) -> None:
        self.feed.close()


class Loop:
    """Steps, with what is due between them, until every run has its result.

    Args:
      runs: of the same length and the same events.
      program: computes for all of them.
      clock: phases of the time.
      say: prints a line.
    """

    def __init__(
        self, runs: list[Run], program: Program, clock: "Clock", say: Callable[[str], None]
    ):
        self.runs, self.program, self.clock, self.say = runs, program, clock, say
        config, experiment = runs[0].config, runs[0].experiment
        self.total = experiment.total_steps
        duration = {"steps_per_epoch": experiment.steps_per_epoch, "total_steps": self.total}
        self.every = {
            "log": config.log.every_steps,
            "eval": config_lib.duration(config, "eval.every", default=self.total, **duration),
            "save": config_lib.duration(config, "checkpoint.every", default=self.total, **duration),
        }
        self.paces: list[float] = []
        self._stop_agreed = False
        self.watch = watch.Watch(
            [run.workdir for run in runs],
            total=self.total,
            stall_seconds=config.watch.stall_seconds,
            on_stall=config.watch.on_stall,
            process=jax.process_index(),
            say=say,
        )
        clock.lap("build")

    def run(self, stop: environment.StopFlag) -> list[dict[str, Any] | NonFiniteError]:
        """Returns the result of each run, or why it has none.

        Raises:
          Preempted: a signal asked to stop; the states are saved.
        """
        main = jax.process_index() == 0
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.watch)
            for run in self.runs:
                stack.push(run.close)
            processes.stop_if_asked("before the next step")
            state, step = self.program.start()
            self.clock.lap("init")
            processes.stop_if_asked("before the next step")
            self.watch.enter("compile")
            self.program.compile(step)
            stack.callback(self.program.close)
            self.clock.lap("compile")
            for run in self.runs:
                run.open(step)
            title = self._title()
            progress = writers.Progress(self.total, initial=step, description=title, is_main=main)
            stack.callback(progress.close)
            crash.doing("training")
            state = self._steps(stop, state, step, progress)
            crash.doing("measuring the result and writing it")
            progress.close()
            self.clock.lap("train")
            with self.watch.during("other", "what ends a run"):
                results = self._finish(state)
            self.watch.enter("done" if self._going else "failed")
            return results

    def _title(self) -> str:
        arms = dict.fromkeys(run.arm for run in self.runs)
        if not any(arms):
            return "train"
        seeds = dict.fromkeys(str(run.config.seed) for run in self.runs)
        return f"{' '.join(arms)} seed{'s'[: len(seeds) > 1]} {' '.join(seeds)}"

    @property
    def _going(self) -> list[tuple[int, Run]]:
        return [(i, run) for i, run in enumerate(self.runs) if run.error is None]

    def _each(self, do: Callable[[int, Run], Any]) -> dict[int, Any]:
        """Does something for every run that is still going; one that diverges ends there."""
        found = {}
        for i, run in self._going:
            try:
                found[i] = do(i, run)
            except NonFiniteError as error:
                run.error = error
        return found

    def _stopping(self, stop: environment.StopFlag, step: int) -> bool:
        """Whether to stop. Several processes decide together, every `IN_FLIGHT` steps."""
        if jax.process_count() == 1:
            return bool(stop)
        if step % IN_FLIGHT == 0:
            self._stop_agreed = processes.any_process(bool(stop))
        return self._stop_agreed

    def _steps(self, stop, state, step, progress) -> TrainState:
        """Runs the steps that are left, with what is due between them."""
        first, total, program = step, self.total, self.program
        pending: list[tuple[str, jax.Array]] = []
        began = time.perf_counter()
        while step < total and self._going:
            event = min(total, *((step // n + 1) * n for n in self.every.values()))
            begin, started = step, time.perf_counter()
            while step < event and not self._stopping(stop, step):
                state, metrics = program(state, step)
                step += 1
                pending.append(metrics)
                if len(pending) % IN_FLIGHT == 0:
                    self.watch.enter("device")
                    pending[-IN_FLIGHT][1].block_until_ready()
                self.watch.enter("other")
                self.watch.step = step
                progress.update(step)
                if step == first + 1:
                    self.watch.enter("device")
                    metrics[1].block_until_ready()
                    self.clock.lap("first_step")
                    self.watch.start(step)
                    self._say_start(step)
            self.watch.enter("device")
            rows = [(v, np.asarray(values)) for v, values in pending]
            rows = [(v, values.reshape(-1, values.shape[-1])) for v, values in rows]
            self.watch.enter("other")
            means = self._each(lambda i, run: run.read([(v, x[i]) for v, x in rows], step))  # noqa: B023
            pending.clear()
            if step > begin:
                self.paces.append((time.perf_counter() - started) / (step - begin))
            self._take_stalls()
            losses = [found["loss"] for found in means.values() if "loss" in found]
            progress.update(step, loss=float(np.mean(losses)) if losses else None)
            for run in self.runs:
                run.training_seconds = time.perf_counter() - began
            if step == event:
                for run in self.runs:
                    run.unlogged = []
            if step == event and (step % self.every["log"] == 0 or step == total):
                with self.watch.during("other", "the log"):
                    self._each(lambda i, run: run.write_means(step, means[i]))  # noqa: B023
            measured: dict[int, dict[str, Any]] = {}
            if step == event and (step == total or step % self.every["eval"] == 0):
                measured = self._measure(state, step, "held_out")
            stopping = self._stopping(stop, step)
            due = step % self.every["save"] == 0 or step == total or stopping
            if due or any(run.improves(measured.get(i)) for i, run in self._going):
                with self.watch.during("checkpoint", "saving"):
                    states = program.split(state)
                    self._each(lambda i, run: run.save(states[i], measured.get(i)))  # noqa: B023
            if stopping and step < total:
                for run in self.runs:
                    run.checkpointer.wait()
                raise Preempted(f"stopped at step {step} of {total}; the state is saved")
        return state

    def _take_stalls(self) -> None:
        """Lists what the watch has told among the alarms of the runs."""
        stalls = self.watch.stalls[:]
        del self.watch.stalls[: len(stalls)]
        for step, phase, message in stalls:
            self._each(lambda i, run: run.alarms.add(alarms.Alarm(step, "stall", phase, message)))  # noqa: B023

    def _say_start(self, step: int) -> None:
        phases = ", ".join(f"{name} {t:.2f}" for name, t in self.clock.phases.items())
        total = sum(self.clock.phases.values())
        flops = self.program.flops_per_step
        work = f", {tables.flop(flops)} a step" if flops else ""
        self.say(f"step {step} after {total:.2f} s ({phases}){work}")

    def _measure(self, state, step, split) -> dict[int, dict[str, Any]]:
        """Evaluates and logs a split; returns the metrics of each run."""
        if len(getattr(self.runs[0].experiment.dataset, split)) == 0:
            self._each(lambda i, run: run.write_measured(step, {}))
            return {i: {} for i, _ in self._going}
        with self.watch.during("evaluation", f"evaluation of {split}"):
            return self._measured(state, step, split)

    def _measured(self, state, step, split) -> dict[int, dict[str, Any]]:
        outputs, facts, parts = self._collect(state, split)

        def one(i: int, run: Run) -> dict[str, Any]:
            with diagnosis.evaluating(run.experiment, split):
                metrics = measure(run.experiment, outputs[i], facts, split, parts[i])
            if split == "test":
                run.controls = measure_controls(run.experiment, run.config.seed)
                metrics |= run.controls
            run.write_measured(step, metrics)
            if split == "test" and jax.process_index() == 0:
                _write_predictions(run.workdir, run.experiment, outputs[i], facts)
                _write_embeddings(run, outputs[i], facts, metrics)
            return metrics

        return self._each(one)

    def _collect(self, state, split) -> tuple[list[Any], Any, list[dict[str, tuple[Any, Any]]]]:
        """Returns the outputs of each run on a split, facts, and parts of each run."""
        gather = functools.partial(self.program.collect, state)
        outputs, facts = gather(split)
        found = collect_parts(self.runs[0].experiment, gather, split, (outputs, facts))
        parts = [
            {name: (part[0][i], part[1]) for name, part in found.items()}
            for i in range(len(outputs))
        ]
        return outputs, facts, parts

    def _finish(self, state) -> list[dict[str, Any] | NonFiniteError]:
        """Measures the last and the best states on the test split and writes the results."""
        program, dataset = self.program, self.runs[0].experiment.dataset
        with self.watch.during("checkpoint"):
            best = self._each(lambda i, run: run.best())
        if self._going and len(dataset.test):
            self._measure(state, self.total, "test")
        evaluators = self.runs[0].experiment.evaluators.values()
        if self._going and any("trust" in e.outputs for e in evaluators):
            self._write_trust(state)
        if isinstance(program, Alone) and self._going:
            with self.watch.during("evaluation", "pictures"):
                program.draw(state)
        earlier = {i: found["step"] for i, found in best.items() if found is not None}
        earlier = {i: step for i, step in earlier.items() if step != self.total}
        outputs, facts, parts = [], {}, []
        if len(dataset.test) and any(i in earlier for i, _ in self._going):
            states = program.split(state)
            for i, run in self._going:
                if i in earlier:
                    step = earlier[i]
                    restored = run.checkpointer.restore(run.experiment.abstract_state, step=step)
                    assert restored is not None
                    states[i] = restored.state
            with self.watch.during("evaluation", "evaluation of the best state"):
                outputs, facts, parts = self._collect(program.join(states), "test")
        self.clock.lap("finish")
        self._take_stalls()
        share = self.runs[0].share
        pace = round(float(np.median(self.paces)) * share, 6) if self.paces else None
        flops = program.flops_per_step
        compute = {
            "flops_per_step": flops,
            "seconds_per_step": pace,
            **speed.summary(
                self.runs[0].experiment,
                flops_per_step=flops,
                seconds_per_step=pace,
                spent=self.watch.spend(),
            ),
            "compilations_after_start": len(self.watch.recompiled),
            "examples": self.total * self.runs[0].config.batch_size,
            "devices": jax.device_count(),
            "phases": {name: round(t * share, 3) for name, t in self.clock.phases.items()},
            **({"side_by_side": len(self.runs)} if len(self.runs) > 1 else {}),
        }

        def finish(i: int, run: Run) -> dict[str, Any]:
            chosen: dict[str, Any] = {}
            if (found := best[i]) is not None:
                chosen = {"step": found["step"], **found["metrics"]}
                if i not in earlier:
                    chosen |= {k: v for k, v in run.latest.items() if k.startswith("test/")}
                elif outputs:
                    measured = measure(run.experiment, outputs[i], facts, "test", parts[i])
                    chosen |= scalars(measured | run.controls)
            return run.finish(chosen, compute)

        results = self._each(finish)
        return [results[i] if run.error is None else run.error for i, run in enumerate(self.runs)]

    def _write_trust(self, state) -> None:
        n = len(self.runs[0].experiment.dataset.train)
        chosen = np.unique(np.linspace(0, n - 1, min(n, TRUST_EXAMPLES)).astype(np.int64))
        outputs, facts = self.program.collect(state, "train", chosen)
        for i, run in self._going:
            _write_trust(run.workdir, run.experiment, chosen, outputs[i]["trust"], facts)


def _write_trust(workdir, experiment, chosen, trust, facts) -> None:
    """Stores what the weigher makes of training examples, and the extreme ones among them."""
    source = experiment.dataset.train
    weights = trust["weights"]
    arrays = {name: x.astype(np.float32) for name, x in trust.items()}
    arrays |= {"signals": np.asarray(experiment.objective.signals), **facts}
    order = np.argsort(weights[:, -1] / np.maximum(weights.sum(1), 1e-12), kind="stable")
    for name, rows in (("low", order[:EXTREMES]), ("high", order[::-1][:EXTREMES])):
        images = source.read(chosen[rows])["input"]
        if isinstance(images, np.ndarray) and images.ndim == 4 and images.dtype == np.uint8:
            arrays |= {name: rows, f"{name}_images": images}
    if jax.process_index() == 0:
        writers.save_arrays(workdir / "trust.npz", arrays)


def _write_embeddings(run: Run, outputs, facts, metrics: Mapping[str, Any]) -> None:
    spectra = {"before training, test": metrics.get("test/spectrum_initial")}
    spectra |= embeddings.thinned(run.spectra) | {"last step, test": metrics.get("test/spectrum")}
    found = {name: values for name, values in spectra.items() if values is not None}
    embeddings.store(run.workdir, run.experiment, outputs, facts, found)


def _write_predictions(workdir, experiment, outputs, facts) -> None:
    arrays = {
        f"logits_{role}": found["logits"].astype(np.float32)
        for role, found in outputs.items()
        if "logits" in found
    }
    arrays |= {name: facts[name] for name in ("label", "index") if name in facts}
    source = experiment.dataset.test
    rows = np.arange(min(EXAMPLES, len(source)))
    images = source.read(rows)["input"]
    if isinstance(images, np.ndarray) and images.ndim == 4 and images.dtype == np.uint8:
        arrays |= {"images": images, "images_index": facts["index"][rows]}
    writers.save_arrays(workdir / "predictions.npz", arrays)
