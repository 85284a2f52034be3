"""The loop: batch, step, log, evaluate, save, in a fixed order."""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from distill_jax.core.api import TrainState
from distill_jax.core.errors import CheckpointError, ConfigError, NonFiniteError
from distill_jax.core.partition import named_leaves
from distill_jax.data import loader
from distill_jax.data.source import Subset
from distill_jax.run import build as build_lib
from distill_jax.run import config as config_lib
from distill_jax.run import environment, writers
from distill_jax.run.checkpoint import Checkpointer
from distill_jax.run.config import ConfigDict

NEUTRAL = (
    "mesh.",
    "partition.",
    "log.",
    "checkpoint.",
    "eval.batch_size",
    "data.resident",
    "study.",
)
"""Config paths that change how a run is carried out and not what it computes."""

REMEDY = (
    "lower optim.lr, set optim.clip_norm, or lengthen optim.warmup; earlier checkpoints are intact"
)

IN_FLIGHT = 8
"""After this many steps the loop waits for the first of them: the device never idles, and the rate
shown and the answer to a signal are at most so many steps off."""

EXAMPLES = 64
"""How many test inputs are stored with their predictions, for the report to show."""

TRUST_EXAMPLES, EXTREMES = 10_000, 12
"""How many training examples are stored with their weights, and images of the extreme ones."""


class Preempted(Exception):
    """The run was asked to stop, saved its state and can be continued by the same command."""

    exit_code = 75


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)


def check_workdir(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Checks that a folder is new, or holds a run of the same config.

    Raises:
      ConfigError: the folder holds a run that differs in something that changes its result.
    """
    stored = workdir / "config.json"
    if not stored.exists():
        return
    before = config_lib.from_json(stored.read_text())
    changes = config_lib.differences(before, config)
    changes = [change for change in changes if not change.startswith(NEUTRAL)]
    if changes:
        raise ConfigError(
            "holds a run of another config:\n    " + "\n    ".join(changes),
            where=str(workdir),
            hint="give the same config to continue it, or another workdir",
        )


def create_workdir(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Writes `config.json` and `env.json`."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / "env.json", environment.describe_environment())
        write_json(workdir / "config.json", json.loads(config_lib.to_json(config)))


def read_result(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Returns the result of a finished run, None where it is not finished."""
    try:
        result = json.loads((workdir / "result.json").read_text())
    except (OSError, ValueError):
        return None
    return result if result.get("status") == "done" else None


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
    source = getattr(experiment.dataset, split)
    if rows is not None:
        source = Subset(source, rows, f"{len(rows)} of them")
    collected: list[Any] = []
    for batch in loader.eval_batches(source, batch_size=experiment.eval_batch_size):
        outputs = jax.device_get(experiment.predict(state, frozen, batch))
        real = np.asarray(batch["mask"]) > 0
        facts = {k: np.asarray(x) for k, x in batch.items() if k not in ("input", "mask", "epoch")}
        collected.append(jax.tree.map(lambda x, real=real: x[real], (outputs, facts)))
    outputs, facts = jax.tree.map(lambda *xs: np.concatenate(xs), *collected)
    metrics: dict[str, Any] = {}
    for evaluator in experiment.evaluators.values():
        found = evaluator(outputs, facts)
        metrics |= {f"{split}/{name}": value for name, value in found.items()}
    return metrics, {"outputs": outputs, **facts}


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(v) for name, v in metrics.items() if np.ndim(v) == 0}


def evaluate_run(config: ConfigDict, workdir: pathlib.Path) -> str:
    """Evaluates the best and the newest checkpoint of a run; returns a table.

    Also written to `eval.json` in the folder, by step and metric.

    Raises:
      CheckpointError: the folder holds no undamaged checkpoint.
    """
    check_workdir(config, workdir)
    experiment = build_lib.build(config)
    checkpointer = Checkpointer(workdir / "checkpoints", mode=config.eval.mode)
    frozen = experiment.frozen_networks(config)
    steps = {"best": checkpointer.best(), "newest": None}
    found: dict[str, dict[str, float]] = {}
    for name, step in steps.items():
        restored = checkpointer.restore(experiment.abstract_state, step=step)
        if restored is None:
            raise CheckpointError(
                "holds no finished checkpoint", where=str(workdir), hint="train it first"
            )
        metrics: dict[str, float] = {"step": restored.meta["step"]}
        for split in ("held_out", "test"):
            if len(getattr(experiment.dataset, split)):
                metrics |= scalars(evaluate(experiment, restored.state, frozen, split)[0])
        found[name] = metrics
    checkpointer.close()
    write_json(workdir / "eval.json", found)
    names = sorted({name for metrics in found.values() for name in metrics})
    lines = [f"{'':28}{'best':>12}{'newest':>12}"]
    lines += [
        f"{name:28}" + "".join(f"{found[k].get(name, float('nan')):>12.6g}" for k in found)
        for name in names
    ]
    return "\n".join(lines)


def format_result(result: Mapping[str, Any]) -> str:
    """Formats the metrics of a finished run: the last state, and the best by held-out metric."""
    best = result["best"]
    lines = [
        f"{'':28}{'last':>12}{'best':>12}",
        f"{'step':28}{result['steps']:>12}{best.get('step', 0):>12}",
    ]
    for name, value in sorted(result["metrics"].items()):
        lines.append(f"{name:28}{value:>12.4f}{best.get(name, float('nan')):>12.4f}")
    return "\n".join(lines)


class _Clock:
    """Wall time by phase of the run, in seconds."""

    def __init__(self):
        self.phases: dict[str, float] = {}
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
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains, or continues, the run in a folder, and returns its result.

    Args:
      config: a config that passes `config.validate`.
      workdir: the run folder.
      arm: name of the run in a study, for titles.
      reported: the metric that a study compares, checked before the first step.
      make_experiment: how the experiment is built; a study passes a cached builder.
      say: prints a line.

    Raises:
      UserError: the config, the data or a checkpoint does not fit, or a loss became NaN.
      Preempted: a signal asked the run to stop; its state is saved.
    """
    clock = _Clock()
    clock.phases["import"] = environment.startup_seconds()
    check_workdir(config, workdir)
    if (finished := read_result(workdir)) is not None:
        say(f"{workdir} is finished; its result is read from result.json")
        return finished
    experiment = make_experiment(config)
    if config.eval.metric:
        build_lib.check_metric(experiment, config.eval.metric, where="eval.metric")
    if reported:
        build_lib.check_metric(experiment, reported, where="study.metric")
    create_workdir(config, workdir)
    clock.lap("build")

    checkpointer = Checkpointer(
        workdir / "checkpoints", keep=config.checkpoint.keep, mode=config.eval.mode
    )
    with environment.stop_on_signal() as stop:
        try:
            return _Run(config, workdir, experiment, checkpointer, clock, arm, say).run(stop)
        finally:
            checkpointer.close()


class _Run:
    """One run from its first step to its result."""

    def __init__(self, config, workdir, experiment, checkpointer, clock, arm, say):
        self.config, self.workdir, self.experiment = config, workdir, experiment
        self.checkpointer, self.clock, self.arm, self.say = checkpointer, clock, arm, say
        duration = {
            "steps_per_epoch": experiment.steps_per_epoch,
            "total_steps": experiment.total_steps,
        }
        total = experiment.total_steps
        self.every = {
            "log": config.log.every_steps,
            "eval": config_lib.duration(config, "eval.every", default=total, **duration),
            "save": config_lib.duration(config, "checkpoint.every", default=total, **duration),
        }
        self.latest: dict[str, float] = {}
        self.last_finite: float | None = None
        self.earlier_seconds = 0.0
        self.training_seconds = 0.0
        self.paces: list[float] = []

    def run(self, stop: environment.StopFlag) -> dict[str, Any]:
        config, experiment, total = self.config, self.experiment, self.experiment.total_steps
        replicated = build_lib.partition.replicated(experiment.mesh)
        key = jax.device_put(jax.random.key(config.seed), replicated)
        frozen = experiment.frozen_networks(config)
        state, step = self._start(key, frozen)
        self.clock.lap("init")
        feed = build_lib.Feed(experiment, seed=config.seed, start=step)
        update = {v: experiment.compile_step(feed(step, v), v) for v in experiment.variants}
        self.clock.lap("compile")

        main = jax.process_index() == 0
        with contextlib.ExitStack() as stack:
            stack.callback(feed.close)
            log = writers.make_writer(
                self.workdir, resume_step=step, tensorboard=config.log.tensorboard, is_main=main
            )
            stack.callback(log.close)
            progress = writers.Progress(
                total, initial=step, description=self._title(), is_main=main
            )
            stack.callback(progress.close)
            state = self._steps(stop, state, frozen, key, step, feed, update, log, progress)
            progress.close()
            self.clock.lap("train")
            return self._finish(state, frozen, log)

    def _steps(self, stop, state, frozen, key, step, feed, update, log, progress) -> TrainState:
        """Runs the steps that are left, with what is due between them."""
        first, total = step, self.experiment.total_steps
        pending: list[tuple[str, jax.Array]] = []
        began = time.perf_counter()
        while step < total:
            event = min(total, *((step // n + 1) * n for n in self.every.values()))
            begin, started = step, time.perf_counter()
            while step < event and not stop:
                variant = self.experiment.variant(step)
                state, metrics = update[variant](state, frozen, feed(step, variant), key)
                step += 1
                pending.append((variant, metrics))
                if len(pending) % IN_FLIGHT == 0:
                    pending[-IN_FLIGHT][1].block_until_ready()
                progress.update(step)
                if step == first + 1:
                    metrics.block_until_ready()
                    self.clock.lap("first_step")
                    self._say_start(step)
            means = self._read(pending, step)
            pending.clear()
            if step > begin:
                self.paces.append((time.perf_counter() - started) / (step - begin))
            progress.update(step, loss=means.get("loss"))
            self.training_seconds = time.perf_counter() - began
            if step % self.every["log"] == 0 or step == total:
                log.write(step, self._facts(step, means))
            measured = None
            if step == total or step % self.every["eval"] == 0:
                measured = self._evaluate(state, frozen, "held_out")
                log.write(step, {"epoch": self._epoch(step), **scalars(measured)})
            due = step % self.every["save"] == 0 or step == total or stop
            if due or self._improves(measured):
                self._save(state, measured)
            if stop and step < total:
                self.checkpointer.wait()
                raise Preempted(f"stopped at step {step} of {total}; the state is saved")
        return state

    def _title(self) -> str:
        return f"{self.arm} seed {self.config.seed}" if self.arm else "train"

    def _start(self, key, frozen) -> tuple[TrainState, int]:
        restored = self.checkpointer.restore(self.experiment.abstract_state)
        if restored is None:
            state = self.experiment.initial_state(key, self.config)
            return self.experiment.with_class_means(state, frozen), 0
        for skipped in restored.skipped:
            self.say(f"damaged checkpoint set aside: {skipped}")
        self.earlier_seconds = restored.meta.get("seconds", 0.0)
        step = restored.meta["step"]
        self.say(f"continuing from step {step}")
        return restored.state, step

    def _say_start(self, step: int) -> None:
        phases = ", ".join(f"{name} {t:.2f}" for name, t in self.clock.phases.items())
        total = sum(self.clock.phases.values())
        flops = self.experiment.flops_per_step
        work = f", {flops / 1e9:.3g} GFLOP a step" if flops else ""
        self.say(f"step {step} after {total:.2f} s ({phases}){work}")

    def _read(self, pending, step) -> dict[str, float]:
        """Averages the metrics since the last event; refuses what is not finite."""
        found: dict[str, list[float]] = {}
        for i, (variant, values) in enumerate(pending):
            row = dict(zip(self.experiment.metric_names(variant), np.asarray(values), strict=True))
            bad = [name for name, value in row.items() if not np.isfinite(value)]
            bad = [name for name in bad if name != "loss"] or bad
            if bad:
                raise NonFiniteError(
                    f"{', '.join(bad)} is {row[bad[0]]} at step {step - len(pending) + i + 1}; "
                    f"the last finite loss was {self.last_finite}",
                    where=str(self.workdir),
                    hint=REMEDY,
                )
            self.last_finite = float(row["loss"])
            for name, value in row.items():
                found.setdefault(name, []).append(float(value))
        return {name: float(np.mean(values)) for name, values in found.items()}

    def _epoch(self, step: int) -> float:
        return round(step / self.experiment.steps_per_epoch, 4)

    def _facts(self, step: int, means: Mapping[str, float]) -> dict[str, float]:
        return {
            "epoch": self._epoch(step),
            "seconds": round(self.earlier_seconds + self.training_seconds, 3),
            "train/lr": float(self.experiment.schedule(max(step - 1, 0))),
            **{f"train/{name}": value for name, value in means.items()},
        }

    def _evaluate(self, state, frozen, split) -> dict[str, Any]:
        if len(getattr(self.experiment.dataset, split)) == 0:
            return {}
        metrics, _ = evaluate(self.experiment, state, frozen, split)
        self.latest |= scalars(metrics)
        return metrics

    def _improves(self, measured: Mapping[str, Any] | None) -> bool:
        if not measured or not self.config.eval.metric:
            return False
        self.checkpointer.wait()
        best = self.checkpointer.best()
        if best is None:
            return True
        sign = 1.0 if self.config.eval.mode == "max" else -1.0
        before = self.checkpointer.meta(best)["metric"]
        return sign * float(measured[self.config.eval.metric]) > sign * before

    def _save(self, state, measured) -> None:
        if not self.experiment.is_finite(state.params):
            raise NonFiniteError(
                f"parameters are not finite after step {int(state.step)}, which is not saved; "
                f"the last finite loss was {self.last_finite}",
                where=str(self.workdir),
                hint=REMEDY,
            )
        chosen = self.config.eval.metric
        metric = float(measured[chosen]) if measured and chosen else None
        meta = {
            "config": json.loads(config_lib.to_json(self.config)),
            "seconds": self.earlier_seconds + self.training_seconds,
            "metrics": scalars(measured or {}),
        }
        self.checkpointer.save(state, meta, metric=metric)

    def _finish(self, state, frozen, log) -> dict[str, Any]:
        """Measures the last and the best state on the test split and writes the result."""
        config, experiment, total = self.config, self.experiment, self.experiment.total_steps
        metrics: dict[str, float] = dict(self.latest)
        best: dict[str, Any] = {}
        self.checkpointer.wait()
        if len(experiment.dataset.test):
            measured, collected = evaluate(experiment, state, frozen, "test")
            metrics |= scalars(measured)
            log.write(total, {"epoch": self._epoch(total), **scalars(measured)})
            if jax.process_index() == 0:
                _write_predictions(self.workdir, experiment, collected)
        if any("trust" in e.outputs for e in experiment.evaluators.values()):
            _write_trust(self.workdir, experiment, state, frozen)
        if (best_step := self.checkpointer.best()) is not None:
            best = {"step": best_step, **self.checkpointer.meta(best_step)["metrics"]}
            if best_step == total:
                best |= {k: v for k, v in metrics.items() if k.startswith("test/")}
            elif len(experiment.dataset.test):
                restored = self.checkpointer.restore(experiment.abstract_state, step=best_step)
                assert restored is not None
                best |= scalars(evaluate(experiment, restored.state, frozen, "test")[0])
        self.clock.lap("finish")
        seconds = self.earlier_seconds + self.training_seconds
        result = {
            "status": "done",
            "arm": self.arm,
            "seed": config.seed,
            "steps": total,
            "classes": list(experiment.dataset.classes),
            "metrics": metrics,
            "best": best,
            "provenance": {
                split: getattr(experiment.dataset, split).provenance._asdict()
                for split in ("train", "held_out", "test")
            },
            "parameters": {
                role: sum(int(np.prod(x.shape)) for x in named_leaves(found.params).values())
                for role, found in experiment.shapes.roles.items()
            },
            "compute": {
                "seconds": round(seconds, 3),
                "flops_per_step": experiment.flops_per_step,
                "seconds_per_step": round(float(np.median(self.paces)), 6) if self.paces else None,
                "examples": total * config.batch_size,
                "devices": jax.device_count(),
                "phases": {name: round(t, 3) for name, t in self.clock.phases.items()},
            },
        }
        if jax.process_index() == 0:
            write_json(self.workdir / "result.json", result)
        return result


def _write_trust(workdir, experiment, state, frozen) -> None:
    """Stores what the weigher makes of training examples, and the extreme ones among them."""
    source = experiment.dataset.train
    n = len(source)
    chosen = np.unique(np.linspace(0, n - 1, min(n, TRUST_EXAMPLES)).astype(np.int64))
    _, found = evaluate(experiment, state, frozen, "train", rows=chosen)
    trust = found.pop("outputs")["trust"]
    weights = trust["weights"]
    arrays = {name: x.astype(np.float32) for name, x in trust.items()}
    arrays |= {"signals": np.asarray(experiment.objective.signals), **found}
    order = np.argsort(weights[:, -1] / np.maximum(weights.sum(1), 1e-12), kind="stable")
    for name, rows in (("low", order[:EXTREMES]), ("high", order[::-1][:EXTREMES])):
        images = source.read(chosen[rows])["input"]
        if isinstance(images, np.ndarray) and images.ndim == 4 and images.dtype == np.uint8:
            arrays |= {name: rows, f"{name}_images": images}
    if jax.process_index() == 0:
        _save_arrays(workdir / "trust.npz", arrays)


def _save_arrays(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **arrays)
    os.replace(temporary, path)


def _write_predictions(workdir, experiment, collected) -> None:
    arrays = {
        f"logits_{role}": found["logits"].astype(np.float32)
        for role, found in collected["outputs"].items()
        if "logits" in found
    }
    arrays |= {name: collected[name] for name in ("label", "index") if name in collected}
    source = experiment.dataset.test
    rows = np.arange(min(EXAMPLES, len(source)))
    images = source.read(rows)["input"]
    if isinstance(images, np.ndarray) and images.ndim == 4 and images.dtype == np.uint8:
        arrays |= {"images": images, "images_index": collected["index"][rows]}
    _save_arrays(workdir / "predictions.npz", arrays)
