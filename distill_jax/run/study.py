"""Studies: arms times seeds from one config, finished work skipped, one comparison at the end.

An arm may start from another's network: `init = "arm:teacher"` means the run of arm `teacher`
with the same seed, `"arm:teacher@0"` the one with seed 0.
"""

import json
import pathlib
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from distill_jax.core.errors import ConfigError, NonFiniteError, nearest
from distill_jax.run import build as build_lib
from distill_jax.run import config as config_lib
from distill_jax.run import loop, report, statistics
from distill_jax.run.config import ConfigDict

_REFERENCE = re.compile(r"arm:(?P<arm>[\w.+-]+)(@(?P<seed>\d+))?(?P<role>#\w+)?$")


def _references(changes: Mapping[str, Any]) -> dict[str, re.Match]:
    """Returns the config paths that name another arm's network."""
    found = {}
    for path, value in changes.items():
        if isinstance(value, str) and value.startswith("arm:"):
            match = _REFERENCE.match(value)
            if match is None:
                raise ConfigError(
                    f"{value!r} names no arm", where=path, hint="write arm:NAME or arm:NAME@SEED"
                )
            found[path] = match
    return found


def _values(config: ConfigDict, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves of an arm's config by path, before references are resolved."""
    flat = config_lib.flatten(config)
    return {path: v for path, v in flat.items() if not path.startswith("study.")} | dict(changes)


def ordered_arms(config: ConfigDict) -> list[str]:
    """Returns the arms such that each comes after those it starts from.

    Raises:
      ConfigError: an arm starts from one that does not exist, or from itself in a circle.
    """
    arms = config_lib.arms(config)
    needs: dict[str, set[str]] = {}
    for arm, changes in arms.items():
        references = _references(_values(config, changes))
        needs[arm] = set()
        for path, match in references.items():
            source, seed = match["arm"], match["seed"]
            if source not in arms:
                raise ConfigError(
                    f"starts from an arm {source!r} that the study does not have",
                    where=f"study.arms.{arm}.{path}",
                    hint=nearest(source, arms),
                )
            if seed is not None and int(seed) not in config.study.seeds:
                raise ConfigError(
                    f"starts from seed {seed}, which the study does not run",
                    where=f"study.arms.{arm}.{path}",
                    hint=f"seeds: {config.study.seeds}",
                )
            needs[arm].add(source)
    order: list[str] = []
    while len(order) < len(arms):
        ready = [arm for arm in arms if arm not in order and needs[arm] <= set(order)]
        if not ready:
            left = [arm for arm in arms if arm not in order]
            raise ConfigError(
                f"the arms {', '.join(left)} start from each other in a circle", where="study.arms"
            )
        order.append(ready[0])
    return order


def arm_config(config: ConfigDict, arm: str, seed: int, workdir: pathlib.Path) -> ConfigDict:
    """Returns the config of one run: the arm's changes, its seed, and paths for its sources.

    A role that starts from another arm and names no model gets the network of that arm.
    """
    changes = dict(config_lib.arms(config)[arm])
    flat = _values(config, changes)
    for path, match in _references(flat).items():
        source = run_folder(workdir, match["arm"], int(match["seed"] or seed))
        changes[path] = str(source) + (match["role"] or "")
        role = path.removesuffix(".init")
        if not flat.get(f"{role}.model"):
            origin = arm_config(config, match["arm"], seed, workdir).roles
            network = origin[(match["role"] or "#student")[1:]]
            changes |= {f"{role}.model": network.model, f"{role}.kwargs": network.kwargs.to_dict()}
    single = config_lib.override(config, {**changes, "seed": seed})
    single.study = config_lib.base().study
    return single


def run_folder(workdir: pathlib.Path, arm: str, seed: int) -> pathlib.Path:
    return workdir / arm / f"seed{seed}"


def check(config: ConfigDict) -> None:
    """Raises `ConfigError` unless every arm is a valid config and the comparison is defined."""
    if not config.study.arms or not config.study.seeds:
        raise ConfigError(
            "the config defines no study",
            where="study",
            hint="set study.arms and study.seeds, or use --mode=train",
        )
    if not config.study.reference:
        raise ConfigError(
            "no reference arm is named",
            where="study.reference",
            hint=nearest("", config.study.arms),
        )
    if config.study.tuned and not config.eval.metric:
        raise ConfigError(
            "tuned arms are chosen by eval.metric, which is empty",
            where="study.tuned",
            hint="set eval.metric, such as held_out/accuracy",
        )
    for arm in ordered_arms(config):
        try:
            single = arm_config(config, arm, config.study.seeds[0], pathlib.Path())
            config_lib.validate(single)
        except ConfigError as e:
            raise ConfigError(e.what, where=f"study.arms.{arm}: {e.where}", hint=e.hint) from e


class _OneExperiment:
    """Builds experiments, keeping the last: seeds of an arm share data and compiled programs."""

    def __init__(self):
        self._key, self._experiment = "", None

    def __call__(self, config: ConfigDict) -> build_lib.Experiment:
        same = json.loads(config_lib.to_json(config))
        del same["seed"]
        for role in same["roles"].values():
            if role["model"]:
                del role["init"]
        key = json.dumps(same, sort_keys=True)
        if key != self._key or self._experiment is None:
            self._experiment = build_lib.build(config)
            self._key = key
        return self._experiment


def run_study(
    config: ConfigDict, workdir: pathlib.Path, *, say: Callable[[str], None] = print
) -> str:
    """Runs what is not finished, writes `study.json` and `report.html`, returns the table.

    A run that diverges is recorded as failed and the others go on.

    Args:
      config: with `study.arms`, `study.seeds`, `study.reference` and `study.metric`.
      workdir: the study's folder; each run lies in `<arm>/seed<k>`.
      say: prints a line.

    Raises:
      UserError: an arm's config, data or starting network does not fit.
      Preempted: stopped by a signal; the same command continues.
    """
    check(config)
    workdir.mkdir(parents=True, exist_ok=True)
    make_experiment = _OneExperiment()
    order = ordered_arms(config)
    runs = [(arm, seed) for arm in order for seed in config.study.seeds]
    statuses: dict[tuple[str, int], dict[str, Any]] = {
        (arm, seed): {"status": "pending", "value": None} for arm, seed in runs
    }
    began = time.perf_counter()
    for i, (arm, seed) in enumerate(runs, 1):
        folder = run_folder(workdir, arm, seed)
        single = arm_config(config, arm, seed, workdir)
        before = time.perf_counter()
        try:
            result = loop.train(
                single,
                folder,
                arm=arm,
                reported="" if arm in config.study.sources else config.study.metric,
                make_experiment=make_experiment,
                say=lambda line: None,
            )
        except NonFiniteError as e:
            statuses[arm, seed] = {"status": "failed", "value": None, "error": str(e)}
            failure = {"status": "failed", "arm": arm, "seed": seed, "error": str(e)}
            loop.write_json(folder / "result.json", failure)
            say(f"[{i}/{len(runs)}] {arm} seed {seed} failed: {e.what}")
        else:
            value = result["metrics"].get(config.study.metric)
            statuses[arm, seed] = {"status": "done", "value": value, "metrics": result["metrics"]}
            took = time.perf_counter() - before
            measured = "done" if value is None else f"{config.study.metric} {value:.4f}"
            say(
                f"[{i}/{len(runs)}] {arm} seed {seed}: {measured}"
                f" ({took:.0f} s, {time.perf_counter() - began:.0f} s in all)"
            )
        summary = _write(config, workdir, statuses)
    table = statistics.format_table(
        summary, metric=config.study.metric, mode=_mode(config.study.metric)
    )
    (workdir / "table.txt").write_text(table + "\n")
    path = report.write_study_report(workdir)
    return f"{table}\n\nreport: {path}"


_LOWER = ("nll", "brier", "ece", "ece_adaptive", "aurc", "loss", "log_loss", "normalised_entropy")


def _mode(metric: str) -> str:
    """Says which end of a metric is better."""
    return "min" if metric.rpartition("/")[2] in _LOWER else "max"


def tune(config: ConfigDict, statuses: Mapping[tuple[str, int], Any]) -> dict[str, dict[str, Any]]:
    """Chooses, for each entry of `study.tuned`, the arm of the best mean over the finished seeds.

    By `eval.metric` of the last state, which is measured on the held-out part: the test part is
    not looked at.

    Returns:
      `{name: {"arm": chosen, "by": metric, "candidates": {arm: mean}}}`; a name is left out while
      none of its candidates has finished.
    """
    metric, sign = config.eval.metric, 1 if config.eval.mode == "max" else -1
    chosen = {}
    for name, candidates in config.study.tuned.items():
        means = {}
        for arm in candidates:
            found = [statuses[arm, seed].get("metrics") for seed in config.study.seeds]
            values = [metrics[metric] for metrics in found if metrics]
            if values:
                means[arm] = sum(values) / len(values)
        if means:
            best = max(means, key=lambda arm: sign * means[arm])
            chosen[name] = {"arm": best, "by": metric, "candidates": means}
    return chosen


def _write(config, workdir, statuses) -> list[statistics.ArmSummary]:
    arms = {arm: (arm, changes) for arm, changes in config_lib.arms(config).items()}
    tuned = tune(config, statuses)
    arms |= {name: (found["arm"], arms[found["arm"]][1]) for name, found in tuned.items()}
    compared = [arm for arm in arms if arm not in config.study.sources]
    names = sorted(compared, key=lambda arm: arm != config.study.reference)
    values: dict[str, dict[str, float]] = {arm: {} for arm in names}
    for name in names:
        for seed in config.study.seeds:
            status = statuses[arms[name][0], seed]
            if status["value"] is not None:
                values[name][str(seed)] = status["value"]
    summary = statistics.summarise(values, reference=config.study.reference)
    contents = {
        "name": workdir.name,
        "title": config.study.title or f"{', '.join(arms)} on {config.data.name}",
        "metric": config.study.metric,
        "mode": _mode(config.study.metric),
        "reference": config.study.reference,
        "arms": {
            name: {
                "overrides": dict(changes),
                "seeds": {
                    str(seed): {
                        **statuses[arm, seed],
                        "run": str(run_folder(pathlib.Path(), arm, seed)),
                    }
                    for seed in config.study.seeds
                },
            }
            for name, (arm, changes) in arms.items()
        },
        "tuned": tuned,
        "summary": [_summary_row(row) for row in summary],
    }
    loop.write_json(workdir / "study.json", contents)
    return summary


def _summary_row(row: statistics.ArmSummary) -> dict[str, Any]:
    return {
        "arm": row.arm,
        "seeds": list(row.seeds),
        "value": row.value._asdict() if row.value else None,
        "difference": row.difference._asdict() if row.difference else None,
        "is_reference": row.is_reference,
    }
