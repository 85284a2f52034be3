"""Draws gains over labels alone against what a study varies, and writes their tables.

  python tools/gains_page.py --out=docs/results/gains \\
      runs/gains_labels runs/gains_teacher runs/gains_length

Reads finished studies of `configs/studies/gains.py`. Writes OUT.json (test accuracy of every point,
method and seed, and the settings that were chosen), a picture OUT_NAME.svg of each study, and the
tables of OUT.md behind its mark; what is above the mark is written by hand, and kept. Studies that
OUT.json already has and that are not named stay.
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np
import results_page

from distill_jax.report import figures, statistics

MARK = "<!-- tables: tools/gains_page.py -->"
METHODS = ("kd", "dist", "own")
AXES = {
    "labels": "labels per class",
    "teacher": "test accuracy of the teacher",
    "length": "steps of the student",
}


def read(folder: pathlib.Path) -> dict[str, Any]:
    """Returns what a study measured.

    `points` is `{level: {method: {"arm": chosen, "values": {seed: accuracy}}}}`, `teachers` the
    accuracies of the arms that only teach, by arm and seed.
    """
    found = json.loads((folder / "study.json").read_text())

    def values(arm: str) -> dict[str, float]:
        runs = found["arms"][arm]["seeds"].items()
        metrics = {seed: (run.get("metrics") or {}).get(found["metric"]) for seed, run in runs}
        return {seed: round(x, 6) for seed, x in metrics.items() if x is not None}

    points: dict[str, dict[str, Any]] = {}
    for name, chosen in found["tuned"].items():
        method, level = name.split("_")
        points.setdefault(level, {})[method] = {
            "arm": chosen["arm"],
            "held_out": chosen["candidates"],
            "values": values(chosen["arm"]),
        }
    teachers = {arm: values(arm) for arm in found["arms"] if arm.startswith("teacher_")}
    study = folder.name.rpartition("_")[2]
    return {
        "study": study,
        "title": found["title"],
        "points": points,
        "teachers": teachers,
        "spent": results_page.spent(folder, found),
    }


def gains(study: dict[str, Any]) -> list[tuple[float, str, str, dict[str, float]]]:
    """Returns `(x, level, method, gain over alone by seed)`, in order of x."""
    rows = []
    for level, methods in study["points"].items():
        alone = methods.get("alone") or study["points"]["0"]["alone"]
        if study["study"] == "teacher":
            if level == "0":
                continue
            x = float(np.mean(list(study["teachers"][f"teacher_{level}"].values())))
        else:
            x = float(level)
        for method in METHODS:
            if method in methods:
                own, base = methods[method]["values"], alone["values"]
                rows.append((x, level, method, {s: own[s] - base[s] for s in own if s in base}))
    return sorted(rows, key=lambda row: row[0])


def picture(study: dict[str, Any]) -> str:
    """Returns an SVG file: mean gains with their 95 % intervals, a line for each method."""
    rows, series = gains(study), {}
    for i, method in enumerate(METHODS, start=1):
        own = [(x, statistics.estimate(list(d.values()))) for x, _, m, d in rows if m == method]
        if own:
            low, high = zip(*(e.interval or (e.mean, e.mean) for _, e in own), strict=True)
            series[i] = figures.Series(
                name=method,
                x=np.array([x for x, _ in own]),
                y=np.array([e.mean for _, e in own]),
                low=np.array(low),
                high=np.array(high),
            )
    plot = figures.line_chart(
        series,
        y_label="test accuracy minus labels alone",
        x_label=f"{AXES[study['study']]} (vertical: test accuracy minus labels alone)",
        log_x=study["study"] != "teacher",
        level=0.0,
        names=True,
    )
    return figures.as_file(plot)


def table(study: dict[str, Any]) -> list[str]:
    """Returns the Markdown of one study."""
    axis = AXES[study["study"]]
    lines = [f"## {study['title']}", "", results_page.spent_line(study["spent"]), ""]
    if study["study"] == "teacher":
        lines.append("| teacher | its accuracy | alone |")
    else:
        lines.append(f"| {axis} | alone |")
    named = [m for m in METHODS if any(m in p for p in study["points"].values())]
    lines[-1] += "".join(f" {method} minus alone |" for method in named)
    lines.append("|" + " --- |" * (lines[-1].count("|") - 1))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for _, level, method, diff in gains(study):
        found.setdefault(level, {})[method] = diff
    for level, methods in found.items():
        alone = (study["points"][level].get("alone") or study["points"]["0"]["alone"])["values"]
        cells = [level]
        if study["study"] == "teacher":
            teachers = list(study["teachers"][f"teacher_{level}"].values())
            cells.append(f"{statistics.estimate(teachers).mean:.4f}")
        cells.append(f"{statistics.estimate(list(alone.values())).mean:.4f}")
        for method in named:
            if method not in methods:
                cells.append("")
                continue
            e = statistics.estimate(list(methods[method].values()))
            interval = f" [{e.interval[0]:+.4f}, {e.interval[1]:+.4f}]" if e.interval else ""
            cells.append(f"{e.mean:+.4f}{interval}")
        lines.append("| " + " | ".join(cells) + " |")
    chosen = [p["arm"] for methods in study["points"].values() for p in methods.values()]
    return [*lines, "", f"Chosen by held-out accuracy: {', '.join(chosen)}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("studies", nargs="+", type=results_page.study_folder)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    options = parser.parse_args()
    stored, page = options.out.with_suffix(".json"), options.out.with_suffix(".md")
    studies = json.loads(stored.read_text()) if stored.exists() else {}
    for folder in options.studies:
        study = read(folder)
        studies[study["study"]] = study
    for name, study in studies.items():
        options.out.with_name(f"{options.out.name}_{name}.svg").write_text(picture(study))
    above = page.read_text().partition(MARK)[0] if page.exists() else "# Results\n\n"
    body = [line for study in studies.values() for line in (*table(study), "")]
    page.write_text(f"{above}{MARK}\n\n" + "\n".join(body).rstrip() + "\n")
    stored.write_text(json.dumps(studies) + "\n")


if __name__ == "__main__":
    main()
