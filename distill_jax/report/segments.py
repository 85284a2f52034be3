"""How a run went on differently, and what was measured of it elsewhere."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_jax.report import sharing
from distill_jax.report.folders import Run
from distill_jax.report.html import Html, el, join
from distill_jax.report.page import muted, row, table
from distill_jax.report.wording import cut, fmt, is_finite
from distill_jax.trainer.io import files

EVALUATION: files.Shape = {
    "changes": {"*": [str]},
    "states": {"*": files.NUMBERS},
    "evaluated?": str,
    "provenance?": {"*": files.Mapping},
}
"""Contents of `eval-*.json`."""


def section(run: Run) -> Html | None:
    """Returns the table of the segments, of a run that went on differently."""
    if len(run.segments) < 2:
        return None
    rows, kept = [], []
    for segment in run.segments:
        changes = "; ".join(described(segment)) or "as it began"
        old, new = (*segment.get("learning_rate", ()), None, None)[:2]
        rate = f"{old:.4g} → {new:.4g}" if is_finite(old) and is_finite(new) else ""
        cells = [
            el("td", f"{segment['from']:,} to {segment['to']:,}", class_="n"),
            el("td", cut(changes), class_="code"),
            el("td", rate, class_="n"),
            el("td", segment.get("started", "")),
            el("td", str((segment.get("versions") or {}).get("distill_jax", ""))),
        ]
        rows.append([el("th", len(rows) + 1, scope="row"), *cells])
        kept += [f"segments/{segment['to']}"] * (run.path / f"segments/{segment['to']}").is_dir()
    heads = ["segment", "steps", "changed", "learning rate", "started (UTC)", "distill_jax"]
    text = "Schedules are functions of the step and the length of training: from the first step of "
    text += "a segment they are those of its config. Learning curves mark these steps."
    if kept:
        text += f" The results of earlier ends are kept in {', '.join(kept)}."
    return join(muted(text), table(heads, rows, numeric=False))


def described(segment: Mapping[str, Any]) -> list[str]:
    """Returns `"path: old → new"` for each change."""
    return [f"{path}: {old} → {new}" for path, (old, new) in segment["changes"].items()]


def summary(segments: Sequence[Mapping[str, Any]]) -> str:
    """Returns what changed and where, in one line, empty for a run that never changed."""
    parts = [f"from step {s['from']}: {'; '.join(described(s))}" for s in segments[1:]]
    return " | ".join(parts)


def unfinished(run: Run) -> str:
    """Returns a note where the result is that of an earlier end of a run."""
    steps = run.result.get("steps")
    if not run.segments or not isinstance(steps, int) or run.segments[-1]["to"] <= steps:
        return ""
    last = run.segments[-1]
    return f"result.json is of step {steps}: the run is being extended to step {last['to']}"


def elsewhere(run: Run) -> Html | None:
    """Returns a table of the metrics on other data, one column for each evaluation."""
    found, notes = evaluations(run.path)
    if not found:
        return muted("; ".join(notes)) if notes else None
    rows = []
    for i, content in enumerate(found.values()):
        changes = "; ".join(described(content))
        sizes = ", ".join(
            f"{split} {part.get('n')}" for split, part in content.get("provenance", {}).items()
        )
        cells = [el("td", x) for x in (cut(changes), sizes, content.get("evaluated", ""))]
        rows.append([el("th", _letter(i), scope="row"), *cells])
    columns = {
        f"{_letter(i)}, {state}": metrics
        for i, content in enumerate(found.values())
        for state, metrics in content["states"].items()
    }
    names = dict.fromkeys(n for metrics in columns.values() for n in metrics if n != "step")
    metric = str((run.config.get("eval") or {}).get("metric") or "").rpartition("/")[2]
    order = sorted(names, key=lambda n: (n.rpartition("/")[2] not in (metric, "accuracy"), n))
    values = [row(n, (fmt(m.get(n)) for m in columns.values())) for n in ["step", *order]]
    return join(
        muted(
            "Measured by --mode=eval with other data or evaluators than those of the run, with the "
            f"networks and input statistics of the run. From {', '.join(found)}."
        ),
        table(["", "measured with", "examples", "when (UTC)"], rows, numeric=False),
        table(["", *columns], values),
        *(muted(note) for note in notes),
    )


def evaluations(folder: Path) -> tuple[dict[str, Any], Sequence[str]]:
    """Returns the contents of the `eval-*.json` of a run by name, and notes on damaged ones."""
    found, notes = {}, []
    for path in sorted(folder.glob("eval-*.json")):
        try:
            content = sharing.scrubbed(files.read_json(path, shape=EVALUATION), folder)
        except files.DamagedFile as error:
            notes.append(f"{path.name} {error.what}")
            continue
        if all(len(pair) == 2 for pair in content["changes"].values()):
            found[path.name] = content
    return found, notes


def _letter(i: int) -> str:
    return chr(ord("A") + i) if i < 26 else str(i + 1)
