"""What the pieces of the suite of learned trust say: choices, differences, tables, a picture."""

from collections.abc import Mapping
from importlib import resources
from typing import Any

import numpy as np
import trust_suite as suite_lib
from _trust_situations import SET_ASIDE, SITUATIONS

from distill_jax.report import figures, statistics
from distill_jax.run import environment

DOMAINS = ("table", "images")
GAIN = 0.02  # of the oracle over the tuned constant, above which the aim demands a gain
AGAINST = ("constant", "constant_more", "alone", "clean", "best_rival", "oracle")


def better(learned: Mapping[str, Any], constant: Mapping[str, Any]) -> bool:
    """Whether `tgeo_kd` takes the learned ratio: more selecting examples right, by one error."""
    gain = learned["right"] - constant["right"]
    return bool(gain.mean() > gain.std(ddof=1) / np.sqrt(len(gain)))


def chosen(piece: Mapping[str, np.ndarray]) -> dict[str, Any]:
    setting, time = suite_lib.choose(piece)
    row = {name: piece[name][setting, time] for name in ("right", "loss", "test", "share")}
    return {**row, "setting": setting, "time": time}


def arms_of(suite: suite_lib.Suite, domain: str, name: str, seed: int) -> dict[str, dict]:
    """Returns the choice of every arm in one seed, those made of others included."""
    found = {
        arm: chosen(suite.read(domain, name, arm, seed))
        for arm in suite_lib.ARMS
        if suite.path(domain, name, arm, seed).exists()
    }
    for arm, learned, constant in (
        ("tgeo_kd", "around", "constant"),
        ("tgeo_kd_more", "around_more", "constant_more"),
    ):
        if learned in found and constant in found:
            took = better(found[learned], found[constant])
            found[arm] = {**found[learned if took else constant], "learned": took}
    return found


def cell(suite: suite_lib.Suite, domain: str, name: str) -> dict[str, Any] | None:
    """Returns arms and differences of a situation in a domain; None where nothing has run."""
    folder = suite.folder / domain / name / "constant"
    seeds = sorted(int(p.stem) for p in folder.glob("*.npz"))
    if not seeds:
        return None
    runs = {seed: arms_of(suite, domain, name, seed) for seed in seeds}
    tests = {
        arm: {seed: float(run[arm]["test"]) for seed, run in runs.items() if arm in run}
        for arm in (*suite_lib.ARMS, "tgeo_kd", "tgeo_kd_more")
    }
    tests = {arm: by_seed for arm, by_seed in tests.items() if by_seed}
    rivals = {a: np.mean(list(tests[a].values())) for a in suite_lib.RIVALS if a in tests}
    result: dict[str, Any] = {
        "test": {a: {s: round(x, 4) for s, x in t.items()} for a, t in tests.items()},
        "learned": {
            arm: [int(run[arm]["learned"]) for run in runs.values() if arm in run]
            for arm in ("tgeo_kd", "tgeo_kd_more")
        },
        "ratio": {
            arm: round(float(np.mean([r[arm]["share"] for r in runs.values() if arm in r])), 3)
            for arm in ("tgeo", "tgeo_start", "around", "two_speed")
            if arm in tests
        },
    }
    if rivals:
        result["best_rival"] = max(rivals, key=lambda arm: rivals[arm])
        tests["best_rival"] = tests[result["best_rival"]]
    result["minus"] = {}
    for arm, reference in (
        *(("tgeo_kd", other) for other in AGAINST),
        *((arm, "constant") for arm in tests if arm not in ("constant", "tgeo_kd")),
        ("tgeo_kd_more", "constant_more"),
        ("around", "tgeo_start"),
        ("around", "shuffled"),
        ("around", "frozen"),
    ):
        if arm in tests and reference in tests:
            both = [s for s in tests[arm] if s in tests[reference]]
            found = statistics.estimate([tests[arm][s] - tests[reference][s] for s in both])
            low, high = found.interval or (float("nan"), float("nan"))
            row = {"mean": found.mean, "low": low, "high": high}
            result["minus"][f"{arm}-{reference}"] = {k: round(v, 4) for k, v in row.items()}
    return result


def result(suite: suite_lib.Suite) -> dict[str, Any]:
    cells = {
        f"{domain}/{name}": found
        for domain in DOMAINS
        for name in (*SITUATIONS, *SET_ASIDE)
        if (found := cell(suite, domain, name))
    }
    versions = environment.describe_environment()["versions"]
    return {"cells": cells, "summary": summary(cells), "versions": versions}


def summary(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Counts over situations, for all of them and for those that were set aside."""

    def of(chosen: Mapping[str, Any], arm: str, reference: str) -> dict[str, Any]:
        rows = {n: c["minus"][f"{arm}-{reference}"] for n, c in chosen.items()
                if f"{arm}-{reference}" in c["minus"]}  # fmt: skip
        return {
            "of": len(rows),
            "below_0": [n for n, r in rows.items() if r["high"] < 0],
            "above_0": [n for n, r in rows.items() if r["low"] > 0],
            "mean_below_0": sum(r["mean"] < 0 for r in rows.values()),
            "half_width_above_.01": sum(r["high"] - r["low"] > 0.02 for r in rows.values()),
        }

    found = {}
    aside = {n: c for n, c in cells.items() if n.split("/")[1] in SET_ASIDE}
    for title, part in (("all", cells), ("set_aside", aside)):
        gains = {
            n: (c["minus"]["tgeo_kd-constant"]["mean"], c["minus"]["oracle-constant"]["mean"])
            for n, c in part.items()
            if {"tgeo_kd-constant", "oracle-constant"} <= set(c["minus"])
        }
        shares = {n: round(a / b, 2) for n, (a, b) in gains.items() if b > GAIN}
        found[title] = {
            **{f"tgeo_kd-{o}": of(part, "tgeo_kd", o) for o in AGAINST},
            **{f"{a}-constant": of(part, a, "constant")
               for a in ("tgeo", "tgeo_start", "around", "two_speed", "frozen", "shuffled",
                         *suite_lib.RIVALS)},
            "tgeo_kd_more-constant_more": of(part, "tgeo_kd_more", "constant_more"),
            "share_of_oracle": shares,
            "median_share": round(float(np.median(list(shares.values()))), 2) if shares else None,
        }  # fmt: skip
    return found


def table(cells: Mapping[str, Any]) -> str:
    """Returns the Markdown table of test accuracies, one row a situation."""
    names = ("alone", "clean", "constant", "constant_more", "oracle", "frozen", "shuffled",
             "tgeo", "two_speed", "tgeo_start", "around", "tgeo_kd", "tgeo_kd_more",
             *suite_lib.RIVALS)  # fmt: skip
    lines = ["| situation | " + " | ".join(names) + " |", "| --- |" + " --: |" * len(names)]
    for n, c in cells.items():
        means = [np.mean(list(c["test"][a].values())) if a in c["test"] else None for a in names]
        row = " | ".join("-" if m is None else f"{m:.3f}" for m in means)
        lines.append(f"| {n} | {row} |")
    return "\n".join(lines)


def differences(cells: Mapping[str, Any]) -> str:
    """Returns the Markdown table of paired differences with their 95 % intervals."""
    pairs = [
        ("tgeo_kd", "constant"), ("tgeo_kd", "constant_more"), ("tgeo_kd_more", "constant_more"),
        ("tgeo_kd", "best_rival"), ("tgeo_start", "constant"), ("around", "constant"),
        ("oracle", "constant"),
    ]  # fmt: skip
    head = " | ".join(f"{a} - {b}" for a, b in pairs)
    lines = [f"| situation | seeds | {head} | best rival | learned |",
             "| --- | --: |" + " :-: |" * len(pairs) + " --- | --: |"]  # fmt: skip
    for n, c in cells.items():
        row = []
        for a, b in pairs:
            d = c["minus"].get(f"{a}-{b}")
            row.append(f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]" if d else "-")
        learned = c["learned"]["tgeo_kd"]
        lines.append(
            f"| {n} | {len(c['test']['constant'])} | {' | '.join(row)} | "
            f"{c.get('best_rival', '-')} | {sum(learned)} of {len(learned)} |"
        )
    return "\n".join(lines)


def picture(cells: Mapping[str, Any]) -> str:
    """Returns an SVG file: `tgeo_kd` minus the tuned constant, each situation in its row."""
    rows = []
    for n, c in cells.items():
        d, oracle = c["minus"].get("tgeo_kd-constant"), c["minus"].get("oracle-constant")
        if not d:
            continue
        ours, theirs = c["test"]["tgeo_kd"], c["test"]["constant"]
        values = {str(s): ours[s] - theirs[s] for s in ours}
        note = f"oracle {oracle['mean']:+.3f}" if oracle else ""
        interval = d["low"], d["high"]
        rows.append(
            figures.Row(name=n, values=values, mean=d["mean"], interval=interval, note=note)
        )
    colours = {row.name: 1 if row.name.startswith("table") else 2 for row in rows}
    plot = figures.dot_plot(
        rows, x_label="test accuracy, tgeo_kd minus the tuned constant", zero=True, colours=colours
    )
    style = (resources.files("distill_jax.report") / "page.css").read_text()
    return plot.replace(
        "<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1
    ).replace(">", f"><style>{style}</style>", 1)  # fmt: skip
