"""Turns finished studies into a page of tables and the numbers behind it.

  python tools/results_page.py --out=docs/results/trust_images \\
      --also=test/nll,test/ece runs/trust_images runs/trust_images_random

Writes OUT.md (the tables only: what they support is written by hand above them, and kept) and
OUT.json (every test metric and every measure of trust, by study, arm and seed). Studies that
OUT.json already has and that are not named stay; with `--add`, also arms and seeds of those that
are named, so that a study may be run in pieces, on several machines. With `--again=eval-*.json`,
runs that `--mode=eval` has measured with other evaluators have the metrics of that file.
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


def read(folder: pathlib.Path, again: str = "") -> dict[str, Any]:
    """Returns what a study measured: `{"values": {arm: {metric: {seed: value}}}, ...}`.

    Args:
      folder: of the study.
      again: pattern of a file of `--mode=eval` whose metrics of the last state replace a run's.
    """
    found = json.loads((folder / "study.json").read_text())
    values: dict[str, dict[str, dict[str, float]]] = {}
    for arm, entry in found["arms"].items():
        for seed, run in entry["seeds"].items():
            best = {BEST: run["best"]} if run.get("best") is not None else {}
            newer = sorted((folder / run["run"]).glob(again)) if again else []
            if len(newer) > 1:
                names = ", ".join(path.name for path in newer)
                raise SystemExit(f"{folder / run['run']}: {again} matches {names}; name one")
            states = [json.loads(path.read_text())["states"]["last"] for path in newer]
            measured = {**(run.get("metrics") or {}), **(states[0] if states else {}), **best}
            for name, value in measured.items():
                if name.startswith(KEPT) or name in (found["metric"], BEST):
                    values.setdefault(arm, {}).setdefault(name, {})[seed] = round(value, 6)
    costs = {arm: _cost(folder, entry) for arm, entry in found["arms"].items()}
    keys = ("title", "metric", "mode", "reference", "tuned", "fallback")
    study = {key: found.get(key) for key in keys} | {"values": values, "costs": costs}
    return study | {"spent": spent(folder, found)}


def spent(folder: pathlib.Path, found: Mapping[str, Any]) -> dict[str, float]:
    """Returns runs, minutes from build to result, and petaflops of the steps, of a whole study.

    Runs that were trained side by side share their time.
    """
    costs = {arm: _cost(folder, entry) for arm, entry in found["arms"].items()}
    return _total({**found, "costs": costs})


def _total(study: Mapping[str, Any]) -> dict[str, float]:
    copies = {*(study.get("tuned") or {}), *(study.get("fallback") or {})}
    arms = [cost["seeds"] for arm, cost in study["costs"].items() if arm not in copies]
    runs = [run for seeds in arms for run in seeds.values()]
    minutes, petaflop = (sum(run[key] for run in runs) for key in ("minutes", "petaflop"))
    return {"runs": len(runs), "minutes": round(minutes, 1), "petaflop": round(petaflop, 3)}


def add(before: Mapping[str, Any], study: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a study with the arms and seeds of an earlier reading that it lacks.

    The reference stays the earlier one: a piece with few arms may have another.
    """
    values = {arm: dict(found) for arm, found in before["values"].items()}
    for arm, found in study["values"].items():
        own = values.setdefault(arm, {})
        own |= {name: own.get(name, {}) | seeds for name, seeds in found.items()}
    costs = dict(before["costs"])
    for arm, cost in study["costs"].items():
        seeds = costs.get(arm, {}).get("seeds", {}) | cost["seeds"]
        costs[arm] = {**cost, "seeds": seeds}
    joined = {**study, "reference": before["reference"]}
    joined |= {"values": dict(sorted(values.items())), "costs": dict(sorted(costs.items()))}
    for key in ("tuned", "fallback"):
        joined[key] = (before.get(key) or {}) | (study.get(key) or {}) or None
    known = all("seeds" in cost for cost in costs.values())  # not in files of old
    return joined | {"spent": _total(joined) if known else None}


def spent_line(spent: Mapping[str, float]) -> str:
    return (
        f"{spent['runs']} runs took {spent['minutes']:g} minutes and {spent['petaflop']:g} "
        "petaflop in their steps."
    )


def _cost(folder: pathlib.Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Returns operations of a step, and minutes and petaflops of each seed that has a result."""
    flops, seeds = None, {}
    for seed, run in entry["seeds"].items():
        path = folder / run["run"] / "result.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        compute = result.get("compute", {})
        flops = flops or compute.get("flops_per_step")
        minutes = sum(compute.get("phases", {}).values()) / 60
        petaflop = (compute.get("flops_per_step") or 0.0) * result.get("steps", 0) / 1e15
        seeds[seed] = {"minutes": round(minutes, 3), "petaflop": round(petaflop, 7)}
    return {"gflops_per_step": round(flops / 1e9, 6) if flops else None, "seeds": seeds}


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
    measured = {name for found in values.values() for name in found}
    also = [name for name in also if name in measured and name != metric]
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


def study_folder(text: str) -> pathlib.Path:
    """Returns the folder of an argument; without a study there, the parser says so."""
    if not (pathlib.Path(text) / "study.json").is_file():
        raise argparse.ArgumentTypeError(f"no study.json in {text}; --mode=study writes one")
    return pathlib.Path(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("studies", nargs="+", type=study_folder)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--also", default="", help="further metrics where they exist, by commas")
    parser.add_argument("--again", default="", help="pattern of files of --mode=eval")
    parser.add_argument(
        "--add", action="store_true", help="stored arms and seeds that lack here stay"
    )
    options = parser.parse_args()
    stored = options.out.with_suffix(".json")
    studies = json.loads(stored.read_text()) if stored.exists() else {}
    for folder in options.studies:
        study, before = read(folder, options.again), studies.get(folder.name)
        studies[folder.name] = add(before, study) if options.add and before else study
    page = options.out.with_suffix(".md")
    above = page.read_text().partition(MARK)[0] if page.exists() else "# Results\n\n"
    also = [name for name in options.also.split(",") if name]
    body = [line for s in studies.values() for line in (*tables(s, also), "")]
    page.write_text(f"{above}{MARK}\n\n" + "\n".join(body).rstrip() + "\n")
    stored.write_text(json.dumps(studies, indent=None) + "\n")


if __name__ == "__main__":
    main()
