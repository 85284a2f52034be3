"""Does the watch notice that representations collapse, and does it keep quiet where they do not?

  python -m benchmarks.collapse --out=benchmarks/results/collapse.json

Known causes of collapse are put into methods on `digits`, 200 steps each; the configs as they are,
but for length, batch and how often is logged, are the controls, and once more without any change.
Every run is a run of the program, and its alarms are those of its `result.json`. `knn` is the
accuracy of nearest neighbours of its encoder, `knn_initial` that before training: a collapse of
what the loss sees reaches the encoder only later, or not at all. What is watched costs time, most
of it in the steps that are logged: steps with and without it take turns in one process.
"""

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import statistics
import tempfile
import time

import jax

from benchmarks import _record
from distill_jax.core.errors import ConfigError
from distill_jax.run import build, environment
from distill_jax.run import config as config_lib
from distill_jax.run.train import loop
from distill_jax.run.train.program import SingleRun
from distill_jax.run.train.run import Run

STEPS, EVERY, BATCH = 200, 10, 64

WATCHED = ("train/embedding/", "train/loss", "train/prototype", "train/assignment", "step")

INJECTED = {
    # name: (config, what is changed)
    "simsiam: no stop-gradient": ("simsiam", {"objective.kwargs.stop_gradient": False}),
    "simsiam: no predictor": ("simsiam", {"objective.kwargs.predictor": False}),
    "byol: average stays": ("byol", {"decay": 1.0}),
    "byol: no average": ("byol", {"decay": 0.0}),
    "byol: hardly an average": ("byol", {"decay": 1e-3}),
    "byol: no predictor": ("byol", {"objective.kwargs.predictor": False}),
    "byol: hardly an average, no predictor": (
        "byol",
        {"objective.kwargs.predictor": False, "decay": 1e-3},
    ),
    "vicreg: no variance, no covariance": (
        "vicreg",
        {"objective.kwargs.variance": 0.0, "objective.kwargs.covariance": 0.0},
    ),
    "vicreg: no covariance": ("vicreg", {"objective.kwargs.covariance": 0.0}),
    "vicreg: no variance": ("vicreg", {"objective.kwargs.variance": 0.0}),
    "ijepa: average stays": ("ijepa", {"decay": 1.0}),
    "ijepa: no average": ("ijepa:no_average", {}),
    "ijepa: no average, no stop-gradient": ("ijepa:collapse", {}),
    "lejepa: no isotropy": ("lejepa:collapse", {}),
    "dino: no centring": ("dino", {"objective.kwargs.centring": "none"}),
    "dino: no sharpening": ("dino", {"objective.kwargs.temperature": 0.1}),
}
# Without MAE, whose targets are pixels: nothing of it is watched, so that it could not fail.
HEALTHY = (
    *("byol", "simsiam", "vicreg", "ijepa", "barlow_twins", "dino", "simclr", "moco", "moco_v3"),
    *("lejepa", "mugs", "supcon", "tjepa", "ibot", "ibot:dinov2"),
)


def make_config(name: str, changes=(), *, every: int = EVERY):
    """The config of a method, short; of its evaluation nearest neighbours are left."""
    module, _, argument = name.partition(":")
    config = importlib.import_module(f"distill_jax.configs.ssl.{module}").get_config(argument)
    config.evaluators = {"knn": config.evaluators["knn"].to_dict()}
    config.log.tensorboard = False
    if not every:
        return config
    config.total = STEPS
    config.batch_size = BATCH
    config.log.every_steps = every
    config.eval.metric = ""
    config.data.held_out = 0.0
    config.eval.every = STEPS
    changes = dict(changes)
    if (decay := changes.pop("decay", None)) is not None:
        for role, spec in config.roles.items():
            if spec.ema_of:
                changes |= {
                    f"roles.{role}.decay": decay,
                    f"roles.{role}.decay_schedule": "constant",
                }
    config = config_lib.override(config, changes)
    if not changes.get("objective.kwargs.predictor", True):
        with config.unlocked():
            del config.roles["predictor"]
    return config


def run(name: str, changes, seeds: list[int], *, every: int = EVERY) -> list[dict]:
    """Trains with several seeds; returns alarms, curves and accuracies of each."""
    found, experiments = [], {}

    def make_experiment(config):
        key = config_lib.to_json(config_lib.override(config, {"seed": 0}))
        experiments.setdefault(key, build.build(config))
        return experiments[key]

    for seed in seeds:
        config = config_lib.override(make_config(name, changes, every=every), {"seed": seed})
        with tempfile.TemporaryDirectory() as folder:
            workdir = pathlib.Path(folder)
            result = loop.train(
                config, workdir, make_experiment=make_experiment, log_line=lambda line: None
            )
            rows = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
        curves: dict[str, list[float]] = {}
        for row in rows:
            for key, value in row.items():
                if key.startswith(WATCHED):
                    curves.setdefault(key, []).append(float(f"{value:.4g}"))
        found.append(
            {"seed": seed, "alarms": result["alarms"], "curves": curves, "last": result["metrics"]}
        )
    return found


def summary(runs: list[dict], rule: str) -> dict:
    """What is reported of runs: alarms by a rule whose name begins so, and accuracies."""
    each = [[a for a in r["alarms"] if a["rule"].startswith(rule)] for r in runs]
    return {
        "runs": len(runs),
        "flagged": sum(bool(alarms) for alarms in each),
        "first_alarm": [min((a["step"] for a in alarms), default=None) for alarms in each],
        "metrics": sorted({a["metric"] for alarms in each for a in alarms}),
        "knn": [round(r["last"]["test/knn_accuracy"], 3) for r in runs],
        "knn_initial": [round(r["last"]["test/knn_accuracy_initial"], 3) for r in runs],
    }


def cost(name: str, *, seconds: float) -> dict[str, float]:
    """What is watched costs this share of the time of a step, with the log interval of the config.

    Single steps of the program and of one that watches nothing take turns in one process. A step
    that is logged measures, and every other one may cost more as well: `ratio` is the mean of an
    interval of watched steps over an unwatched step, each kind of step by its median.
    """
    module = importlib.import_module(f"distill_jax.configs.ssl.{name}")
    every = module.get_config("").log.every_steps
    sides = []
    for watched in (True, False):
        config = make_config(name, every=every)
        config.total = 10**6
        experiment = build.build(config)
        if not watched:
            options = dataclasses.replace(experiment.trainer.options, watch_every=0)
            experiment = experiment.with_trainer(options=options)
        workdir = pathlib.Path(tempfile.mkdtemp())
        program = SingleRun(
            Run(config, workdir, experiment, arm="", reported="", log_line=lambda line: None)
        )
        state, step = program.start()
        program.compile(step)
        sides.append([program, state])
    times: dict[str, list[float]] = {"logged": [], "other": [], "unwatched": []}
    began, step = time.perf_counter(), 0
    while time.perf_counter() - began < seconds or step < 4 * every:
        for i in (0, 1) if step % 2 else (1, 0):
            program, state = sides[i]
            start = time.perf_counter()
            fed = program.feed(step)
            update = program.update["inner"]
            sides[i][1], metrics = update(state, program.online, fed, program.key)
            jax.block_until_ready((sides[i][1], metrics))
            kind = "unwatched" if i else "logged" if (step + 1) % every == 0 else "other"
            if step >= every:
                times[kind].append(time.perf_counter() - start)
        step += 1
    median = {kind: 1e3 * statistics.median(found) for kind, found in times.items()}
    interval = (every - 1) * median["other"] + median["logged"]
    return {
        **{f"{kind}_ms": round(found, 3) for kind, found in median.items()},
        "ratio": round(interval / every / median["unwatched"], 4),
        "log_every_steps": every,
        "logged_steps": len(times["logged"]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=3, help="of each injected collapse")
    parser.add_argument("--healthy", type=int, default=3, help="seeds of each healthy method")
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing for each method")
    parser.add_argument("--long", type=int, default=1, help="seeds of each unchanged config")
    parser.add_argument("--only", default="", help="parts of the names of runs, by commas")
    parser.add_argument("--curves", default="", help="file for the curves of all runs")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    environment.configure_jax(cpu_devices=1)
    environment.cache_compiled_programs()
    report: dict = {"injected": {}, "healthy": {}, "unchanged": {}, "cost": {}}
    healthy = {name: (name, {}) for name in HEALTHY}
    # By part of the report: cases, seeds, steps between two lines (0: as the config says), rules.
    parts = {
        "injected": (INJECTED, options.seeds, EVERY, "collapse"),
        "healthy": (healthy, options.healthy, EVERY, ""),
        "unchanged": (healthy, options.long, 0, ""),
    }
    curves = {}
    for kind, (cases, seeds, every, rule) in parts.items():
        for case, (name, changes) in cases.items():
            if not seeds or not any(part in case for part in options.only.split(",")):
                continue
            try:
                runs = run(name, changes, [options.first + i for i in range(seeds)], every=every)
            except ConfigError as error:  # noticed before the first step
                report[kind][case] = {"refused": str(error)}
            else:
                report[kind][case] = summary(runs, rule)
                curves[f"{case} ({kind})"] = runs
            print(kind, case, json.dumps(report[kind][case]), flush=True)
            if options.curves:
                pathlib.Path(options.curves).write_text(json.dumps(curves) + "\n")
    if options.seconds:
        for name in ("byol", "simsiam", "vicreg", "ijepa"):
            report["cost"][name] = cost(name, seconds=options.seconds)
            print(name, json.dumps(report["cost"][name]), flush=True)
    report |= {
        "steps": STEPS,
        "first_seed": options.first,
        "log_every_steps": EVERY,
        "false_alarms": {
            kind: [sum(case[key] for case in report[kind].values()) for key in ("flagged", "runs")]
            for kind in ("healthy", "unchanged")
            if report[kind]
        },
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "versions": _record.versions("jax", "flax", "optax", "numpy"),
    }
    _record.write(report, options.out)


if __name__ == "__main__":
    main()
