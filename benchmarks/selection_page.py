"""Writes the tables of docs/results/selection.md from the numbers of its studies.

  python benchmarks/selection_page.py --out=docs/results/selection.md

What the tables support is written by hand above the mark, and kept.
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np

MARK = "<!-- tables: benchmarks/selection_page.py -->"
RESULTS = pathlib.Path(__file__).parent / "results"
SETTINGS = {"once": "12,800 lists, each seen once", "few": "320 lists, each seen forty times"}


def interval(gap: dict[str, Any]) -> str:
    low, high = gap["interval"]
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
        loss, setting = name.split("/")
        first = arms["first_stage"]
        n = len(found["about"]["seeds"])
        lines += [
            f"### Curricula, {loss} loss, {SETTINGS[setting]}",
            "",
            f"{n} seeds. The first stage has nDCG@10 {first['ndcg10']:.3f}, MRR@10 "
            f"{first['mrr10']:.3f}, P@1 {first['precision1']:.3f}.",
            "",
            "| arm | rate | nDCG@10 | minus none | minus random | MRR@10 | minus none | P@1 "
            "| beats none in nDCG@10 |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for arm, row in arms.items():
            if arm == "first_stage":
                continue
            none, other = row.get("minus none"), row.get("minus random")
            cells = [
                arm,
                f"{row['rate']:g}",
                f"{np.mean(row['ndcg10']):.3f}",
                interval(none["ndcg10"]) if none else "",
                interval(other["ndcg10"]) if other else "",
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, type=pathlib.Path)
    options = parser.parse_args()
    head = options.out.read_text().partition(MARK)[0] if options.out.exists() else "# Selection\n\n"
    lines = []
    for name, write in (("ranking_curricula", curricula), ("instruct_mining", mining)):
        path = RESULTS / f"{name}.json"
        if path.exists():
            lines += write(json.loads(path.read_text()))
    options.out.write_text("\n".join([head + MARK, "", *lines]).rstrip() + "\n")


if __name__ == "__main__":
    main()
