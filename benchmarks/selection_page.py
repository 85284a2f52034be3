"""Writes the tables of docs/results/selection.md from the numbers of its studies.

  python -m benchmarks.selection_page --out=docs/results/selection.md

What the tables support is written by hand above the mark, and kept.
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np

from benchmarks._sequences import paired
from distill_jax.report.statistics import estimate

MARK = "<!-- tables: benchmarks/selection_page.py -->"
RESULTS = pathlib.Path(__file__).parent / "results"
SETTINGS = {"once": "12,800 lists, each seen once", "few": "320 lists, each seen forty times"}


def interval(gap: dict[str, Any]) -> str:
    low, high = gap["interval"] or (gap["mean"], gap["mean"])
    return f"{gap['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"


def verdict(gap: dict[str, Any], *, smaller: bool = False) -> str:
    low, high = gap["interval"]
    if smaller:
        low, high = -high, -low
    return "holds" if low > 0 else "contradicted" if high < 0 else "null"


def curricula(found: dict[str, Any]) -> list[str]:
    """Tables of `ranking_curricula.py`, one for each loss and number of lists."""
    lines = []
    for name, arms in found.items():
        if name == "about":
            continue
        loss, setting, *fine = name.split("/")
        first, other = arms["first_stage"], "by class" if fine else "random"
        n = len(found["about"]["seeds"])
        lines += [
            f"### Curricula, {loss} loss, {SETTINGS[setting]}{', finer rates' * bool(fine)}",
            "",
            f"{n} seeds. The first stage has nDCG@10 {first['ndcg10']:.3f}, MRR@10 "
            f"{first['mrr10']:.3f}, P@1 {first['precision1']:.3f}.",
            "",
            f"| arm | rate | nDCG@10 | minus none | minus {other} | MRR@10 | minus none | P@1 "
            "| beats none in nDCG@10 |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for arm, row in arms.items():
            if arm == "first_stage":
                continue
            none, gap = row.get("minus none"), row.get(f"minus {other}")
            cells = [
                arm,
                f"{row['rate']:g}",
                f"{np.mean(row['ndcg10']):.3f}",
                interval(none["ndcg10"]) if none else "",
                interval(gap["ndcg10"]) if gap else "",
                f"{np.mean(row['mrr10']):.3f}",
                interval(none["mrr10"]) if none else "",
                f"{np.mean(row['precision1']):.3f}",
                verdict(none["ndcg10"]) if none else "reference",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return lines


def mining(found: dict[str, Any]) -> list[str]:
    """Tables of `instruct_mining.py`."""
    about = found["about"]
    lines = [
        "### InstructMining: prediction",
        "",
        f"{about['fitted']} of {about['subsets']} subsets of {about['size']} pieces are fitted, "
        f"the others predicted; {about['steps']} steps of a network of {about['parameters']:,} "
        "parameters.",
        "",
        "| subsets | predicted by | R2 of the log loss | rank correlation | p |",
        "|---|---|---|---|---|",
    ]
    for family in ("tilted", "uniform"):
        if family not in found:
            continue
        rows = found[family]
        entries = {f"the {name} subsets": q for name, q in rows["prediction"].items()}
        entries |= {f"{name} alone": q for name, q in rows["single"].items()}
        entries["the same training from another initialization"] = rows["two initializations"]
        for name, q in entries.items():
            r2 = "" if name.startswith("the same") else f"{q['r2']:.2f}"
            lines.append(f"| {family} | {name} | {r2} | {q['spearman']:+.2f} | {q['p']:.2g} |")
    if "summary" not in found:
        return [*lines, ""]
    lines += [
        "",
        "### InstructMining: selection",
        "",
        "| selected by | test bits per token | minus random | beats random | rule minus this |",
        "|---|---|---|---|---|",
    ]
    for way, row in found["summary"].items():
        gap, rule = row.get("minus random"), row.get("rule minus this")
        cells = [
            way,
            f"{np.mean(row['test']):.3f}",
            interval(gap) if gap else "",
            verdict(gap, smaller=True) if gap else "reference",
            interval(rule) if rule else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def courses(found: dict[str, Any]) -> list[str]:
    """Tables of `courses.py`: probes, and how well alterations are detected."""
    arms, about = found["arms"], found["about"]
    seeds = sorted(set.intersection(*(set(row["runs"]) for row in arms.values())))
    if not seeds:
        return []

    def values(arm: str, *path: str) -> list[float]:
        found = []
        for seed in seeds:
            value = arms[arm]["runs"][seed]
            for name in path:
                value = value[name]
            found.append(value)
        return found

    def minus(arm: str, other: str, kind: str) -> str:
        gap = interval(paired(values(arm, kind), values(other, kind)))
        return "reference" if arm == other else gap

    lines = [
        "### MCL: linear probes of frozen encoders",
        "",
        f"{len(seeds)} seeds, {about['steps']} steps of {about['batch']} rows. Balanced accuracy.",
        "",
        "| arm | rate | MFLOP a step | token | minus mlm | minus electra | statement | minus mlm "
        "| minus electra |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, row in arms.items():
        cells = [arm, f"{row['rate']:g}" if row["rate"] else ""]
        cells.append(f"{row['flops'] / 1e6:,.0f}" if "flops" in row else "")
        for kind in ("token", "statement"):
            cells.append(f"{np.mean(values(arm, kind)):.3f}")
            cells += [minus(arm, other, kind) for other in ("mlm", "electra")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "### MCL: detection on test rows",
        "",
        "| arm | detection | altered | accuracy | minus never altered | area under the curve |",
        "|---|---|---|---|---|---|",
    ]
    for arm, row in arms.items():
        for name in ("rtd", "std", "itd"):
            if name not in row["runs"][seeds[0]]:
                continue
            right, auc = values(arm, name, "accuracy"), values(arm, name, "auc")
            altered = values(arm, name, "altered")
            gap, area = paired(right, [1 - x for x in altered]), estimate(auc)
            low, high = area.interval or (area.mean, area.mean)
            cells = [arm, name, f"{np.mean(altered):.3f}", f"{np.mean(right):.3f}", interval(gap)]
            lines.append(f"| {' | '.join(cells)} | {area.mean:.3f} [{low:.3f}, {high:.3f}] |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, type=pathlib.Path)
    options = parser.parse_args()
    head = options.out.read_text().partition(MARK)[0] if options.out.exists() else "# Selection\n\n"
    lines = []
    studies = {
        "ranking_curricula": curricula,
        "instruct_mining": mining,
        "courses": courses,
    }
    for name, write in studies.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            lines += write(json.loads(path.read_text()))
    options.out.write_text("\n".join([head + MARK, "", *lines]).rstrip() + "\n")


if __name__ == "__main__":
    main()
