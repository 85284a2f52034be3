"""The report of a sweep: the metric against the swept values, and the trials, the best first."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_jax.report import figures, of_study
from distill_jax.report.folders import Study
from distill_jax.report.html import Html, el, join
from distill_jax.report.of_comparison import files_section
from distill_jax.report.page import figure, grid, muted, table, write
from distill_jax.report.wording import NONE


def write_sweep_report(
    study: Study,
    trials: Mapping[str, Mapping[str, Any]],
    *,
    rungs: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Writes `report.html` into the folder of a sweep and returns its path.

    Args:
      study: its runs, from `read`; the value of an arm is that of its best state.
      trials: values of the swept keys by arm.
      rungs: of successive halving, from `halving.json`.
    """
    sections = {anchor: (title, body) for anchor, title, body in of_study.sections(study)}
    shown = ("curves", "metrics", "compute", "provenance", "config")
    return write(
        study.path,
        kicker="Sweep",
        title=" · ".join(dict.fromkeys(key for values in trials.values() for key in values)),
        lead=_sweep_lead(study, trials, rungs),
        sections=[
            ("response", "Response", _response(study, trials, rungs)),
            ("halving", "Stopped early", _halving(study, rungs)),
            ("trials", "Trials", _trials(study, trials, rungs)),
            *((anchor, *sections[anchor]) for anchor in shown),
            ("files", "Files", files_section(study)),
        ],
        sources="the files that it names",
    )


def _ranked(study: Study) -> list[tuple[str, float]]:
    values = [(arm, v) for arm, seeds in study.values.items() for v in seeds.values()]
    return sorted(values, key=lambda item: -item[1] if study.mode == "max" else item[1])


def _sweep_lead(
    study: Study, trials: Mapping[str, Mapping[str, Any]], rungs: Sequence[Mapping[str, Any]]
) -> Html:
    ranked = _ranked(study)
    done = f"{len(ranked)} of {len(trials)} trials have a value of {study.metric}."
    if stopped := len(_stopped(rungs)):
        done += f" Successive halving stopped {stopped} before their end."
    if not ranked:
        return el("p", done, class_="lead")
    arm, value = ranked[0]
    settings = ", ".join(f"{key}={value}" for key, value in trials[arm].items())
    return join(
        el("ul", el("li", f"Best: {settings}, {study.metric} {study.fmt(value)}.")),
        el(
            "p",
            f"{done} The metric chose the best trial, so its value is optimistic: report that "
            "trial on the test part, with further seeds.",
            class_="lead",
        ),
    )


def _response(
    study: Study, trials: Mapping[str, Mapping[str, Any]], rungs: Sequence[Mapping[str, Any]]
) -> Html | None:
    """Draws the metric of every trial against the values of each swept key.

    Where trials stop early, it is that of the first rung, which all of them reach.
    """
    charts = []
    measured = {arm: next(iter(v.values()), None) for arm, v in study.values.items()}
    when = ""
    if rungs:
        measured = {arm: entry["value"] for arm, entry in rungs[0]["at"].items()}
        when = f" At the first rung, {rungs[0]['part']} of training."
    for key in dict.fromkeys(key for values in trials.values() for key in values):
        options = dict.fromkeys(values[key] for values in trials.values() if key in values)
        if len(options) < 2:
            continue
        rows = []
        for option in sorted(options, key=lambda v: (isinstance(v, str), v)):
            arms = [arm for arm, values in trials.items() if values.get(key) == option]
            values = {arm: v for arm in arms if (v := measured.get(arm)) is not None}
            best = (max if study.mode == "max" else min)(values.values(), default=None)
            rows.append(figures.Row(name=str(option), values=values, mean=best, interval=None))
        number = {row.name: 0 for row in rows}
        plot = figures.dot_plot(rows, x_label=study.metric, colours=number)
        caption = f"Rings are trials with this value, the bar is the best.{when}"
        charts.append(figure(key, plot, caption))
    return grid(charts) if charts else None


def _stopped(rungs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, Mapping[str, Any]]]:
    """Returns the number of the rung, and what was there, by trial that did not go on."""
    return {
        trial: (number, entry)
        for number, rung in enumerate(rungs)
        for trial, entry in rung["at"].items()
        if "on" in rung and trial not in rung["on"]
    }


def _halving(study: Study, rungs: Sequence[Mapping[str, Any]]) -> Html | None:
    """Returns one row for each rung: the trials there, and what divides them."""
    if not rungs:
        return None

    def spell(values: Sequence[float], pick: Any) -> str:
        return study.fmt(pick(values)) if values else NONE

    rows = []
    high, low = (max, min) if study.mode == "max" else (min, max)
    for number, rung in enumerate(rungs):
        if "on" not in rung:
            continue
        at = {t: e["value"] for t, e in rung["at"].items() if e["value"] is not None}
        steps = sorted({e["step"] for e in rung["at"].values() if e["step"] is not None})
        on = [v for t, v in at.items() if t in rung["on"]]
        off = [v for t, v in at.items() if t not in rung["on"]]
        span = f"{steps[0]:,}" + (f" to {steps[-1]:,}" if len(steps) > 1 else "") if steps else NONE
        cells = [rung["part"], span, len(rung["at"]), len(rung["on"]), spell(on, low)]
        rows.append(
            [
                el("th", number + 1, scope="row"),
                *(el("td", cell, class_="n") for cell in (*cells, spell(off, high))),
            ]
        )
    heads = ["rung", "part of training", "step", "trials", "go on"]
    return join(
        muted(
            f"At each rung the trials with the best {study.metric} go on and the others stop. The "
            "test part has no say in it."
        ),
        table([*heads, "worst that goes on", "best that stops"], rows),
    )


def _trials(
    study: Study, trials: Mapping[str, Mapping[str, Any]], rungs: Sequence[Mapping[str, Any]]
) -> Html:
    """Returns one row for each trial, the best first: a column for each key, then the metric.

    Trials that stopped early come last, with their step and the metric there.
    """
    stopped = _stopped(rungs)
    sign = -1 if study.mode == "max" else 1

    def rank(arm: str) -> tuple[float, bool, float]:
        number, entry = stopped.get(arm, (len(rungs), {}))
        value = entry.get("value")
        return -number, value is None, sign * (value or 0.0)

    def early(arm: str) -> str:
        entry = stopped[arm][1] if arm in stopped else {}
        if entry.get("value") is None:
            return entry.get("why") or (NONE if arm not in stopped else "no finite value")
        return f"step {entry['step']:,}: {study.fmt(entry['value'])}"

    keys = list(dict.fromkeys(key for values in trials.values() for key in values))
    ranked = dict(_ranked(study))
    order = [*ranked, *sorted((arm for arm in trials if arm not in ranked), key=rank)]
    rows = [
        [
            el("th", arm, scope="row"),
            *(el("td", trials[arm].get(key, NONE), class_="n") for key in keys),
            el("td", study.fmt(ranked[arm]) if arm in ranked else NONE, class_="n"),
            *([el("td", early(arm), class_="n")] if rungs else []),
        ]
        for arm in order
        if arm in trials
    ]
    return table(["trial", *keys, study.metric, *["stopped at"] * bool(rungs)], rows)
