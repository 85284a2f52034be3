"""Turns finished studies into a page of tables and the numbers behind it.

  python tools/results_page.py --out=docs/results/trust_images \\
      --also=test/nll,test/ece runs/trust_images runs/trust_images_random

Writes OUT.md (the tables only: what they support is written by hand above them, and kept) and
OUT.json (every test metric and every measure of trust, by study, arm and seed). Studies that
OUT.json already has and that are not named stay; with `--add`, also arms of those that are named.
"""

import argparse
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from distill_jax.report import choices, statistics

MARK = "<!-- tables: tools/results_page.py -->"
BEST = "best state"
"""The compared metric of the state with the best held-out metric."""
KEPT = ("test/", "held_out/ratio_", "held_out/teacher_wrong_auc", "held_out/damaged_auc")
TRUST = {
    "ratio_right": "ratio, teacher right",
    "ratio_wrong": "teacher wrong",
    "teacher_wrong_auc": "AUC, wrong teacher",
    "damaged_auc": "AUC, damaged teacher",
    "ratio_clean": "clean label",
    "ratio_noisy": "noisy label",
}


def read(folder: pathlib.Path) -> dict[str, Any]:
    """Returns what a study measured: `{"values": {arm: {metric: {seed: value}}}, ...}`."""
    found = json.loads((folder / "study.json").read_text())
    values: dict[str, dict[str, dict[str, float]]] = {}
    for arm, entry in found["arms"].items():
        for seed, run in entry["seeds"].items():
            best = {BEST: run["best"]} if run.get("best") is not None else {}
            for name, value in {**(run.get("metrics") or {}), **best}.items():
                if name.startswith(KEPT) or name in (found["metric"], BEST):
                    values.setdefault(arm, {}).setdefault(name, {})[seed] = round(value, 6)
    costs = {arm: _cost(folder, entry) for arm, entry in found["arms"].items()}
    keys = ("title", "metric", "mode", "reference", "tuned", "fallback")
    measured = {"values": values, "costs": costs, "spent": spent(folder, found)}
    return {key: found.get(key) for key in keys} | measured


def spent(folder: pathlib.Path, found: Mapping[str, Any]) -> dict[str, float]:
    """Returns runs, minutes from build to result, and petaflops of the steps, of a whole study.

    Runs that were trained side by side share their time.
    """
    runs, seconds, flops = 0, 0.0, 0.0
    copies = {*(found.get("tuned") or {}), *(found.get("fallback") or {})}
    for arm in found["arms"].keys() - copies:
        for run in found["arms"][arm]["seeds"].values():
            path = folder / run["run"] / "result.json"
            result = json.loads(path.read_text()) if path.exists() else {}
            compute = result.get("compute", {})
            runs += bool(result)
            seconds += sum(compute.get("phases", {}).values())
            flops += (compute.get("flops_per_step") or 0.0) * result.get("steps", 0)
    return {"runs": runs, "minutes": round(seconds / 60, 1), "petaflop": round(flops / 1e15, 3)}


def spent_line(spent: Mapping[str, float]) -> str:
    return (
        f"{spent['runs']} runs took {spent['minutes']:g} minutes and {spent['petaflop']:g} "
        "petaflop in their steps."
    )


def _cost(folder: pathlib.Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    run = folder / next(iter(entry["seeds"].values()))["run"] / "result.json"
    compute = json.loads(run.read_text())["compute"] if run.exists() else {}
    flops = compute.get("flops_per_step")
    return {"gflops_per_step": round(flops / 1e9, 6) if flops else None}


def tables(study: Mapping[str, Any], also: list[str]) -> list[str]:
    """Returns the Markdown of one study."""
    lines = [f"## {study['title']}", ""]
    if study.get("spent"):
        lines += [spent_line(study["spent"]), ""]
    lines += _comparison(study, also)
    for name, chosen in (study["tuned"] or {}).items():
        means = ", ".join(f"{a} {m:.4f}" for a, m in sorted(chosen["candidates"].items()))
        arm = chosen.get("arm") or choices.seeds(chosen["seeds"])
        lines += ["", f"`{name}` is {arm}, by {chosen['by']} ({means})."]
    lines += [x for line in choices.sentences({}, study.get("fallback") or {}) for x in ("", line)]
    for table in (_against(study), _trust(study)):
        if table:
            lines += ["", *table]
    return lines


def _comparison(study: Mapping[str, Any], also: list[str]) -> list[str]:
    metric, values = study["metric"], study["values"]
    summaries = statistics.summarise(
        {arm: values[arm].get(metric, {}) for arm in values if metric in values[arm]},
        reference=study["reference"],
    )
    unit = study["costs"].get("kd_50", {}).get("gflops_per_step")
    head = ["arm", f"{metric} ± se", f"minus {study['reference']} ± se", "", *also]
    head += ["FLOPs of KD"] if unit else []
    rows = []
    for row in summaries:
        assert row.value is not None
        diff, cost = row.difference, study["costs"][row.arm]["gflops_per_step"]
        others = []
        for name in also:
            found = list(values[row.arm].get(name, {}).values())
            others.append(f"{statistics.estimate(found).mean:.4f}" if found else "")
        rows.append(
            [
                row.arm,
                _estimate(row.value),
                _estimate(diff, "+") if diff else "reference",
                statistics.conclusion(diff, mode=study["mode"]) if diff else "",
                *others,
                *([f"{cost / unit:.2f}" if cost else ""] if unit else []),
            ]
        )
    return _table(head, rows)


def _against(study: Mapping[str, Any]) -> list[str]:
    """TGeo-KD minus what it has to beat, paired by seed."""
    values, metric = study["values"], study["metric"]
    rows = []
    for arm in values:
        if arm in ("tgeo", "teacher") or metric not in values[arm] or "tgeo" not in values:
            continue
        pair = {name: values[name][metric] for name in ("tgeo", arm)}
        found = statistics.summarise(pair, reference=arm)[0].difference
        if found is not None:
            verdict = statistics.conclusion(found, mode=study["mode"])
            rows.append([arm, _estimate(found, "+"), _interval(found), verdict])
    return _table(["TGeo-KD minus", "difference ± se", "95 % interval", ""], rows)


def _trust(study: Mapping[str, Any]) -> list[str]:
    rows = []
    for arm, found in study["values"].items():
        cells = []
        for name in TRUST:
            seeds = list(found.get(f"test/{name}", {}).values())
            cells.append(_estimate(statistics.estimate(seeds), digits=3) if seeds else "")
        if any(cells):
            rows.append([arm, *cells])
    used = [i for i in range(1, len(TRUST) + 1) if any(row[i] for row in rows)]
    names = list(TRUST.values())
    head = ["on test examples", *(names[i - 1] for i in used)]
    return _table(head, [[row[0], *(row[i] for i in used)] for row in rows])


def _estimate(found: statistics.Estimate, sign: str = "", digits: int = 4) -> str:
    text = f"{found.mean:{sign}.{digits}f}"
    return f"{text} ± {found.se:.{digits}f}" if found.se is not None else text


def _interval(found: statistics.Estimate) -> str:
    return f"[{found.interval[0]:+.4f}, {found.interval[1]:+.4f}]" if found.interval else ""


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("studies", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--also", default="", help="further metrics, separated by commas")
    parser.add_argument("--add", action="store_true", help="stored arms not run again stay")
    options = parser.parse_args()
    stored = options.out.with_suffix(".json")
    studies = json.loads(stored.read_text()) if stored.exists() else {}
    for folder in options.studies:
        study, before = read(folder), studies.get(folder.name)
        for key in ("values", "costs") if options.add and before else ():
            study[key] = dict(sorted((before[key] | study[key]).items()))
        studies[folder.name] = study
    page = options.out.with_suffix(".md")
    above = page.read_text().partition(MARK)[0] if page.exists() else "# Results\n\n"
    also = [name for name in options.also.split(",") if name]
    body = [line for s in studies.values() for line in (*tables(s, also), "")]
    page.write_text(f"{above}{MARK}\n\n" + "\n".join(body).rstrip() + "\n")
    stored.write_text(json.dumps(studies, indent=None) + "\n")


if __name__ == "__main__":
    main()
