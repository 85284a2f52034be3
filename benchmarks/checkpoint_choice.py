"""Do label-free measures order the checkpoints of a run as a linear probe does?

  python benchmarks/checkpoint_choice.py --out=docs/results/ssl_masked_checkpoints.json \\
      --page=docs/results/ssl_masked.md runs/ssl_masked

Reads the metrics of finished runs of a study (`configs/studies/ssl_masked.py` evaluates at four
steps) and computes, for each method, the rank correlation (Spearman) over the checkpoints of a run
between the held-out accuracy of the probe and RankMe (Garrido et al. 2023, arXiv:2210.02885) of
held-out embeddings, LiDAR (Thilak et al. 2024, arXiv:2312.04000) of the last logged training batch,
the exponent of the spectrum (alpha-ReQ) and the training loss, all but RankMe and LiDAR with the
sign turned. The mean over seeds is reported, and beside it how often the measure would have chosen
the best checkpoint. With `--page`, learning curves and correlations are written behind a mark. With
`--add`, runs that the file of results has and the study lacks stay. Curves of held-out accuracy are
drawn beside the file of results, OUT_probe.svg and OUT_knn.svg; the dashed line is what raw pixels
have on test images.
"""

import argparse
import json
import math
import pathlib
from typing import Any

import numpy as np
from scipy import stats

from distill_jax.report import figures

MARK = "<!-- checkpoints: benchmarks/checkpoint_choice.py -->"
END = "<!-- end of checkpoints -->"
JUDGE = "held_out/probe_accuracy"
MEASURES = {
    "RankMe": ("held_out/rankme", 1.0),
    "LiDAR": ("/lidar", 1.0),
    "alpha-ReQ": ("held_out/alpha_req", -1.0),
    "loss": ("train/loss", -1.0),
}
CURVES = {"probe": "linear probe", "knn": "nearest neighbours"}


def checkpoints(path: pathlib.Path) -> list[dict[str, float]]:
    """Returns the evaluations of a run, each with the last metrics that were logged before it."""
    found, last = [], {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if JUDGE in row:
            found.append({**last, **row})
        elif "train/loss" in row:
            last = row
    return found


def value(row: dict[str, float], name: str) -> float:
    """Returns the metric of that name, or with that ending."""
    if name in row:
        return row[name]
    return next((x for key, x in row.items() if key.endswith(name)), math.nan)


def of_run(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Returns the curve of a run, and correlation and choice of each measure."""
    judged = [row[JUDGE] for row in rows]
    found: dict[str, Any] = {
        "steps": [row["step"] for row in rows],
        "probe": [round(x, 4) for x in judged],
        "knn": [round(row["held_out/knn_accuracy"], 4) for row in rows],
    }
    for name, (metric, sign) in MEASURES.items():
        measured = [sign * value(row, metric) for row in rows]
        known = np.isfinite(measured).all() and len(set(measured)) > 1 and len(set(judged)) > 1
        found[name] = {
            "correlation": float(stats.spearmanr(measured, judged).statistic) if known else None,
            "best": bool(known and judged[int(np.argmax(measured))] == max(judged)),
        }
    return found


def read(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Returns `{arm: {seed: what of_run returns}}` of the finished runs of a study."""
    study = json.loads((folder / "study.json").read_text())
    found: dict[str, dict[str, Any]] = {}
    for arm, entry in study["arms"].items():
        for seed, run in entry["seeds"].items():
            if run["status"] == "done":
                one = of_run(checkpoints(folder / run["run"] / "metrics.jsonl"))
                one["raw"] = {key: run["metrics"][f"test/{key}_accuracy_raw"] for key in CURVES}
                found.setdefault(arm, {})[seed] = one
    return found


def picture(runs: dict[str, dict[str, Any]], key: str) -> str:
    """Returns an SVG file: the mean held-out accuracy of each method over steps."""
    series, levels, seen = {}, [], []
    for i, (arm, seeds) in enumerate(runs.items(), start=1):
        curves = np.array([run[key] for run in seeds.values()])
        levels += [run["raw"][key] for run in seeds.values()]
        seen += [curves.min(), curves.max()]
        several = len(curves) > 1
        series[i] = figures.Series(
            name=arm,
            x=np.array(next(iter(seeds.values()))["steps"], float),
            y=curves.mean(axis=0),
            low=curves.min(axis=0) if several else None,
            high=curves.max(axis=0) if several else None,
        )
    level = float(np.mean(levels))
    low, high = min(level, *seen), max(level, *seen)
    margin = 0.05 * (high - low)
    plot = figures.line_chart(
        series,
        y_label=f"held-out accuracy, {CURVES[key]}",
        x_label=f"step (vertical: held-out accuracy, {CURVES[key]})",
        y_range=(low - margin, high + margin),
        level=level,
        names=True,
    )
    return figures.as_file(plot)


def tables(runs: dict[str, dict[str, Any]]) -> list[str]:
    """Returns the Markdown of curves and correlations."""
    steps = next(iter(next(iter(runs.values())).values()))["steps"]
    head = ["arm", "seeds", *(f"probe, {n:g} steps" for n in steps)]
    head += [f"knn, {n:g} steps" for n in steps]
    lines = [head]
    for arm, seeds in runs.items():
        row = [arm, f"{len(seeds)}"]
        for name in ("probe", "knn"):
            curve = np.mean([run[name] for run in seeds.values()], axis=0)
            row += [f"{x:.3f}" for x in curve]
        lines.append(row)
    choice = [["arm", *(f"{name}: correlation, best chosen" for name in MEASURES)]]
    for arm, seeds in runs.items():
        cells = [arm]
        for name in MEASURES:
            known = [r[name] for r in seeds.values() if r[name]["correlation"] is not None]
            mean = np.mean([x["correlation"] for x in known]) if known else math.nan
            hits = sum(x["best"] for x in known)
            cells.append(f"{mean:+.2f}, {hits} of {len(known)}" if known else "")
        choice.append(cells)
    found = []
    for table in (lines, choice):
        table.insert(1, ["---"] * len(table[0]))
        found += ["| " + " | ".join(row) + " |" for row in table] + [""]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("study", type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--page", type=pathlib.Path)
    parser.add_argument("--add", action="store_true", help="keep runs that the study lacks")
    options = parser.parse_args()
    if not (options.study / "study.json").is_file():
        parser.error(f"no study.json in {options.study}; --mode=study writes one")
    if options.page and not options.page.is_file():
        parser.error(f"no page {options.page}")
    stored = options.add and options.out.exists()
    runs = json.loads(options.out.read_text()) if stored else {}
    for arm, seeds in read(options.study).items():
        runs[arm] = runs.get(arm, {}) | seeds
    options.out.write_text(json.dumps(runs) + "\n")
    for key in CURVES:
        options.out.with_name(f"{options.out.stem}_{key}.svg").write_text(picture(runs, key))
    text = "\n".join(tables(runs))
    print(text)
    if options.page:
        before, _, rest = options.page.read_text().partition(MARK)
        after = rest.partition(END)[2]
        options.page.write_text(f"{before}{MARK}\n\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
