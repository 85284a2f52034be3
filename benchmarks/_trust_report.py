"""What the pieces of the suite of learned trust say: choices, differences, tables, a picture."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import trust_suite as suite_lib
from _trust_situations import SET_ASIDE, SITUATIONS
from scipy import special

from distill_jax.report import figures, statistics
from distill_jax.run import environment

DOMAINS = ("table", "images", "text")
MARK = "<!-- from here on: benchmarks/trust_suite.py report -->"
AIM = 0.01  # half-width of an interval
GAIN = 0.02  # of the oracle over the tuned constant, above which the aim demands a gain
MADE = ("tgeo_kd", "tgeo_kd_more", "tgeo_kd_rates")
RATES = (
    ("tgeo_kd_rates", "constant_rates"),
    ("joint", "constant_rates"),
    ("tgeo_kd_rates", "joint"),
)
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
        for arm in (*suite_lib.ARMS, *suite_lib.MORE_RATES)
        if suite.path(domain, name, arm, seed).exists()
    }
    for arm, learned, constant in (
        ("tgeo_kd", "around", "constant"),
        ("tgeo_kd_more", "around_more", "constant_more"),
        ("tgeo_kd_rates", "around_rates", "constant_rates"),
    ):
        if learned in found and constant in found:
            took = better(found[learned], found[constant])
            found[arm] = {**found[learned if took else constant], "learned": took}
    return found


def cell(
    suite: suite_lib.Suite, domain: str, name: str, known: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Returns arms and differences of a situation in a domain; None where nothing has run.

    Args:
      suite: the folder of pieces.
      domain: the domain.
      name: the situation.
      known: such a result of other seeds or arms, to be added; may be empty.
    """
    folder = suite.folder / domain / name
    seeds = sorted({int(p.stem) for p in folder.glob("*/*.npz")})
    if not seeds and not known:
        return None
    runs = {seed: arms_of(suite, domain, name, seed) for seed in seeds}
    tests = {}
    for arm in (*suite_lib.ARMS, *suite_lib.MORE_RATES, *MADE):
        old = known.get("test", {}).get(arm, {})
        new = {seed: round(float(run[arm]["test"]), 4) for seed, run in runs.items() if arm in run}
        if both := {**{int(seed): x for seed, x in old.items()}, **new}:
            tests[arm] = dict(sorted(both.items()))
    learned = {}
    for arm in MADE:
        before = known.get("test", {}).get(arm, ()), known.get("learned", {}).get(arm, ())
        took = {int(seed): x for seed, x in zip(*before, strict=True)}
        took |= {seed: int(run[arm]["learned"]) for seed, run in runs.items() if arm in run}
        learned[arm] = [took[seed] for seed in tests.get(arm, ())]
    result: dict[str, Any] = {"test": tests, "learned": learned}
    result["ratio"] = {
        arm: known.get("ratio", {}).get(arm)
        or round(float(np.mean([r[arm]["share"] for r in runs.values() if arm in r])), 3)
        for arm in ("tgeo", "tgeo_start", "around", "two_speed")
        if arm in tests
    }
    rivals = [arm for arm in suite_lib.RIVALS if arm in tests]
    shared = common(tests, rivals)
    if rivals and shared:
        means = {arm: np.mean([tests[arm][seed] for seed in shared]) for arm in rivals}
        result["best_rival"] = max(rivals, key=lambda arm: means[arm])
        tests = {**tests, "best_rival": tests[result["best_rival"]]}
    result["minus"] = {}
    for arm, reference in (
        *(("tgeo_kd", other) for other in AGAINST),
        *((arm, "constant") for arm in tests if arm not in ("constant", "tgeo_kd")),
        ("tgeo_kd_more", "constant_more"),
        ("around", "tgeo_start"),
        ("around", "shuffled"),
        ("around", "frozen"),
        *RATES,
    ):
        if arm in tests and reference in tests:
            both = [s for s in tests[arm] if s in tests[reference]]
            found = statistics.estimate([tests[arm][s] - tests[reference][s] for s in both])
            low, high = found.interval or (float("nan"), float("nan"))
            row = {"mean": found.mean, "low": low, "high": high}
            row = {k: round(v, 4) for k, v in row.items()}
            result["minus"][f"{arm}-{reference}"] = {**row, "seeds": len(both)}
    return result


def common(tests: Mapping[str, Mapping[int, float]], arms: Sequence[str]) -> list[int]:
    """Returns the seeds that all of these arms have."""
    seeds = [set(tests[arm]) for arm in arms if arm in tests]
    return sorted(set.intersection(*seeds)) if seeds else []


def needed(row: Mapping[str, float], aim: float = AIM) -> int:
    """Returns the seeds that make the half-width the aim, at the spread of those that ran."""
    quantile = lambda n: special.stdtrit(n - 1, 0.975)  # noqa: E731
    half, n = (row["high"] - row["low"]) / 2, row["seeds"]
    spread = half * np.sqrt(n) / quantile(n)
    return next(m for m in range(2, 10**6) if quantile(m) * spread <= aim * np.sqrt(m))


def result(suite: suite_lib.Suite, known: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the folder and the `known` cells say together."""
    cells = {
        key: found
        for domain in DOMAINS
        for name in (*SITUATIONS, *SET_ASIDE)
        if (found := cell(suite, domain, name, known.get(key := f"{domain}/{name}", {})))
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
        gains = {}
        for n, c in part.items():
            tests = c["test"]
            seeds = common(tests, ("tgeo_kd", "oracle", "constant"))
            if {"tgeo_kd", "oracle", "constant"} <= set(tests) and seeds:
                ours, best, base = (
                    np.mean([tests[arm][s] for s in seeds])
                    for arm in ("tgeo_kd", "oracle", "constant")
                )
                gains[n] = ours - base, best - base
        shares = {n: round(float(a / b), 2) for n, (a, b) in gains.items() if b > GAIN}
        found[title] = {
            **{f"tgeo_kd-{o}": of(part, "tgeo_kd", o) for o in AGAINST},
            **{f"{a}-constant": of(part, a, "constant")
               for a in ("tgeo", "tgeo_start", "around", "two_speed", "frozen", "shuffled",
                         *suite_lib.RIVALS)},
            "tgeo_kd_more-constant_more": of(part, "tgeo_kd_more", "constant_more"),
            **{f"{a}-{b}": of(part, a, b) for a, b in RATES},
            "share_of_oracle": shares,
            "median_share": round(float(np.median(list(shares.values()))), 2) if shares else None,
        }  # fmt: skip
    return found


def write(path: pathlib.Path, found: Mapping[str, Any]) -> None:
    """Replaces what follows the mark in the page."""
    above = path.read_text().split(MARK)[0].rstrip() if path.exists() else "# Trust suite"
    cells = found["cells"]
    parts = [above, MARK, "## Verdict", verdict(found), "## How often", often(found["summary"])]
    parts += ["## Differences, mean and 95 % interval over paired seeds", differences(cells)]
    parts += ["## Equal learning rates", equal_rates(cells)]
    parts += ["## Test accuracy, mean over the seeds that all arms have", table(cells)]
    parts += ["## Cost of a step in plain steps", cost(found["cost"])]
    path.write_text("\n\n".join(parts) + "\n")


def verdict(found: Mapping[str, Any]) -> str:
    """Returns what holds and what is missed, as a list."""
    cells, whole = found["cells"], found["summary"]["all"]
    main, rival = whole["tgeo_kd-constant"], whole["tgeo_kd-best_rival"]
    more = whole["tgeo_kd_more-constant_more"]
    named = lambda names: ", ".join(names) or "none"  # noqa: E731
    wide = []
    for name, c in cells.items():
        row = c["minus"].get("tgeo_kd-constant")
        if row and row["high"] - row["low"] > 2 * AIM:
            half = (row["high"] - row["low"]) / 2
            wide.append(f"{name} ({half:.3f} with {row['seeds']}; about {needed(row)} needed)")
    oracle = [n for n, c in cells.items() if c["minus"].get("oracle-constant", {}).get("mean", 0)
              > GAIN]  # fmt: skip
    shares = ", ".join(f"{n} {x:.2f}" for n, x in whole["share_of_oracle"].items())
    lines = [
        f"**`tgeo_kd` minus the tuned constant: the interval lies below 0 in "
        f"{len(main['below_0'])} of {main['of']} situations ({named(main['below_0'])}), above 0 in "
        f"{len(main['above_0'])} ({named(main['above_0'])}).** The mean is below 0 in "
        f"{main['mean_below_0']}.",
        f"An oracle gains more than {GAIN} in {len(oracle)}: {named(oracle)}. Share of its gain: "
        f"{shares}; median {whole['median_share']} (over the oracle's seeds).",
        f"Half-widths above {AIM}, in {len(wide)} of {main['of']}: {named(wide)}.",
        f"`tgeo_kd_more` minus the constant that also trains on the outer examples: below 0 in "
        f"{len(more['below_0'])} of {more['of']}, above 0 in {len(more['above_0'])}.",
        f"`tgeo_kd` minus the rival with the highest mean: below 0 in {len(rival['below_0'])} of "
        f"{rival['of']} ({named(rival['below_0'])}), above 0 in {len(rival['above_0'])} "
        f"({named(rival['above_0'])}). The rival is chosen by test accuracy.",
    ]
    for a, b in RATES:
        rows = whole[f"{a}-{b}"]
        if rows["of"]:
            lines.append(
                f"With equal learning rates, `{a}` minus `{b}`: below 0 in {len(rows['below_0'])} "
                f"of {rows['of']} ({named(rows['below_0'])}), above 0 in {len(rows['above_0'])} "
                f"({named(rows['above_0'])})."
            )
    return "\n".join(f"- {line}" for line in lines)


def often(found: Mapping[str, Any]) -> str:
    lines = ["| difference | situations | above 0 | below 0 | which |",
             "| --- | --: | --: | --: | --- |"]  # fmt: skip
    order = ("tgeo_kd-constant", "tgeo_kd_more-constant_more", "tgeo_kd-constant_more")
    names = (*order, *(n for n in found["all"] if n not in order))
    for name in names:
        row = found["all"][name]
        if not isinstance(row, dict) or not row.get("of"):
            continue
        lines.append(f"| {name.replace('-', ' - ')} | {row['of']} | {len(row['above_0'])} | "
                     f"{len(row['below_0'])} | {', '.join(row['below_0']) or '-'} |")  # fmt: skip
    return "\n".join(lines)


def equal_rates(cells: Mapping[str, Any]) -> str:
    """Returns the differences of the arms that share the rates of `joint`, and what they had."""
    pairs = (("joint", "constant"), *RATES)
    lines = ["| situation | " + " | ".join(f"{a} - {b}" for a, b in pairs) + " |",
             "| --- |" + " :-: |" * len(pairs)]  # fmt: skip
    for name, c in cells.items():
        if "joint-constant_rates" in c["minus"]:
            row = [_interval(c["minus"].get(f"{a}-{b}")) for a, b in pairs]
            lines.append(f"| {name} | {' | '.join(row)} |")
    return "\n".join(lines)


def cost(found: Mapping[str, Any]) -> str:
    domains = [d for d in DOMAINS if d in found]
    lines = ["| method | " + " | ".join(domains) + " |", "| --- |" + " --: |" * len(domains)]
    for name in found[domains[0]] if domains else ():
        lines.append(f"| {name} | " + " | ".join(str(found[d][name]) for d in domains) + " |")
    return "\n".join(lines)


def _interval(row: Mapping[str, float] | None) -> str:
    return f"{row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]" if row else "-"


def table(cells: Mapping[str, Any]) -> str:
    """Returns the Markdown table of test accuracies over the seeds that all arms have."""
    names = ("alone", "clean", "constant", "constant_more", "oracle", "frozen", "shuffled",
             "tgeo", "two_speed", "tgeo_start", "around", "tgeo_kd", "tgeo_kd_more",
             *suite_lib.RIVALS)  # fmt: skip
    lines = ["| situation | " + " | ".join(names) + " |", "| --- |" + " --: |" * len(names)]
    for n, c in cells.items():
        seeds = common(c["test"], names)
        means = [
            np.mean([c["test"][a][s] for s in seeds]) if a in c["test"] else None for a in names
        ]
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
            row.append(_interval(c["minus"].get(f"{a}-{b}")))
        learned = c["learned"]["tgeo_kd"]
        lines.append(
            f"| {n} | {c['minus']['tgeo_kd-constant']['seeds']} | {' | '.join(row)} | "
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
    colours = {row.name: 1 + DOMAINS.index(row.name.split("/")[0]) for row in rows}
    plot = figures.dot_plot(
        rows, x_label="test accuracy, tgeo_kd minus the tuned constant", zero=True, colours=colours
    )
    return figures.as_file(plot)
