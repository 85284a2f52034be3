"""The report of one run."""

import os
from pathlib import Path

from distill_jax.core.errors import UserError
from distill_jax.evaluators import classification
from distill_jax.report import (
    compute,
    curves,
    examples,
    masks,
    provenance,
    representation,
    trust,
)
from distill_jax.report.folders import Run, lookup, read_alarms
from distill_jax.report.html import Html, el, join
from distill_jax.report.page import alert, muted, row, table, tiles, write
from distill_jax.report.provenance import config_table
from distill_jax.report.quality import calibration_panel, confusion_panel
from distill_jax.report.wording import duration, flat, fmt, is_finite


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
        ("trust", "Trust", trust.section({run.label: [run]}, {run.label: [run]})),
        ("calibration", "Calibration", _run_calibration(run)),
        ("confusion", "Confusion", _run_confusion(run)),
        ("examples", "Examples", examples.section(run, {r: (run, r) for r in run.roles})),
        ("masks", "Masks", masks.section(run)),
        ("embeddings", "Embeddings", representation.section(run)),
        ("compute", "Compute", compute.section({run.label: [run]})),
        ("provenance", "Provenance", provenance.section([run])),
        ("config", "Config", config_table(flat(run.config))),
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
        error = run.result.get("error")
        problems.insert(0, f"the run is {status}" + (f": {error}" if error else ""))
    return join(
        tiles(entries),
        alert("Alarms", read_alarms(run.path), stop=True),
        alert("Please note", problems),
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
    columns = {title: values for title, values in columns.items() if values}
    names = dict.fromkeys(name for values in columns.values() for name in values)
    rows = [row(name, (fmt(values.get(name)) for values in columns.values())) for name in names]
    if not rows:
        return None
    metric = lookup(run.config, "eval.metric")
    text = f"The best step is chosen by {metric}, not by the test split." if metric else ""
    return join(muted(text) if best and text else None, table(["", *columns], rows))


def _run_calibration(run: Run) -> Html | None:
    quality = {role: run.quality(role) for role in run.roles}
    return calibration_panel({r: (m, m["reliability"]) for r, m in quality.items() if m})


def _run_confusion(run: Run) -> Html | None:
    panels = []
    for i, role in enumerate(run.roles):
        metrics = run.evaluate(classification.make(role=role), role)
        if metrics:
            panels.append(confusion_panel(metrics["confusion"], run.classes, role, i + 1))
    return el("div", panels, class_="grid2") if panels else None
