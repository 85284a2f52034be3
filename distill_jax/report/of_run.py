"""The report of one run."""

import os
import re
from pathlib import Path

import numpy as np

from distill_jax.core.errors import UserError
from distill_jax.evaluators import classification
from distill_jax.report import (
    compute,
    curves,
    examples,
    masks,
    provenance,
    representation,
    samples,
    segments,
    trust,
)
from distill_jax.report.folders import Run, lookup, read_alarms
from distill_jax.report.html import Html, el, join
from distill_jax.report.page import alert, grid, muted, row, table, tiles, write
from distill_jax.report.provenance import config_table
from distill_jax.report.quality import calibration_panel, confusion_panel
from distill_jax.report.statistics import estimate
from distill_jax.report.wording import better, duration, flat, fmt, is_finite, joined, minus


def write_run_report(run_dir: str | os.PathLike[str]) -> Path:
    """Writes `report.html` into a run folder and returns its path.

    Every file of the folder is optional, so that interrupted runs can be reported too. Missing
    files are listed at the top of the report.

    Raises:
      UserError: the folder is absent or holds none of a run's files.
    """
    run = Run.read(Path(run_dir), label=Path(run_dir).name)
    if not run.exists:
        raise UserError(
            "there is no run to report",
            where=str(run_dir),
            hint="a run folder holds config.json, metrics.jsonl or result.json",
        )
    named = (lookup(run.config, name) for name in ("objective.name", "data.name"))
    title = " · ".join(str(part) for part in (*named, run.label) if part)
    sections = [
        ("result", "Result", _run_result(run)),
        (
            "curves",
            "Learning curves",
            curves.section({run.label: [run]}, names=run.metric_names(12)),
        ),
        ("segments", "Segments", segments.section(run)),
        ("elsewhere", "Other data", segments.elsewhere(run)),
        ("trust", "Trust", trust.section({run.label: [run]}, {run.label: [run]})),
        ("calibration", "Calibration", _run_calibration(run)),
        ("confusion", "Confusion", _run_confusion(run)),
        ("examples", "Examples", examples.section(run, {r: (run, r) for r in run.roles})),
        ("masks", "Masks", masks.section(run)),
        ("samples", "Samples of text", samples.section(run)),
        ("embeddings", "Embeddings", representation.section(run)),
        ("compute", "Compute", compute.section({run.label: [run]})),
        ("provenance", "Provenance", provenance.section([run])),
        ("config", "Config", _run_config(run)),
    ]
    return write(run.path, kicker="Run report", title=title, lead=_run_lead(run), sections=sections)


def _run_lead(run: Run) -> Html:
    status = str(run.result.get("status", ""))
    steps = run.result.get("steps", run.records[-1].get("step") if run.records else None)
    entries = [("status", status or "no result")]
    if steps is not None:
        entries.append(("steps", f"{steps:,}" if isinstance(steps, int) else str(steps)))
    if "seed" in run.result or "seed" in run.config:
        entries.append(("seed", str(run.result.get("seed", run.config.get("seed")))))
    if run.result.get("arm"):
        entries.append(("arm", str(run.result["arm"])))
    seconds = lookup(run.result, "compute.seconds")
    if is_finite(seconds):
        entries.append(("time", duration(float(seconds))))
    problems = [note for note in run.notes if note != "result.json is missing"]
    if not status:
        at = f"; the last record is of step {steps}" if steps is not None else ""
        problems.insert(0, f"no result.json: the run was interrupted or still goes{at}")
    elif status != "done":
        error = run.result.get("error") or run.result.get("reason")
        problems.insert(0, f"the run is {status}" + (f": {error}" if error else ""))
    if note := segments.unfinished(run):
        problems.insert(0, note)
    if len(run.segments) > 1:
        entries.append(("segments", str(len(run.segments))))
    answers = [el("li", text) for text in _answers(run)]
    return join(
        el("ul", answers) if answers else None,
        tiles(entries),
        alert("Alarms", read_alarms(run.path), stop=True),
        alert("Please note", problems),
    )


def _answers(run: Run) -> list[str]:
    """Returns the headline metric, and the student beside its teacher and a constant guess."""
    metric = str(lookup(run.config, "eval.metric") or "")
    final, best = (run.result.get(key) or {} for key in ("metrics", "best"))
    name = f"test/{metric.rpartition('/')[2]}"
    answers = []
    if is_finite(final.get(name)):
        text = f"{name}{better(name)} is {fmt(final[name])} after the last step"
        if is_finite(best.get(name)) and best.get("step") != run.result.get("steps"):
            text += f", and {fmt(best[name])} at step {best['step']}, which {metric} selects"
        answers.append(f"{text}.")
    right = {role: r for role in run.roles if (r := _right(run, role)) is not None}
    student = right.pop("student", None)
    if student is None:
        return answers
    label = run.array("label")
    guess = float(np.bincount(label[label >= 0]).max() / len(label))
    others = [f"the most frequent class {guess:.4f}"]
    for role, values in right.items():
        difference = estimate((student - values).tolist())
        low, high = difference.interval or (difference.mean, difference.mean)
        others.insert(
            -1,
            f"{role} {values.mean():.4f} (student minus {role} {difference.mean:+.4f}, 95 % "
            f"interval [{low:+.4f}, {high:+.4f}] over examples)",
        )
    what = f"Of {len(student):,} test examples the student predicts {student.mean():.4f} right"
    return [*answers, minus(f"{what}; {'; '.join(others)}.")]


def _right(run: Run, role: str) -> np.ndarray | None:
    """Returns 1 where a prediction is right, float `[n]`; None if it is no classifier's."""
    try:
        logits, label = run.array(f"logits_{role}"), run.array("label")
    except (KeyError, ValueError):  # absent, or objects, which are not unpickled
        return None
    if logits.ndim != 2 or label.ndim != 1 or label.dtype.kind not in "iu":
        return None
    if len(logits) != len(label) or label.max(initial=0) >= logits.shape[1] or len(label) < 2:
        return None
    return (logits.argmax(axis=1) == label).astype(np.float64)


def _run_config(run: Run) -> Html | None:
    """Returns the config; values of the command line are marked and come first."""
    leaves = flat(run.config)
    given = re.findall(r"--?config\.([\w.]+)", joined(run.env.get("command", "")))
    of_command = {
        n: v for n, v in leaves.items() if any(f"{n}.".startswith(f"{g}.") for g in given)
    }
    rest = {name: value for name, value in leaves.items() if name not in of_command}
    if not of_command:
        return config_table(rest)
    return join(
        el("h3", "Set on the command line"),
        config_table(of_command),
        el("h3", "From the config file"),
        config_table(rest),
    )


def _run_result(run: Run) -> Html | None:
    best = run.result.get("best") or {}
    states = {"last step": run.result.get("metrics") or {}, f"best step, {best.get('step')}": best}
    columns = {
        f"{split}, {state}": {
            name.partition("/")[2]: value
            for name, value in metrics.items()
            if name.startswith(f"{split}/") and is_finite(value)
        }
        for split in ("held_out", "test")
        for state, metrics in states.items()
    }
    for role in run.roles:
        if role != "student":
            columns[f"test, {role}"] = {n: v for n, v in run.quality(role).items() if is_finite(v)}
    columns = {title: values for title, values in columns.items() if values}
    measured = {name: None for values in columns.values() for name in values}
    metric = str(lookup(run.config, "eval.metric") or "")
    first = (metric.rpartition("/")[2], "accuracy")
    names = dict.fromkeys(name for name in (*first, *measured) if name in measured)
    rows = [row(name, (fmt(values.get(name)) for values in columns.values())) for name in names]
    if not rows:
        return None
    text = f"The best step is chosen by {metric}{better(metric)}, not by the test split."
    return join(muted(text) if best and metric else None, table(["", *columns], rows))


def _run_calibration(run: Run) -> Html | None:
    quality = {role: run.quality(role) for role in run.roles}
    return calibration_panel({r: (m, m["reliability"]) for r, m in quality.items() if m})


def _run_confusion(run: Run) -> Html | None:
    panels = []
    for i, role in enumerate(run.roles):
        metrics = run.evaluate(classification.make(role=role), role)
        if metrics:
            panels.append(confusion_panel(metrics["confusion"], run.classes, role, i + 1))
    return grid(panels) if panels else None
