"""Reads the folders of runs and studies; files may be missing or damaged."""

import dataclasses
import functools
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.core.errors import UserError
from distill_jax.evaluators import calibration, classification
from distill_jax.report import figures, sharing
from distill_jax.report.statistics import ArmSummary, Estimate, ask, summarise
from distill_jax.report.wording import NONE, alarm_line, decimals, is_finite, minus
from distill_jax.trainer.io import files


def is_trust(metric: str) -> bool:
    """Returns whether a metric, with its split, belongs to `evaluators.trust`."""
    name = metric.rpartition("/")[2]
    return name.startswith("ratio_") or name in ("teacher_wrong_auc", "damaged_auc")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The readable contents of a run folder."""

    path: Path
    label: str
    config: Mapping[str, Any]
    env: Mapping[str, Any]
    result: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    arrays: Sequence[str]
    example_weight_arrays: Sequence[str]
    notes: Sequence[str]
    segments: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def read(cls, path: Path, *, label: str) -> "Run":
        notes: list[str] = []
        names = ("config", "env", "result")
        config, env, result = (read_json(path / f"{name}.json", notes) for name in names)
        records = _read_records(path / "metrics.jsonl", notes)
        arrays = read_names(path / "predictions.npz", notes)
        weighted = (path / "trust.npz").exists()
        return cls(
            path=path,
            label=label,
            config=config,
            env=env,
            result=result,
            records=records,
            arrays=arrays,
            example_weight_arrays=read_names(path / "trust.npz", notes) if weighted else (),
            notes=notes,
            segments=read_segments(path, notes),
        )

    @property
    def exists(self) -> bool:
        return bool(self.config or self.result or self.records)

    def array(self, name: str) -> np.ndarray:
        """Returns one array of predictions.npz, without the examples whose class is unknown.

        It is not cached, since a study has many runs.
        """
        with np.load(self.path / "predictions.npz", allow_pickle=False) as file:
            array = file[name]
            partly = "labelled" in file and not name.startswith("images")
            return array[file["labelled"] > 0] if partly else array

    @property
    def roles(self) -> list[str]:
        """Roles with logits; the student first."""
        names = [n.removeprefix("logits_") for n in self.arrays if n.startswith("logits_")]
        return sorted(names, key=lambda name: (name != "student", name))

    @property
    def classes(self) -> list[str]:
        return self.class_names(self.array(f"logits_{self.roles[0]}").shape[1])

    def class_names(self, k: int) -> list[str]:
        """Names of k classes, or numbers where the run does not name them."""
        names = self.result.get("classes") or ()
        return [str(n) for n in names] if len(names) == k else [str(i) for i in range(k)]

    def evaluate(self, evaluator: Any, role: str) -> Mapping[str, Any]:
        """Evaluates stored logits; empty if that fails (not finite, not a classifier)."""
        try:
            outputs = {role: {"logits": self.array(f"logits_{role}")}}
            return evaluator(outputs, {"label": self.array("label")})
        except (UserError, KeyError, ValueError):
            return {}

    def quality(self, role: str) -> Mapping[str, Any]:
        """Metrics and the reliability table of stored logits; empty if there are none."""
        made = (module.make(role=role) for module in (classification, calibration))
        first, second = (self.evaluate(evaluator, role) for evaluator in made)
        return {**first, **second} if first and second else {}

    def metric_names(self, most: int) -> list[str]:
        """Names of curves; the loss, the selection metric and common metrics first."""
        logged = {n: None for r in self.records for n, v in r.items() if is_finite(v)}
        first = ["train/loss", str(lookup(self.config, "eval.metric") or "")]
        first += ["held_out/accuracy", "held_out/nll", "held_out/ece"]
        rest = sorted(n for n in logged if n.startswith(("held_out/", "train/")))
        rest = [n for n in rest if not is_trust(n)]
        rest.sort(key=lambda n: n.startswith("train/"))
        return [n for n in dict.fromkeys(first + rest) if n in logged][:most]

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns finite (steps, values) `[n]`; a step repeated after a resume counts once."""
        at = {r["step"]: r[name] for r in self.records if is_finite(r.get(name))}
        steps = sorted(at)
        return np.array(steps, np.float64), np.array([at[s] for s in steps], np.float64)


class Study:
    """The readable contents of a study folder."""

    def __init__(self, path: Path, spec: Mapping[str, Any], notes: list[str]):
        self.path, self.spec, self.notes = path, spec, notes
        self.metric = str(spec.get("metric", "metric"))
        self.mode = "min" if spec.get("mode") == "min" else "max"
        self.arms: dict[str, Mapping[str, Any]] = {
            str(name): arm for name, arm in dict(spec.get("arms") or {}).items()
        }

    def stands_for_others(self, arm: str) -> bool:
        """Whether it is a name for runs of other arms, chosen on held-out data."""
        return any(arm in (self.spec.get(group) or {}) for group in ("tuned", "fallback"))

    @property
    def published(self) -> Mapping[str, float]:
        """Published values by arm."""
        return self.spec.get("published") or {}

    @property
    def questions(self) -> Mapping[str, Sequence[str]]:
        """Arm, reference and further arms of each question whose arms are present."""
        asked = self.spec.get("questions")
        if not isinstance(asked, dict):
            return {}
        return {str(q): a for q, a in asked.items() if len(a) > 1 and {*a} <= {*self.arms}}

    @functools.cached_property
    def answers(self) -> dict[str, list[ArmSummary]]:
        """The comparison of each question."""
        return ask(self.values, self.questions)

    def seeds(self, arm: str) -> Mapping[str, Mapping[str, Any]]:
        return self.arms[arm].get("seeds") or {}

    @functools.cached_property
    def values(self) -> dict[str, dict[str, float]]:
        """Finite values of finished seeds by arm."""
        return self._values("value")

    def _values(self, state: str) -> dict[str, dict[str, float]]:
        return {
            arm: {
                seed: float(entry[state])
                for seed, entry in self.seeds(arm).items()
                if entry.get("status") == "done" and is_finite(entry.get(state))
            }
            for arm in self.arms
        }

    @functools.cached_property
    def runs(self) -> dict[str, list[Run]]:
        """Readable run folders by arm; arms without runs are included."""
        by_arm: dict[str, list[Run]] = {}
        for arm in self.arms:
            runs = [
                Run.read(self.path / str(entry["run"]), label=f"{arm}, seed {seed}")
                for seed, entry in self.seeds(arm).items()
                if entry.get("run")
            ]
            by_arm[arm] = [run for run in runs if run.exists]
        return by_arm

    @property
    def all_runs(self) -> list[Run]:
        """The runs of all arms; one that stands for several names counts once."""
        every = [run for runs in self.runs.values() for run in runs]
        return list({run.path: run for run in reversed(every)}.values())[::-1]

    @functools.cached_property
    def summaries(self) -> list[ArmSummary]:
        return self._summarise(self.values)

    @functools.cached_property
    def best_summaries(self) -> list[ArmSummary]:
        """The comparison of the best states on held-out data; empty if there are none."""
        values = self._values("best")
        return self._summarise(values) if any(values.values()) else []

    @functools.cached_property
    def best_answers(self) -> dict[str, list[ArmSummary]]:
        """Like `answers`, for the best states on held-out data."""
        return ask(self._values("best"), self.questions)

    def _summarise(self, values: Mapping[str, Mapping[str, float]]) -> list[ArmSummary]:
        reference = self.spec.get("reference")
        if reference in self.arms:
            return summarise(values, reference=str(reference))
        alone = [summarise({a: v}, reference=a)[0] for a, v in values.items()]
        return [dataclasses.replace(summary, is_reference=False) for summary in alone]

    @functools.cached_property
    def digits(self) -> int:
        """Decimals of the metric: at least four, and three digits of the largest mean."""
        return decimals(max((abs(s.value.mean) for s in self.summaries if s.value), default=0))

    @property
    def shown(self) -> dict[str, Any]:
        """Formatting arguments of the metric in sentences."""
        return {"mode": self.mode, "digits": self.digits}

    def fmt(self, value: float, *, sign: str = "") -> str:
        return minus(f"{value:{sign}.{self.digits}f}")

    def interval(self, est: Estimate | None, *, sign: str = "") -> str:
        if est is None:
            return NONE
        if est.interval is None:
            return "n = 1"
        return f"[{', '.join(self.fmt(v, sign=sign) for v in est.interval)}]"

    def difference(self, est: Estimate | None) -> str:
        if est is None:
            return NONE
        mean = self.fmt(est.mean, sign="+")
        return mean if est.se is None else f"{mean} ± {self.fmt(est.se)}"

    @functools.cached_property
    def best(self) -> str | None:
        """The arm with the best mean among the arms with readable runs."""
        sign = 1 if self.mode == "max" else -1
        means = {s.arm: sign * s.value.mean for s in self.summaries if s.value}
        return max((a for a in means if self.finished(a)), key=lambda a: means[a], default=None)

    @functools.cached_property
    def colours(self) -> dict[str, int]:
        """Colour numbers of the arms that figures overlay.

        If there are more arms than colours, the reference, the best arm, the arms with weighting
        ratios and then the first others get a colour.
        """

        def rank(arm: str) -> tuple[bool, ...]:
            weighted = any(run.example_weight_arrays for run in self.runs[arm])
            return arm != self.spec.get("reference"), arm != self.best, not weighted

        chosen = set(sorted(self.arms, key=rank)[: figures.COLOURS])
        return {arm: i for i, arm in enumerate(a for a in self.arms if a in chosen)}

    def finished(self, arm: str) -> list[Run]:
        """The runs of an arm with a final value."""
        folders = {self.path / str(self.seeds(arm)[seed].get("run")) for seed in self.values[arm]}
        return [run for run in self.runs[arm] if run.path in folders]

    def finished_by_seed(self, arm: str) -> dict[str, Run]:
        return {run.label.removeprefix(f"{arm}, seed "): run for run in self.finished(arm)}

    def failures(self) -> Iterator[tuple[str, str, str]]:
        """Yields (arm, seed, what happened) for every seed without a value."""
        for arm in self.arms:
            for seed, entry in self.seeds(arm).items():
                if seed not in self.values[arm]:
                    status = str(entry.get("status", "unknown"))
                    status = "done, but without a finite value" if status == "done" else status
                    error = entry.get("error")
                    yield arm, seed, f"{status}: {error}" if error else status


def read_json(path: Path, notes: list[str], *, scrub: bool = True) -> dict[str, Any]:
    """Returns a JSON object, without absolute paths; empty, and noted, if it cannot be read."""
    try:
        parts = files.RESULT_PARTS if path.name == "result.json" else {}
        found = files.read_json(path, optional=parts)
        return sharing.scrubbed(found, path.parent) if scrub else found
    except files.MissingFile:
        notes.append(f"{path.name} is missing")
    except files.DamagedFile as error:
        notes.append(f"{path.name} {error.what}")
    return {}


def read_segments(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Returns the segments of a run that went on differently, from history.json."""
    file = path / "history.json"
    if not file.exists():
        return []
    try:
        content = files.read_json(file, shape={"segments": [files.SEGMENT]})
    except files.DamagedFile as error:
        notes.append(f"{file.name} {error.what}")
        return []
    return sharing.scrubbed(content["segments"], path)


def _read_records(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Returns the records of metrics.jsonl; the last line may be truncated after a kill."""
    if not path.exists():
        notes.append(f"{path.name} is missing")
        return []
    try:
        lines = files.read_lines(path)
    except files.DamagedFile as error:
        notes.append(f"{path.name} {error.what}")
        return []
    if damaged := sum(line.row is None for line in lines):
        notes.append(f"damaged lines of {path.name}, left out: {damaged}")
    return [row for _, row in lines if row is not None and is_finite(row["step"])]


def read_alarms(folder: Path) -> list[str]:
    """Returns the alarms in the folder of a run, finished or not, one line each."""
    rows = files.read_rows(folder / "alarms.jsonl")
    lines = [alarm_line(r) for r in rows if {"step", "rule", "metric", "message"} <= r.keys()]
    return sharing.scrubbed(lines, folder)


def read_arrays(path: Path, needed: str, notes: list[str]) -> dict[str, np.ndarray]:
    """Returns the arrays of a file; none if it is absent, damaged, or lacks the needed one."""
    if needed not in read_names(path, notes):
        return {}
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def read_names(path: Path, notes: list[str]) -> list[str]:
    """Returns the names of the arrays of a file; none if it is absent or damaged."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
            names = [name.removesuffix(".npy") for name in file.namelist()]
    except FileNotFoundError:
        notes.append(f"{path.name} is missing")
        return []
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        damaged, names = str(error), []
    if damaged:
        notes.append(f"{path.name} is damaged: {damaged}")
        return []
    return names


def lookup(tree: Mapping[str, Any], path: str) -> Any:
    node: Any = tree
    for name in path.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node
