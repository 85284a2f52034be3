"""One run folder: its logs, checkpoints and results."""

import collections
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from distill_jax.core import collapse
from distill_jax.core.api import TrainState
from distill_jax.core.errors import NonFiniteError
from distill_jax.report.sharing import scrubbed
from distill_jax.run import alarms, diagnosis, environment, pictures, processes, writers
from distill_jax.run import build as build_lib
from distill_jax.run import config as config_lib
from distill_jax.run import workdir as workdir_lib
from distill_jax.run.build import Experiment
from distill_jax.run.config import ConfigDict
from distill_jax.run.environment import Preempted
from distill_jax.run.train import continuing
from distill_jax.run.train import result as result_lib
from distill_jax.run.train.evaluation import scalars
from distill_jax.run.train.inputs import read_inputs
from distill_jax.trainer.io.checkpoint import Checkpointer
from distill_jax.trainer.io.files import peek
from distill_jax.trainer.io.step_index import newest_meta

SKIPPED_IN_A_ROW = 100
"""After so many steps in a row that were skipped for not being finite, a run is given up."""


class Run:
    """One run folder: what is logged, kept and reported of it.

    Args:
      config: of the run.
      workdir: its folder, which is made.
      experiment: what is run.
      arm: its name in a study.
      reported: the metric that a study compares.
      going_on: what differs from the run in the folder, from `continuing.plan`.
      share: the part of the time of a step that is its own, where runs go side by side.
      log_line: prints a line.

    Attributes:
      error: why the run ended early.

    Raises:
      ConfigError: the folder holds another run, or a metric used for selection is not measured.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: pathlib.Path,
        experiment: Experiment,
        *,
        arm: str,
        reported: str,
        share: float = 1.0,
        going_on: continuing.Continuation | None = None,
        log_line: Callable[[str], None],
    ):
        self.going_on = going_on or continuing.plan(config, workdir, ())
        self.inputs = read_inputs(experiment, config)
        self.environment = environment.describe_environment()
        if config.eval.metric:
            build_lib.check_metric(experiment, config.eval.metric, where="eval.metric")
        if reported:
            build_lib.check_metric(experiment, reported, where="study.metric")
        self._check_inputs(workdir)
        self.config, self.workdir, self.experiment = config, workdir, experiment
        self.arm, self.share, self.log_line = arm, share, log_line
        # Side by side, one run may be a checkpoint ahead of another when the process dies.
        keep = config.checkpoint.keep if share == 1 else max(2, config.checkpoint.keep)
        folder = workdir / "checkpoints"
        self.checkpointer = Checkpointer(
            folder, keep=keep, mode=config.eval.mode, rescue=workdir_lib.RESCUE
        )
        self.error: NonFiniteError | None = None
        self.log: Any = None
        self.pictures: pictures.Pictures | None = None
        self.latest: dict[str, float] = {}
        self.right: dict[str, Any] | None = None  # of the selecting examples, see `choices.packed`
        # Metrics of the steps since the last event, where a stop comes between two.
        self.unlogged: list[tuple[str, np.ndarray]] = []
        self.first_spread: dict[str, float] = {}  # reference for later values
        self.last_losses: collections.deque[float] = collections.deque(maxlen=diagnosis.KEPT)
        self.skipped = self._skipped_in_a_row = 0
        self.alarms: Any = None
        self.controls: dict[str, Any] = {}
        self.spectra: dict[int, np.ndarray] = {}
        self.earlier_seconds = 0.0
        self.training_seconds = 0.0

    def _check_inputs(self, workdir: pathlib.Path) -> None:
        read = lambda: newest_meta(workdir / "checkpoints")  # noqa: E731
        meta = processes.from_first(read, where=str(workdir))
        if meta is not None:
            workdir_lib.check_inputs(meta.get("inputs"), self.inputs, workdir)

    def _warn_of_changes(self, meta: Mapping[str, Any]) -> None:
        """Warns of an environment that differs from that of the start before."""
        before = meta.get("environment")
        if before is None:  # a checkpoint of version 0.1
            before = workdir_lib.arithmetic(peek(self.workdir / "env.json") or {})
        now = workdir_lib.arithmetic(self.environment)
        changes = workdir_lib.environment_changes(before, now)
        if changes:
            self.log_line(
                "warning: the run continues in another environment, which may change the last "
                "bits "
                f"of its numbers: {', '.join(changes)}"
            )

    def restore(self, step: int | None = None) -> tuple[TrainState, int] | None:
        """Returns a saved state and its step, by default the newest; None where there is none."""
        restored = self.checkpointer.restore(self.experiment.abstract_state, step=step)
        if restored is None:
            return None
        for skipped in restored.skipped:
            self.log_line(f"damaged checkpoint set aside: {skipped}")
        self._warn_of_changes(restored.meta)
        self.earlier_seconds = restored.meta.get("seconds", 0.0)
        self.skipped = restored.meta.get("skipped", 0)
        self.latest = dict(restored.meta.get("metrics", {}))
        self.right = restored.meta.get("right")
        self.first_spread = dict(restored.meta.get("first_spread", {}))
        rows = ((v, np.asarray(x)) for v, x in restored.meta.get("unlogged", ()))
        # Those of another `log.grad_norm` have other metrics.
        length = lambda variant: len(self.experiment.metric_names(variant))  # noqa: E731
        self.unlogged = [(v, x) for v, x in rows if len(x) == length(v)]
        return restored.state, restored.meta["step"]

    def begin(self, key: Any, frozen: Any) -> TrainState:
        """Returns the state before the first step."""
        state = build_lib.initial_state(self.experiment, key, self.config)
        state = build_lib.with_class_means(self.experiment, state, frozen)
        return build_lib.with_dataset_pass(self.experiment, state, frozen, self.config.seed)

    def open(self, step: int) -> None:
        """Opens the log at the step from which the run goes on."""
        if processes.is_main():
            self.workdir.mkdir(parents=True, exist_ok=True)
            shared = scrubbed(self.environment, self.workdir)
            if self.going_on.changes:
                self._begin_segment(step, shared)
            workdir_lib.describe(self.config, self.workdir, shared, step)
        self.log = writers.make_writer(
            self.workdir,
            resume_step=step,
            tensorboard=self.config.log.tensorboard,
            loggers=() if self.share < 1 else tuple(self.config.log.to),
            is_main=jax.process_index() == 0,
            log_line=self.log_line,
        )
        if self.config.log.images:
            self.pictures = pictures.Pictures(self.experiment, self.config)
            if step == 0:
                self.draw(0)
        self.alarms = alarms.Alarms(
            self.workdir if jax.process_index() == 0 else None,
            alarms.default_rules(
                spike_deviations=self.config.watch.spike, total=self.experiment.total_steps
            ),
            resume_step=step,
            log_line=self.log_line,
        )

    def _begin_segment(self, step: int, environment: Mapping[str, Any]) -> None:
        """Keeps the result of an earlier end, and records what changes from a step on."""
        workdir_lib.segments.keep_result(self.workdir, step)
        workdir_lib.segments.record(
            self.workdir,
            step=step,
            total=self.experiment.total_steps,
            changes=scrubbed(self.going_on.changes, self.workdir),
            rates=continuing.rates(self.going_on, self.experiment, step),
            environment=environment,
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
        """Averages the metrics since the last event; raises if one is not finite."""
        new = len(pending)
        self.unlogged = pending = [*self.unlogged, *pending]
        columns: dict[str, list[float]] = {}
        for i, (variant, values) in enumerate(pending):
            row = dict(zip(self.experiment.metric_names(variant), values, strict=True))
            skipped = int(row.pop("skipped", 0))
            if "skipped" in self.experiment.metric_names(variant):
                columns.setdefault("skipped", []).append(skipped)
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
                    columns |= {name: [float(value)] for name, value in spread.items()}
            for name, value in row.items():
                columns.setdefault(name, []).append(float(value))
        means = {name: float(np.mean(values)) for name, values in columns.items()}
        return means | ({"skipped": float(sum(columns["skipped"]))} if "skipped" in columns else {})

    def _skip(self, step: int) -> None:
        """Counts a skipped step; raises after `SKIPPED_IN_A_ROW` of them in a row."""
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row == 1:
            self.log_line(f"step {step} is skipped: its loss or gradient is not finite")
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
        example_info = {
            "epoch": self.epoch(step),
            "seconds": round(self.seconds, 3),
            "train/lr": float(np.asarray(self.experiment.schedule(last))),
        }
        metrics = {f"train/{name}": value for name, value in means.items()}
        self.log.write(step, example_info | metrics)
        self.alarms.see(step, metrics)

    def draw(self, step: int) -> None:
        """Writes the images that `log.images` asks for, as a step there sees them."""
        if self.pictures is not None:
            self.log.write_images(step, self.pictures(step))

    def write_measured(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Logs the measurements on a split."""
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
            names = ("step", "metric", "metrics")
            return {name: meta[name] for name in names} | {"right": meta.get("right")}

        return processes.from_first(find, where=str(self.workdir))

    def save(self, state: TrainState, measured: Mapping[str, Any] | None) -> None:
        """Saves a state, unless it is not finite."""
        workdir_lib.check_held(self.workdir)
        if not build_lib.is_finite(self.experiment.mesh)(state.params):
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
            "right": self.right if measured else None,
            "unlogged": [(variant, values.tolist()) for variant, values in self.unlogged],
            "first_spread": self.first_spread,
        }
        self.checkpointer.save(state, meta, metric=metric)

    def finish(self, best: Mapping[str, Any], compute: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the result: the last measurements, and those of the best state."""
        result = {
            "status": "done",
            "arm": self.arm,
            "seed": self.config.seed,
            "steps": self.experiment.total_steps,
            "metrics": self.latest,
            "best": best,
            "chosen_by": self.config.eval.metric,
            **result_lib.of_experiment(self.experiment),
            "alarms": [alarm._asdict() for alarm in self.alarms.raised],
            "skipped": self.skipped,
            "inputs": self.inputs,
            "compute": {"seconds": round(self.seconds, 3), **compute},
        }
        if self.right is not None:
            chosen = self.best() if self.config.eval.metric else None
            result["selecting"] = {"last": self.right, "best": (chosen or {}).get("right")}
        lost = processes.from_first(
            lambda: self.checkpointer.lost(best.get(self.config.eval.metric)),
            where=str(self.workdir),
        )
        if lost and self.config.eval.metric:
            result["selection_lost"] = lost
        workdir_lib.check_held(self.workdir)
        workdir_lib.write_result(self.workdir, scrubbed(result, self.workdir))
        return result
