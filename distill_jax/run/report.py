"""One offline HTML file about a run or a study, rebuilt from the files of its folder alone."""

import dataclasses
import functools
import json
import math
import os
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill_jax.core.errors import UserError
from distill_jax.evaluators import calibration, classification
from distill_jax.evaluators._logits import log_softmax
from distill_jax.run import figures
from distill_jax.run.figures import Html, el, join
from distill_jax.run.statistics import ArmSummary, Estimate, conclusion, summarise, verdict

_QUALITY = {
    "accuracy": "accuracy",
    "nll": "NLL",
    "ece": "ECE",
    "ece_adaptive": "adaptive ECE",
    "aurc": "AURC",
}
_POINTS = 240  # of a curve, at most: more cannot be seen and would swell the file
_ARMS = 8  # in figures that overlay arms, at most: as many as there are colours
_NONE = "\u2013"
_PIXELS = 64  # edge of an example image, at most


def write_run_report(run_dir: str | os.PathLike[str]) -> Path:
    """Writes `report.html` into a run folder and returns its path.

    Every file of the folder is optional, so that an interrupted run can be read too; what is
    missing is said at the top of the report.

    Raises:
      UserError: the folder is absent or holds none of a run's files.
    """
    run = _Run.read(Path(run_dir), label=Path(run_dir).name)
    if not run.exists:
        raise UserError(
            "there is no run to report",
            where=str(run_dir),
            hint="a run folder holds config.json, metrics.jsonl or result.json",
        )
    title = " · ".join(filter(None, [_objective(run), _get(run.config, "data.name"), run.label]))
    sections = [
        ("result", "Result", _run_result(run)),
        ("curves", "Learning curves", _curves({run.label: [run]}, names=run.metric_names(12))),
        ("calibration", "Calibration", _run_calibration(run)),
        ("confusion", "Confusion", _run_confusion(run)),
        ("examples", "Examples", _examples(run, {r: (run, r) for r in run.roles})),
        ("compute", "Compute", _compute({run.label: [run]})),
        ("provenance", "Provenance", _provenance([run])),
        ("config", "Config", _config_table(_flat(run.config))),
    ]
    return _write(
        run.path, kicker="Run report", title=title, lead=_run_lead(run), sections=sections
    )


def write_study_report(study_dir: str | os.PathLike[str]) -> Path:
    """Writes `report.html` into a study folder and returns its path.

    Means and intervals are computed anew from the values of the seeds in `study.json`.

    Raises:
      UserError: the folder has no readable `study.json`.
    """
    path = Path(study_dir)
    notes: list[str] = []
    study = _Study(path, _read_json(path / "study.json", notes), notes)
    if not isinstance(study.spec.get("arms"), dict) or not study.spec["arms"]:
        raise UserError(
            "there is no study to report",
            where=str(path / "study.json"),
            hint="; ".join(notes) or "it must be an object with `arms`",
        )
    some = [runs[0] for runs in study.runs.values() if runs]
    names = some[0].metric_names(4) if some else []
    shown = dict(list(study.runs.items())[:_ARMS])
    finished = {arm: study.finished(arm) for arm in shown}
    sections = [
        ("results", "Results", _study_results(study)),
        ("seeds", "Seeds", _study_seeds(study)),
        ("curves", "Learning curves", _curves(shown, names=names)),
        ("metrics", "Further metrics", _study_metrics(study)),
        ("calibration", "Calibration", _study_calibration(finished)),
        ("confusion", "Confusion", _study_confusion(study)),
        ("examples", "Examples", _study_examples(finished)),
        ("compute", "Compute", _compute(study.runs)),
        ("provenance", "Provenance", _provenance(study.all_runs)),
        ("config", "What differs", _study_config(study)),
    ]
    title = str(study.spec.get("title") or study.spec.get("name") or path.name)
    return _write(
        path, kicker="Study report", title=title, lead=_study_lead(study), sections=sections
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """What could be read of a run folder."""

    path: Path
    label: str
    config: Mapping[str, Any]
    env: Mapping[str, Any]
    result: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    arrays: Sequence[str]
    notes: Sequence[str]

    @classmethod
    def read(cls, path: Path, *, label: str) -> "_Run":
        notes: list[str] = []
        names = ("config", "env", "result")
        config, env, result = (_read_json(path / f"{name}.json", notes) for name in names)
        records = _read_records(path / "metrics.jsonl", notes)
        arrays = _read_names(path / "predictions.npz", notes)
        return cls(
            path=path,
            label=label,
            config=config,
            env=env,
            result=result,
            records=records,
            arrays=arrays,
            notes=notes,
        )

    @property
    def exists(self) -> bool:
        return bool(self.config or self.result or self.records)

    def array(self, name: str) -> np.ndarray:
        """Returns one array of predictions.npz; not kept, since a study has many runs."""
        with np.load(self.path / "predictions.npz", allow_pickle=False) as file:
            return file[name]

    @property
    def roles(self) -> list[str]:
        """Roles with logits; the student first."""
        names = [n.removeprefix("logits_") for n in self.arrays if n.startswith("logits_")]
        return sorted(names, key=lambda name: (name != "student", name))

    @property
    def classes(self) -> list[str]:
        """Class names, or numbers where the run does not name them."""
        k = self.array(f"logits_{self.roles[0]}").shape[1]
        names = self.result.get("classes") or ()
        return [str(n) for n in names] if len(names) == k else [str(i) for i in range(k)]

    def evaluate(self, evaluator: Any, role: str) -> Mapping[str, Any]:
        """Evaluates stored logits; empty where they cannot be (not finite, not a classifier)."""
        try:
            outputs = {role: {"logits": self.array(f"logits_{role}")}}
            return evaluator(outputs, {"label": self.array("label")})
        except (UserError, KeyError, ValueError):
            return {}

    def quality(self, role: str) -> Mapping[str, Any]:
        """Metrics and the reliability table of stored logits; empty where there are none."""
        made = (module.make(role=role) for module in (classification, calibration))
        first, second = (self.evaluate(evaluator, role) for evaluator in made)
        return {**first, **second} if first and second else {}

    def metric_names(self, most: int) -> list[str]:
        """Names of curves; the loss, the metric of selection and usual ones first."""
        logged = {n: None for r in self.records for n, v in r.items() if _finite(v)}
        first = ["train/loss", str(_get(self.config, "eval.metric") or "")]
        first += ["held_out/accuracy", "held_out/nll", "held_out/ece"]
        rest = sorted(n for n in logged if n.startswith(("held_out/", "train/")))
        rest.sort(key=lambda n: n.startswith("train/"))
        return [n for n in dict.fromkeys(first + rest) if n in logged][:most]

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns finite (steps, values) `[n]`; a step repeated after a resume counts once."""
        at = {r["step"]: r[name] for r in self.records if _finite(r.get(name))}
        steps = sorted(at)
        return np.array(steps, np.float64), np.array([at[s] for s in steps], np.float64)


class _Study:
    """What could be read of a study folder."""

    def __init__(self, path: Path, spec: Mapping[str, Any], notes: list[str]):
        self.path, self.spec, self.notes = path, spec, notes
        self.metric = str(spec.get("metric", "metric"))
        self.mode = "min" if spec.get("mode") == "min" else "max"
        self.arms: dict[str, Mapping[str, Any]] = {
            str(name): arm for name, arm in dict(spec.get("arms") or {}).items()
        }

    def seeds(self, arm: str) -> Mapping[str, Mapping[str, Any]]:
        return self.arms[arm].get("seeds") or {}

    @functools.cached_property
    def values(self) -> dict[str, dict[str, float]]:
        """Finite values of finished seeds by arm."""
        return {
            arm: {
                seed: float(entry["value"])
                for seed, entry in self.seeds(arm).items()
                if entry.get("status") == "done" and _finite(entry.get("value"))
            }
            for arm in self.arms
        }

    @functools.cached_property
    def runs(self) -> dict[str, list[_Run]]:
        """Run folders that can be read, by arm; empty arms are left in."""
        found: dict[str, list[_Run]] = {}
        for arm in self.arms:
            runs = [
                _Run.read(self.path / str(entry["run"]), label=f"{arm}, seed {seed}")
                for seed, entry in self.seeds(arm).items()
                if entry.get("run")
            ]
            found[arm] = [run for run in runs if run.exists]
        return found

    @property
    def all_runs(self) -> list[_Run]:
        return [run for runs in self.runs.values() for run in runs]

    @functools.cached_property
    def summaries(self) -> list[ArmSummary]:
        reference = self.spec.get("reference")
        if reference in self.arms:
            return summarise(self.values, reference=str(reference))
        alone = [summarise({a: v}, reference=a)[0] for a, v in self.values.items()]
        return [dataclasses.replace(summary, is_reference=False) for summary in alone]

    @functools.cached_property
    def digits(self) -> int:
        """Decimals of the metric: at least four, and three digits of the largest mean."""
        return _decimals(max((abs(s.value.mean) for s in self.summaries if s.value), default=0))

    def fmt(self, value: float, *, sign: str = "") -> str:
        return _minus(f"{value:{sign}.{self.digits}f}")

    def interval(self, est: Estimate | None, *, sign: str = "") -> str:
        if est is None:
            return _NONE
        if est.interval is None:
            return "n = 1"
        return f"[{', '.join(self.fmt(v, sign=sign) for v in est.interval)}]"

    def difference(self, est: Estimate | None) -> str:
        if est is None:
            return _NONE
        mean = self.fmt(est.mean, sign="+")
        return mean if est.se is None else f"{mean} ± {self.fmt(est.se)}"

    def finished(self, arm: str) -> list[_Run]:
        """The runs of an arm whose values count."""
        folders = {self.path / str(self.seeds(arm)[seed].get("run")) for seed in self.values[arm]}
        return [run for run in self.runs[arm] if run.path in folders]

    def failures(self) -> Iterator[tuple[str, str, str]]:
        """Yields (arm, seed, what happened) for every seed without a value."""
        for arm in self.arms:
            for seed, entry in self.seeds(arm).items():
                if seed not in self.values[arm]:
                    status = str(entry.get("status", "unknown"))
                    status = "done, but without a finite value" if status == "done" else status
                    error = entry.get("error")
                    yield arm, seed, f"{status}: {error}" if error else status


# --- sections of a run --------------------------------------------------------------------------


def _run_lead(run: _Run) -> Html:
    status = str(run.result.get("status", ""))
    steps = run.result.get("steps", run.records[-1].get("step") if run.records else None)
    tiles = [("status", status or "no result")]
    if steps is not None:
        tiles.append(("steps", f"{steps:,}" if isinstance(steps, int) else str(steps)))
    if "seed" in run.result or "seed" in run.config:
        tiles.append(("seed", str(run.result.get("seed", run.config.get("seed")))))
    if run.result.get("arm"):
        tiles.append(("arm", str(run.result["arm"])))
    seconds = _get(run.result, "compute.seconds")
    if _finite(seconds):
        tiles.append(("time", _duration(float(seconds))))
    problems = [note for note in run.notes if note != "result.json is missing"]
    if not status:
        at = f"; the last record is of step {steps}" if steps is not None else ""
        problems.insert(0, f"no result.json: the run was interrupted or still goes{at}")
    elif status != "done":
        error = run.result.get("error")
        problems.insert(0, f"the run is {status}" + (f": {error}" if error else ""))
    return join(_tiles(tiles), _alert("Please note", problems))


def _run_result(run: _Run) -> Html | None:
    best = run.result.get("best") or {}
    states = {"last step": run.result.get("metrics") or {}, f"best step, {best.get('step')}": best}
    columns = {
        f"{split}, {state}": {
            name.partition("/")[2]: value
            for name, value in metrics.items()
            if name.startswith(f"{split}/") and _finite(value)
        }
        for split in ("held_out", "test")
        for state, metrics in states.items()
    }
    columns = {title: found for title, found in columns.items() if found}
    names = dict.fromkeys(name for found in columns.values() for name in found)
    rows = [
        [el("th", name, scope="row"), *(_num(found.get(name)) for found in columns.values())]
        for name in names
    ]
    if not rows:
        return None
    metric = _get(run.config, "eval.metric")
    text = f"The best step is chosen by {metric}, not by the test split." if metric else ""
    return join(
        el("p", text, class_="muted") if best and text else None, _table(["", *columns], rows)
    )


def _run_calibration(run: _Run) -> Html | None:
    found = {role: run.quality(role) for role in run.roles}
    return _calibration_panel({r: (m, m["reliability"]) for r, m in found.items() if m})


def _run_confusion(run: _Run) -> Html | None:
    panels = []
    for i, role in enumerate(run.roles):
        metrics = run.evaluate(classification.make(role=role), role)
        if metrics:
            panels.append(_confusion_panel(metrics["confusion"], run.classes, role, i + 1))
    return el("div", panels, class_="grid2") if panels else None


# --- sections of a study ------------------------------------------------------------------------


def _study_lead(study: _Study) -> Html:
    planned = sum(len(study.seeds(arm)) for arm in study.arms)
    done = sum(map(len, study.values.values()))
    reference = next((s for s in study.summaries if s.is_reference), None)
    better = "higher is better" if study.mode == "max" else "lower is better"
    tiles: list[tuple[str, Any]] = [("arms", len(study.arms)), ("runs", f"{done} of {planned}")]
    if reference and reference.value:
        tiles.append((f"reference: {reference.arm}", study.fmt(reference.value.mean)))
    seconds = [_get(run.result, "compute.seconds") for run in study.all_runs]
    if any(map(_finite, seconds)):
        tiles.append(("compute time", _duration(sum(float(s) for s in seconds if _finite(s)))))
    said = [
        el("li", el("b", s.arm), ": ", _minus(verdict(s, mode=study.mode, digits=study.digits)))
        for s in study.summaries
        if not s.is_reference and reference
    ]
    lacking = [f"{arm}, seed {seed} {what}" for arm, seed, what in study.failures()]
    problems = list(study.notes)
    if reference is None:
        problems.append(f"reference {study.spec.get('reference')!r} is not an arm: no differences")
    singles = [s.arm for s in study.summaries if len(s.seeds) == 1]
    if singles:
        problems.append(f"one seed only, so no interval: {', '.join(singles)}")
    incomplete = [r.label for r in study.all_runs if "result.json is missing" in r.notes]
    if incomplete:
        problems.append(f"no result.json: {', '.join(incomplete)}")
    return join(
        el("p", f"{study.metric}, {better}. Differences are paired by seed.", class_="lead"),
        el("ul", said) if said and len(said) <= 8 else None,
        _tiles(tiles),
        _alert(f"Runs without a value: {len(lacking)}", lacking, stop=True),
        _alert("Please note", problems),
    )


def _study_results(study: _Study) -> Html:
    rows = []
    for i, s in enumerate(study.summaries):
        desc = study.arms[s.arm].get("description")
        planned = len(study.seeds(s.arm))
        name = [el("span", class_="dot " + figures.colour(i)), s.arm]
        diff = s.difference
        words = conclusion(diff, mode=study.mode) if diff else ""
        if diff and not diff.interval:
            words = "one common seed"
        tone = {"better": "good", "worse": "bad"}.get(words.rpartition(", ")[2])
        rows.append(
            [
                el("th", name, el("span", desc, class_="desc") if desc else None, scope="row"),
                el("td", study.fmt(s.value.mean) if s.value else _NONE, class_="n"),
                el("td", study.interval(s.value), class_="n"),
                el("td", "reference" if s.is_reference else study.difference(diff), class_="n"),
                el("td", "" if s.is_reference else study.interval(diff, sign="+"), class_="n"),
                el("td", words, class_=tone),
                el("td", f"{len(s.seeds)} / {planned}", class_="n"),
            ]
        )
    heads = ["arm", "mean", "95 % interval", "difference ± se", "95 % interval", "", "seeds"]
    value_rows = [
        figures.Row(
            name=s.arm,
            values=study.values[s.arm],
            mean=s.value.mean if s.value else None,
            interval=s.value.interval if s.value else None,
            note=_lack(len(study.seeds(s.arm)) - len(s.seeds)),
        )
        for s in study.summaries
    ]
    charts = []
    if any(study.values.values()):
        caption = "Rings are seeds, bars are means, pale lines are 95 % intervals of the mean."
        plot = figures.dot_plot(value_rows, x_label=study.metric)
        charts.append(_figure(f"{study.metric} by seed", plot, caption))
    if any(s.difference for s in study.summaries):
        plot = figures.dot_plot(_difference_rows(study), x_label="difference", zero=True)
        caption = (
            "Each seed minus the same seed of the reference. The dashed line is no difference."
        )
        charts.append(_figure(f"Paired difference to {study.spec.get('reference')}", plot, caption))
    return join(
        _table(heads, rows, refs=[s.is_reference for s in study.summaries]),
        el(
            "p",
            "Student-t intervals over seeds. They take seeds as independent and say nothing about "
            "other data sets; they are not corrected for the number of arms.",
            class_="muted",
        ),
        el("div", charts, class_="grid2"),
    )


def _difference_rows(study: _Study) -> list[figures.Row]:
    base = study.values.get(str(study.spec.get("reference")), {})
    return [
        figures.Row(
            name=s.arm,
            values={n: v - base[n] for n, v in study.values[s.arm].items() if n in base}
            if s.difference
            else {},
            mean=s.difference.mean if s.difference else None,
            interval=s.difference.interval if s.difference else None,
            note="reference" if s.is_reference else "",
        )
        for s in study.summaries
    ]


def _study_seeds(study: _Study) -> Html:
    seeds = list(dict.fromkeys(seed for arm in study.arms for seed in study.seeds(arm)))

    def cell(arm: str, seed: str) -> Html:
        entry = study.seeds(arm).get(seed)
        if entry is None:
            return el("td", _NONE, class_="n")
        value = study.values[arm].get(seed)
        text: Any = study.fmt(value) if value is not None else entry.get("status", "unknown")
        page = Path(str(entry.get("run") or "")) / "report.html"
        if entry.get("run") and not page.is_absolute() and (study.path / page).exists():
            text = el("a", text, href=urllib.parse.quote(page.as_posix()))
        return el("td", text, class_="n" if value is not None else "n bad")

    rows = [
        [el("th", arm, scope="row"), *(cell(arm, seed) for seed in seeds)] for arm in study.arms
    ]
    return _table(["arm", *(f"seed {seed}" for seed in seeds)], rows)


def _study_metrics(study: _Study) -> Html | None:
    found: dict[str, dict[str, list[float]]] = {}
    for arm in study.arms:
        for run in study.finished(arm):
            for name, value in (run.result.get("metrics") or {}).items():
                if _finite(value):
                    found.setdefault(name, {}).setdefault(arm, []).append(float(value))
    found = {n: v for n, v in found.items() if n.startswith("test/")} or found
    if not found:
        return None

    def cell(values: list[float] | None) -> Html:
        if not values:
            return el("td", _NONE, class_="n")
        mean = float(np.mean(values))
        digits = _decimals(mean)
        spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        text = _minus(f"{mean:.{digits}f}")
        return el("td", text + spread, class_="n")

    arms = [arm for arm in study.arms if study.finished(arm)]
    rows = [
        [el("th", name, scope="row"), *(cell(by_arm.get(arm)) for arm in arms)]
        for name, by_arm in found.items()
    ]
    return join(
        el("p", "Mean ± standard deviation over seeds.", class_="muted"),
        _table(["metric", *arms], rows),
    )


def _study_calibration(shown: Mapping[str, Sequence[_Run]]) -> Html | None:
    tables = {}
    for arm, runs in shown.items():
        found = [metrics for run in runs for r in run.roles[:1] if (metrics := run.quality(r))]
        if found:
            mean = {name: float(np.mean([m[name] for m in found])) for name in _QUALITY}
            tables[arm] = (mean, _pooled([m["reliability"] for m in found]))
    note = "Seeds are pooled in the diagram; the table has their means."
    return _calibration_panel(tables, note=note, order=list(shown))


def _study_confusion(study: _Study) -> Html | None:
    scored = [s for s in study.summaries if s.value and study.finished(s.arm)]
    if not scored:
        return None
    sign = 1 if study.mode == "max" else -1
    best = max(scored, key=lambda s: sign * s.value.mean if s.value else -math.inf)
    chosen = [s for s in scored if s.is_reference or s is best]
    order = list(study.arms)
    panels = []
    for s in chosen:
        runs = [run for run in study.finished(s.arm) if run.roles]
        found = [run.evaluate(classification.make(role=run.roles[0]), run.roles[0]) for run in runs]
        counts = [m["confusion"] for m in found if m]
        if counts and len({c.shape for c in counts}) == 1:
            kind = "reference" if s.is_reference else "best mean"
            seeds = f"sum of {len(counts)} seeds" if len(counts) > 1 else "one seed"
            title = f"{s.arm} ({kind}), {seeds}"
            i = order.index(s.arm)
            panels.append(_confusion_panel(np.sum(counts, axis=0), runs[0].classes, title, i))
    return el("div", panels, class_="grid2") if panels else None


def _study_examples(shown: Mapping[str, Sequence[_Run]]) -> Html | None:
    seeds = [{run.path.name: run for run in runs if run.roles} for runs in shown.values()]
    common = [name for name in (seeds[0] if seeds else {}) if all(name in s for s in seeds if s)]
    if not common:
        return None
    picked = {arm: runs[common[0]] for arm, runs in zip(shown, seeds, strict=True) if runs}
    first = next(iter(picked.values()))
    voters = {arm: (run, run.roles[0]) for arm, run in picked.items()}
    if len(first.roles) > 1:
        voters |= {role: (first, role) for role in first.roles[1:] if role not in voters}
    order = [*shown, *(name for name in voters if name not in shown)]
    return join(
        el("p", f"Predictions of {common[0]} of every arm.", class_="muted"),
        _examples(first, voters, order=order),
    )


def _study_config(study: _Study) -> Html | None:
    flat = {a: _flat(runs[0].config) for a, runs in study.runs.items() if runs and runs[0].config}
    for arm, spec in study.arms.items():
        if arm not in flat and spec.get("overrides"):
            flat[arm] = _flat(spec["overrides"])
    own = ("seed", "study.", "workdir")
    names = [n for n in dict.fromkeys(n for f in flat.values() for n in f) if not n.startswith(own)]
    differ = [n for n in names if len({f.get(n) for f in flat.values()}) > 1]
    if not flat:
        return None
    rows = [
        [
            el("th", name, scope="row", class_="code"),
            *(el("td", _cut(f.get(name, _NONE)), class_="code") for f in flat.values()),
        ]
        for name in differ
    ]
    shared = {n: next(iter(flat.values()))[n] for n in names if n not in differ}
    return join(
        _table(["key", *flat], rows, numeric=False)
        if rows
        else el("p", "The configs of all arms are equal.", class_="muted"),
        el(
            "details",
            el("summary", f"{len(shared)} keys that all arms share"),
            _config_table(shared),
        ),
    )


# --- sections of both ---------------------------------------------------------------------------


def _curves(arms: Mapping[str, Sequence[_Run]], *, names: Sequence[str]) -> Html | None:
    panels = []
    for name in names:
        series = {
            i: line
            for i, (arm, runs) in enumerate(arms.items(), len(arms) == 1)
            if (line := _band(arm, [run.curve(name) for run in runs])) is not None
        }
        if series:
            low = min(float(s.y.min() if s.low is None else s.low.min()) for s in series.values())
            high = max(float(s.y.max()) for s in series.values())
            log = "loss" in name and low > 0 and high / low > 30
            plot = figures.line_chart(series, y_label=name, log=log)
            panels.append(_figure(name + (", log scale" if log else ""), plot))
    if not panels:
        return None
    several = any(len(runs) > 1 for runs in arms.values())
    return join(
        el("p", "Lines are means over seeds, bands span the seeds.", class_="muted")
        if several
        else None,
        figures.key(list(arms)) if len(arms) > 1 else None,
        el("div", panels, class_="grid2"),
    )


def _band(name: str, curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> figures.Series | None:
    """Returns the mean and range of several curves over the steps that all of them reached."""
    curves = [curve for curve in curves if len(curve[0])]
    if not curves:
        return None
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = max((x for x, _ in curves), key=len)
    grid = grid[(grid >= start) & (grid <= end)]
    if not len(grid):
        return None
    values = np.stack([np.interp(grid, x, y) for x, y in curves])
    parts = np.array_split(np.arange(len(grid)), min(_POINTS, len(grid)))
    x = np.array([grid[part].mean() for part in parts])
    y = np.stack([values[:, part].mean(axis=1) for part in parts], axis=1)
    band = len(curves) > 1
    return figures.Series(
        name=name,
        x=x,
        y=y.mean(axis=0),
        low=y.min(axis=0) if band else None,
        high=y.max(axis=0) if band else None,
    )


def _calibration_panel(
    tables: Mapping[str, tuple[Mapping[str, float], np.ndarray]],
    *,
    note: str = "",
    order: Sequence[str] = (),
) -> Html | None:
    if not tables:
        return None
    number = {name: i for i, name in enumerate(order or tables)}
    number = number if order else {name: i + 1 for name, i in number.items()}
    plot = figures.reliability_diagram({number[n]: (n, t) for n, (_, t) in tables.items()})
    rows = [
        [
            el("th", el("span", class_="dot " + figures.colour(number[n])), n, scope="row"),
            *(_num(metrics[name]) for name in _QUALITY),
        ]
        for n, (metrics, _) in tables.items()
    ]
    text = (
        "Points on the dashed line are calibrated; below it the network is overconfident. Larger "
        "points hold more test examples."
    )
    side = join(
        _table(["", *_QUALITY.values()], rows),
        el(
            "p",
            "Of the stored logits of the test split, in 15 bins. Higher accuracy is better, lower "
            "in the other columns. " + note,
            class_="muted",
        ),
    )
    return el(
        "div",
        _figure("Reliability diagram", plot, text),
        el("div", el("h3", "Accuracy and calibration"), side, class_="panel"),
        class_="grid2",
    )


def _confusion_panel(counts: np.ndarray, classes: Sequence[str], title: str, i: int) -> Html:
    k = len(counts)
    plot = figures.confusion_chart(counts, classes=classes, i=i) if k <= 256 else None
    wrong = counts * (1 - np.eye(k, dtype=int))
    worst = [np.unravel_index(j, (k, k)) for j in np.argsort(-wrong, axis=None, kind="stable")[:4]]
    said = [f"{classes[r]} as {classes[c]} ({wrong[r, c]})" for r, c in worst if wrong[r, c]]
    text = f"Most frequent errors: {', '.join(said)}." if said else "No errors."
    return _figure(
        title,
        plot,
        text + f" Shade is the {'share' if k <= 20 else 'square root of the share'} of the row.",
    )


def _examples(
    run: _Run, voters: Mapping[str, tuple[_Run, str]], *, order: Sequence[str] = ()
) -> Html | None:
    """Shows stored images with the prediction of each voter (name -> run and role)."""
    if not {"images", "images_index", "index", "label"} <= set(run.arrays):
        return None
    images, where = run.array("images"), run.array("images_index")
    if images.ndim != 4 or images.dtype != np.uint8 or run.array("label").dtype.kind not in "iu":
        return None
    classes, label = run.classes, run.array("label")
    label = dict(zip(run.array("index").tolist(), label.tolist(), strict=False))
    keep = [j for j, i in enumerate(where.tolist()) if label.get(i) in range(len(classes))]
    votes: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, (other, role) in voters.items():
        row = {index: j for j, index in enumerate(other.array("index").tolist())}
        if all(int(where[j]) in row for j in keep):
            logits = other.array(f"logits_{role}")
            rows = logits[[row[int(where[j])] for j in keep]].astype(np.float64)
            if rows.shape[1] == len(classes) and np.isfinite(rows).all():
                votes[name] = rows.argmax(axis=1), np.exp(log_softmax(rows).max(axis=1))
    if not keep or not votes:
        return None
    truth = np.array([label[int(where[j])] for j in keep])
    right = np.stack([choice == truth for choice, _ in votes.values()], axis=1)
    number = {name: i for i, name in enumerate(order)} or {n: i + 1 for i, n in enumerate(voters)}
    parts = []
    for title, chosen in _example_groups(right, list(votes)):
        # The evenest splits first, then the most confident errors: there the networks differ.
        doubt = np.stack([p for _, p in votes.values()], axis=1)
        split = np.abs(right[chosen].mean(axis=1) - 0.5)
        weight = np.where(right[chosen], 0, doubt[chosen]).mean(axis=1) - 2 * split
        chosen = chosen[np.argsort(-weight, kind="stable")][:8]
        cards = [
            _card(
                images[keep[j]],
                truth=classes[truth[j]],
                index=int(where[keep[j]]),
                said=[
                    (n, number[n], classes[c[j]], float(p[j]), bool(c[j] == truth[j]))
                    for n, (c, p) in votes.items()
                ],
            )
            for j in chosen
        ]
        parts += [el("h3", title), el("div", cards, class_="examples")]
    return join(
        el(
            "p",
            f"Chosen for what they show among the {len(keep)} test examples stored with their "
            "images, so their error rates are not those of the test split.",
            class_="muted",
        ),
        parts,
    )


def _example_groups(right: np.ndarray, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields titles and rows of `right` `[n, voters]`, without empty groups."""
    if len(names) == 2:
        a, b = names
        groups = [
            (f"{a} wrong, {b} right", ~right[:, 0] & right[:, 1]),
            (f"{a} right, {b} wrong", right[:, 0] & ~right[:, 1]),
            ("Both wrong", ~right.any(axis=1)),
            ("Both right", right.all(axis=1)),
        ]
    elif len(names) == 1:
        groups = [("Wrong", ~right[:, 0]), ("Right", right[:, 0])]
    else:
        some = right.any(axis=1) & ~right.all(axis=1)
        groups = [
            ("Some right, some wrong", some),
            ("All wrong", ~right.any(axis=1)),
            ("All right", right.all(axis=1)),
        ]
    for title, mask in groups:
        if mask.any():
            yield title, np.flatnonzero(mask)


def _card(
    image: np.ndarray,
    *,
    truth: str,
    index: int,
    said: Sequence[tuple[str, int, str, float, bool]],
) -> Html:
    stride = math.ceil(max(image.shape[:2]) / _PIXELS)
    image = image[::stride, ::stride]
    image = image if image.shape[2] in (1, 3, 4) else image[..., :1]
    lines = [
        el(
            "li",
            el("span", el("span", class_="dot " + figures.colour(i)), name, title=name),
            el(
                "span",
                ("✓ " if ok else "✗ ") + choice,
                class_="good" if ok else "bad",
                title=choice,
            ),
            el("span", f"{p:.0%}", class_="n"),
        )
        for name, i, choice, p, ok in said
    ]
    picture = el("img", src=figures.png(image), alt=f"test example {index}: {truth}")
    return el(
        "div",
        picture,
        el("div", el("b", truth, el("span", f"index {index}", class_="muted")), el("ul", lines)),
        class_="example",
    )


def _compute(arms: Mapping[str, Sequence[_Run]]) -> Html | None:
    def mean(runs: Sequence[_Run], path: str) -> float | None:
        values = [float(v) for run in runs if _finite(v := _get(run.result, path))]
        return float(np.mean(values)) if values else None

    arms = {arm: runs for arm, runs in arms.items() if any(run.result for run in runs)}
    if not arms:
        return None
    every = [run for runs in arms.values() for run in runs]
    roles = list(dict.fromkeys(r for run in every for r in run.result.get("parameters") or {}))
    known = ("seconds", "flops_per_step")
    others = dict.fromkeys(
        name
        for run in every
        for name, value in (run.result.get("compute") or {}).items()
        if name not in known and _finite(value)
    )
    rows = []
    for arm, runs in arms.items():
        steps, flops = mean(runs, "steps"), mean(runs, "compute.flops_per_step")
        seconds = mean(runs, "compute.seconds")
        cells = [
            _duration(seconds) if seconds is not None else _NONE,
            f"{steps:,.0f}" if steps is not None else _NONE,
            _si(flops),
            _si(flops * steps if flops is not None and steps is not None else None),
            *(_si(mean(runs, f"compute.{name}")) for name in others),
            *(_si(mean(runs, f"parameters.{role}")) for role in roles),
        ]
        rows.append([el("th", arm, scope="row"), *(el("td", c, class_="n") for c in cells)])
    heads = ["time", "steps", "FLOPs per step", "FLOPs of training"]
    heads += [name.replace("_", " ") for name in others] + [f"parameters: {r}" for r in roles]
    several = any(len(runs) > 1 for runs in arms.values())
    return join(
        el("p", "Means over the runs of an arm.", class_="muted") if several else None,
        _table(["", *heads], rows),
    )


def _provenance(runs: Sequence[_Run]) -> Html | None:
    records: dict[tuple[str, str], int] = {}
    for run in runs:
        for split, record in (run.result.get("provenance") or {}).items():
            entry = (str(split), json.dumps(record, sort_keys=True, default=str))
            records[entry] = records.get(entry, 0) + 1
    splits = [split for split, _ in records]
    mixed = sorted({split for split in splits if splits.count(split) > 1})
    rows = []
    for (split, text), count in records.items():
        record = json.loads(text)
        record = record if isinstance(record, dict) else {"name": record}
        n = record.get("n")
        cells = [
            el("td", record.get("name", "")),
            el("td", f"{n:,}" if isinstance(n, int) else n, class_="n"),
            el("td", record.get("origin", ""), class_="code"),
            el("td", record.get("sha256", ""), class_="code"),
            el("td", record.get("licence", "")),
        ]
        if mixed:
            cells.append(el("td", count, class_="n"))
        rows.append([el("th", split, scope="row"), *cells])
    heads = ["split", "data", "examples", "origin", "SHA-256", "licence"] + ["runs"] * bool(mixed)
    surroundings: dict[str, dict[str, int]] = {}
    for run in runs:
        for name, value in run.env.items():
            value = _joined(value)
            counts = surroundings.setdefault(name, {})
            counts[value] = counts.get(value, 0) + 1
    env_rows = [
        [el("th", name, scope="row"), el("td", _variants(counts), class_="code")]
        for name, counts in surroundings.items()
    ]
    if not rows and not env_rows:
        return None
    warning = [f"runs read different {split} data: they cannot be compared" for split in mixed]
    return join(
        _alert("Please note", warning, stop=True),
        _table(heads, rows, numeric=False) if rows else None,
        join(el("h3", "Surroundings"), _table(["", "value"], env_rows, numeric=False))
        if env_rows
        else None,
    )


def _config_table(flat: Mapping[str, str]) -> Html | None:
    rows = [
        [el("th", name, scope="row", class_="code"), el("td", _cut(value), class_="code")]
        for name, value in flat.items()
    ]
    return _table(["key", "value"], rows, numeric=False) if rows else None


# --- the page -----------------------------------------------------------------------------------


class _Section(NamedTuple):
    anchor: str
    title: str
    body: Html | None


def _write(
    folder: Path,
    *,
    kicker: str,
    title: str,
    lead: Html,
    sections: Sequence[tuple[str, str, Html | None]],
) -> Path:
    shown = [s for s in map(_Section._make, sections) if s.body]
    style = Html(Path(__file__).with_name("report.css").read_text(encoding="utf-8"))
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", title),
        el("style", style),
    )
    links = [el("li", el("a", s.title, href=f"#{s.anchor}")) for s in shown]
    body = el(
        "body",
        el("a", "Skip to the content", href="#content", class_="skip"),
        el("header", el("p", kicker, class_="kicker"), el("h1", title), lead),
        el("nav", el("ul", links), aria_label="Sections"),
        el(
            "main",
            [
                el("section", el("h2", s.title, id=f"{s.anchor}-title"), s.body, id=s.anchor)
                for s in shown
            ],
            id="content",
        ),
        el("footer", "Built by distill_jax from the files of this folder alone."),
    )
    path = folder / "report.html"
    partial = folder / f".report.{os.getpid()}.html"
    partial.write_text(f"<!DOCTYPE html>\n{el('html', head, body, lang='en')}\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def _tiles(tiles: Sequence[tuple[str, Any]]) -> Html:
    items = [el("div", el("span", name), el("b", value), class_="tile") for name, value in tiles]
    return el("div", items, class_="tiles")


def _alert(title: str, lines: Sequence[str], *, stop: bool = False) -> Html | None:
    if not lines:
        return None
    items = [el("li", line) for line in lines]
    return el("div", el("b", title), el("ul", items), class_="alert stop" if stop else "alert")


def _figure(title: str, plot: Html | None, caption: str = "") -> Html:
    return el("figure", el("h3", title), plot, el("figcaption", caption) if caption else None)


def _table(
    heads: Sequence[str],
    rows: Sequence[Sequence[Html]],
    *,
    refs: Sequence[bool] = (),
    numeric: bool = True,
) -> Html:
    """Returns a table; columns after the first are numbers if `numeric`."""
    top = [
        el("th", head, scope="col", class_="n" if numeric and i else None)
        for i, head in enumerate(heads)
    ]
    marks = refs or [False] * len(rows)
    body = [el("tr", row, class_="ref" if m else None) for row, m in zip(rows, marks, strict=True)]
    return el(
        "div",
        el("table", el("thead", el("tr", top)), el("tbody", body)),
        class_="scroll fit" if len(heads) < 4 and numeric else "scroll",
    )


# --- reading ------------------------------------------------------------------------------------


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{path.name} is missing")
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return {}
    if not isinstance(found, dict):
        notes.append(f"{path.name} is not an object")
        return {}
    return found


def _read_records(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl; a kill may have cut the last one short."""
    if not path.exists():
        notes.append(f"{path.name} is missing")
        return []
    records, damaged = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            damaged += 1
            continue
        if isinstance(record, dict) and _finite(record.get("step")):
            records.append(record)
    if damaged:
        notes.append(f"damaged lines of {path.name}, left out: {damaged}")
    return records


def _read_names(path: Path, notes: list[str]) -> list[str]:
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


def _pooled(tables: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the reliability table of all examples of several tables `[bins, 5]`."""
    count = sum(t[:, 2] for t in tables)
    filled = np.where(count > 0, count, np.nan)
    sums = (sum(np.nan_to_num(t[:, c]) * t[:, 2] for t in tables) / filled for c in (3, 4))
    return np.stack([tables[0][:, 0], tables[0][:, 1], count, *sums], axis=1)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns leaves as text by dotted path."""
    leaves: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= _flat(value, f"{prefix}{name}.")
        else:
            plain = isinstance(value, str)
            leaves[f"{prefix}{name}"] = value if plain else json.dumps(value, default=str)
    return leaves


def _get(tree: Mapping[str, Any], path: str) -> Any:
    node: Any = tree
    for name in path.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def _objective(run: _Run) -> str:
    return str(_get(run.config, "objective.name") or "")


def _finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


# --- wording ------------------------------------------------------------------------------------


def _fmt(value: Any) -> str:
    """Returns four decimals, or four digits where those would hide the number."""
    if not _finite(value):
        return _NONE
    plain = value == 0 or 1e-3 <= abs(value) < 1e4
    return _minus(f"{value:.4f}" if plain else f"{value:.4g}")


def _minus(text: str) -> str:
    return text.replace("-", "\u2212")


def _decimals(value: float) -> int:
    """Returns four, or as many as show three digits of a smaller value."""
    return max(4, 2 - math.floor(math.log10(abs(value)))) if value else 4


def _num(value: Any) -> Html:
    return el("td", _fmt(value), class_="n")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _si(value: float | None) -> str:
    if value is None:
        return _NONE
    for scale, suffix in (
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {suffix}"
    return f"{value:.4g}"


def _cut(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _joined(value: Any) -> str:
    """Returns the leaves of a tree on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {text}" for name, text in _flat(value).items())
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _variants(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return _cut(next(iter(counts)))
    total = sum(counts.values())
    shown = [f"{_cut(value, 160)} ({n} of {total})" for value, n in list(counts.items())[:3]]
    more = len(counts) - len(shown)
    return "; ".join(shown) + (f"; {more} more" if more else "")


def _lack(count: int) -> str:
    return f"{count} without a value" if count else ""
