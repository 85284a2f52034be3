"""The report of a study: arms compared over seeds."""

import os
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.core.errors import UserError
from distill_jax.evaluators import classification
from distill_jax.report import (
    changes,
    choices,
    compute,
    curves,
    examples,
    figures,
    provenance,
    segments,
    trust,
)
from distill_jax.report.folders import Run, Study, is_trust, lookup, read_alarms, read_json
from distill_jax.report.html import Html, el, join
from distill_jax.report.page import alert, figure, grid, muted, row, spread, table, tiles, write
from distill_jax.report.provenance import config_table
from distill_jax.report.quality import QUALITY, calibration_panel, confusion_panel, pooled
from distill_jax.report.statistics import ArmSummary, answer, conclusion, verdict
from distill_jax.report.wording import NONE, cut, duration, flat, is_finite, minus

MOST_ALARMS = 20
"""Maximum number of listed alarms of all runs; further ones are only counted."""


def write_study_report(study_dir: str | os.PathLike[str]) -> Path:
    """Writes `report.html` into a study folder and returns its path.

    Means and intervals are recomputed from the values of the seeds in `study.json`.

    Raises:
      UserError: the folder has no readable `study.json`.
    """
    path = Path(study_dir)
    notes: list[str] = []
    study = Study(path, read_json(path / "study.json", notes), notes)
    if not isinstance(study.spec.get("arms"), dict) or not study.spec["arms"]:
        raise UserError(
            "there is no study to report",
            where=str(path / "study.json"),
            hint="; ".join(notes) or "it must be an object with `arms`",
        )
    title = str(study.spec.get("title") or study.spec.get("name") or path.name)
    return write(
        path, kicker="Study report", title=title, lead=lead(study), sections=sections(study)
    )


def sections(study: Study) -> list[tuple[str, str, Html | None]]:
    """Returns anchor, title and content of each section."""
    some = [runs[0] for runs in study.runs.values() if runs]
    names = some[0].metric_names(4) if some else []
    shown = {arm: study.runs[arm] for arm in study.colours}
    finished = {arm: study.finished(arm) for arm in shown}
    return [
        ("results", "Results", _study_results(study)),
        ("choices", "Choices", choices.section(study)),
        ("seeds", "Seeds", _study_seeds(study)),
        ("curves", "Learning curves", curves.section(shown, names=names)),
        ("metrics", "Further metrics", _study_metrics(study)),
        ("trust", "Trust", _study_trust(study)),
        ("calibration", "Calibration", _study_calibration(finished)),
        ("confusion", "Confusion", _study_confusion(study)),
        ("classes", "By class", changes.by_class(study)),
        ("examples", "Examples", _study_examples(finished)),
        ("changes", "Changed predictions", changes.by_example(study)),
        ("compute", "Compute", compute.section(_paid(study), base=_base(study))),
        ("provenance", "Provenance", provenance.section(study.all_runs)),
        ("config", "What differs", _study_config(study)),
    ]


def lead(study: Study) -> Html:
    """Returns the top of the page: the answers, the size of the study, and what is missing."""
    own = [arm for arm in study.arms if not study.stands_for_others(arm)]
    planned = sum(len(study.seeds(arm)) for arm in own)
    done = sum(len(study.values[arm]) for arm in own)
    reference = next((s for s in study.summaries if s.is_reference), None)
    better = "higher is better" if study.mode == "max" else "lower is better"
    entries: list[tuple[str, Any]] = [("arms", len(study.arms)), ("runs", f"{done} of {planned}")]
    if reference and reference.value:
        entries.append((f"reference: {reference.arm}", study.fmt(reference.value.mean)))
    seconds = [lookup(run.result, "compute.seconds") for run in study.all_runs]
    if any(map(is_finite, seconds)):
        entries.append(("compute time", duration(sum(float(s) for s in seconds if is_finite(s)))))
    said = [
        el("li", minus(answer(question, rows, metric=study.metric, **study.shown)))
        for question, rows in study.answers.items()
    ] or [
        el("li", el("b", s.arm), ": ", minus(verdict(s, **study.shown)))
        for s in study.summaries
        if not s.is_reference and reference
    ]
    lacking = [f"{arm}, seed {seed} {what}" for arm, seed, what in study.failures()]
    alarms = [f"{run.label}: {line}" for run in study.all_runs for line in read_alarms(run.path)]
    problems = list(study.notes)
    if reference is None:
        problems.append(f"reference {study.spec.get('reference')!r} is not an arm: no differences")
    singles = [s.arm for s in study.summaries if len(s.seeds) == 1]
    if singles:
        problems.append(f"one seed only, so no interval: {', '.join(singles)}")
    incomplete = [r.label for r in study.all_runs if "result.json is missing" in r.notes]
    if incomplete:
        problems.append(f"no result.json: {', '.join(incomplete)}")
    answers = el("ul", said) if said and (study.questions or len(said) <= 8) else None
    return join(
        answers if study.questions else None,
        el("p", f"{study.metric}, {better}. Differences are paired by seed.", class_="lead"),
        None if study.questions else answers,
        tiles(entries),
        alert(f"Runs without a value: {len(lacking)}", lacking, stop=True),
        alert(f"Alarms: {len(alarms)}", alarms[:MOST_ALARMS], stop=True),
        alert("Please note", problems),
    )


def _comparison(study: Study, summaries: Sequence[ArmSummary]) -> Html:
    rows, shown = [], int(bool(study.published))
    for s in summaries:
        desc = study.arms[s.arm].get("description")
        planned = len(study.seeds(s.arm))
        name = [el("span", class_="dot " + figures.colour(study.colours.get(s.arm))), s.arm]
        diff = s.difference
        words = conclusion(diff, mode=study.mode) if diff else ""
        other = study.published.get(s.arm)
        if diff and not diff.interval:
            words = "one common seed"
        tone = {"better": "good", "worse": "bad"}.get(words.rpartition(", ")[2])
        rows.append(
            [
                el("th", name, el("span", desc, class_="desc") if desc else None, scope="row"),
                el("td", study.fmt(s.value.mean) if s.value else NONE, class_="n"),
                el("td", study.interval(s.value), class_="n"),
                el("td", "reference" if s.is_reference else study.difference(diff), class_="n"),
                el("td", "" if s.is_reference else study.interval(diff, sign="+"), class_="n"),
                el("td", words, class_=tone),
                el("td", f"{len(s.seeds)} / {planned}", class_="n"),
                *([el("td", NONE if other is None else study.fmt(other), class_="n")] * shown),
            ]
        )
    heads = ["arm", "mean", "95 % interval", "difference ± se", "95 % interval", "", "seeds"]
    heads += ["published"] * shown
    return table(heads, rows, refs=[s.is_reference for s in summaries])


def _comparisons(
    study: Study, answers: Mapping[str, Sequence[ArmSummary]], every: Sequence[ArmSummary]
) -> Html:
    """One table for each question, or one of all arms if there are no questions."""
    if not answers:
        return _comparison(study, every)
    tables = [(el("h4", question), _comparison(study, rows)) for question, rows in answers.items()]
    return join(*(part for pair in tables for part in pair))


def _study_results(study: Study) -> Html:
    value_rows = [
        figures.Row(
            name=s.arm,
            values=study.values[s.arm],
            mean=s.value.mean if s.value else None,
            interval=s.value.interval if s.value else None,
            note=_lack(len(study.seeds(s.arm)) - len(s.seeds)),
        )
        for s in study.summaries
    ]
    charts = []
    if any(study.values.values()):
        caption = "Rings are seeds, bars are means, pale lines are 95 % intervals of the mean."
        plot = figures.dot_plot(value_rows, x_label=study.metric, colours=study.colours)
        charts.append(figure(f"{study.metric} by seed", plot, caption))
    if any(s.difference for s in study.summaries) and not study.questions:
        plot = figures.dot_plot(
            _difference_rows(study), x_label="difference", zero=True, colours=study.colours
        )
        caption = (
            "Each seed minus the same seed of the reference. The dashed line is no difference."
        )
        charts.append(figure(f"Paired difference to {study.spec.get('reference')}", plot, caption))
    return join(
        _comparisons(study, study.answers, study.summaries),
        join(
            el("h3", "States that were best on held-out data"),
            _comparisons(study, study.best_answers, study.best_summaries),
        )
        if study.best_summaries
        else None,
        muted(
            "Student-t intervals over seeds. They take seeds as independent and say nothing about "
            "other data sets; they are not corrected for the number of arms.",
            f" Figures that draw arms over each other show {len(study.colours)} of "
            f"{len(study.arms)}, which have a colour above: the reference, the best, those with a "
            "learned ratio and the first of the others."
            if len(study.colours) < len(study.arms)
            else None,
        ),
        el("div", charts, class_="grid2"),
    )


def _difference_rows(study: Study) -> list[figures.Row]:
    base = study.values.get(str(study.spec.get("reference")), {})
    return [
        figures.Row(
            name=s.arm,
            values={n: v - base[n] for n, v in study.values[s.arm].items() if n in base}
            if s.difference
            else {},
            mean=s.difference.mean if s.difference else None,
            interval=s.difference.interval if s.difference else None,
            note="reference" if s.is_reference else "",
        )
        for s in study.summaries
    ]


def _study_seeds(study: Study) -> Html:
    seeds = list(dict.fromkeys(seed for arm in study.arms for seed in study.seeds(arm)))

    def cell(arm: str, seed: str) -> Html:
        entry = study.seeds(arm).get(seed)
        if entry is None:
            return el("td", NONE, class_="n")
        value = study.values[arm].get(seed)
        text: Any = study.fmt(value) if value is not None else entry.get("status", "unknown")
        page = Path(str(entry.get("run") or "")) / "report.html"
        if entry.get("run") and not page.is_absolute() and (study.path / page).exists():
            text = el("a", text, href=urllib.parse.quote(page.as_posix()))
        return el("td", text, class_="n" if value is not None else "n bad")

    rows = [
        [el("th", arm, scope="row"), *(cell(arm, seed) for seed in seeds)] for arm in study.arms
    ]
    return table(["arm", *(f"seed {seed}" for seed in seeds)], rows)


def _study_metrics(study: Study) -> Html | None:
    by_name: dict[str, dict[str, list[float]]] = {}
    for arm in study.arms:
        for run in study.finished(arm):
            for name, value in (run.result.get("metrics") or {}).items():
                if is_finite(value) and (name == study.metric or not is_trust(name)):
                    by_name.setdefault(name, {}).setdefault(arm, []).append(float(value))
    by_name = {n: v for n, v in by_name.items() if n.startswith("test/")} or by_name
    if not by_name:
        return None
    arms = [arm for arm in study.arms if study.finished(arm)]
    first = (study.metric, f"{study.metric.partition('/')[0]}/accuracy")
    by_name = {n: by_name[n] for n in (*first, *by_name) if n in by_name}
    rows = [row(n, (spread(by_arm.get(arm)) for arm in arms)) for n, by_arm in by_name.items()]
    return join(muted("Mean ± standard deviation over seeds."), table(["metric", *arms], rows))


def _study_trust(study: Study) -> Html | None:
    finished = {arm: study.finished(arm) for arm in study.arms}
    return trust.section(study.runs, finished, colours=study.colours)


def _paid(study: Study) -> dict[str, list[Run]]:
    """Returns the runs whose cost is known, by arm; all of them if none is."""
    paid = {arm: [r for r in runs if r.result.get("compute")] for arm, runs in study.runs.items()}
    return {arm: runs for arm, runs in paid.items() if runs} or study.runs


def _base(study: Study) -> str | None:
    """Returns the baseline arm of the cost comparison: plain distillation, or the reference."""
    names = ("kd", str(study.spec.get("reference")))
    return next((arm for arm in names if arm in study.arms), None)


def _study_calibration(shown: Mapping[str, Sequence[Run]]) -> Html | None:
    tables = {}
    for arm, runs in shown.items():
        measured = [metrics for run in runs for r in run.roles[:1] if (metrics := run.quality(r))]
        if measured:
            mean = {name: float(np.mean([m[name] for m in measured])) for name in QUALITY}
            tables[arm] = (mean, pooled([m["reliability"] for m in measured]))
    note = "Seeds are pooled in the diagram; the table has their means."
    return calibration_panel(tables, note=note, order=list(shown))


def _study_confusion(study: Study) -> Html | None:
    panels = []
    for s in study.summaries:
        if not (s.is_reference or s.arm == study.best):
            continue
        runs = [run for run in study.finished(s.arm) if run.roles]
        measured = [
            run.evaluate(classification.make(role=run.roles[0]), run.roles[0]) for run in runs
        ]
        counts = [m["confusion"] for m in measured if m]
        if counts and len({c.shape for c in counts}) == 1:
            kind = "reference" if s.is_reference else "best mean"
            seeds = f"sum of {len(counts)} seeds" if len(counts) > 1 else "one seed"
            title = f"{s.arm} ({kind}), {seeds}"
            i = study.colours[s.arm]
            panels.append(confusion_panel(np.sum(counts, axis=0), runs[0].classes, title, i))
    return grid(panels) if panels else None


def _study_examples(shown: Mapping[str, Sequence[Run]]) -> Html | None:
    seeds = [{run.path.name: run for run in runs if run.roles} for runs in shown.values()]
    common = [name for name in (seeds[0] if seeds else {}) if all(name in s for s in seeds if s)]
    if not common:
        return None
    picked = {arm: runs[common[0]] for arm, runs in zip(shown, seeds, strict=True) if runs}
    first = next(iter(picked.values()))
    voters = {arm: (run, run.roles[0]) for arm, run in picked.items()}
    if len(first.roles) > 1:
        voters |= {role: (first, role) for role in first.roles[1:] if role not in voters}
    order = [*shown, *(name for name in voters if name not in shown)]
    return join(
        muted(f"Predictions of {common[0]} of every arm."),
        examples.section(first, voters, order=order),
    )


def _study_config(study: Study) -> Html | None:
    configs = {a: flat(runs[0].config) for a, runs in study.runs.items() if runs and runs[0].config}
    for arm in configs:  # runs that went on differently did not have this config throughout
        if text := segments.summary(study.runs[arm][0].segments):
            configs[arm]["history"] = text
    for arm, spec in study.arms.items():
        if arm not in configs and spec.get("overrides"):
            configs[arm] = flat(spec["overrides"])
    own = ("seed", "study.", "workdir")
    names = [
        n for n in dict.fromkeys(n for f in configs.values() for n in f) if not n.startswith(own)
    ]
    differ = [n for n in names if len({f.get(n) for f in configs.values()}) > 1]
    if not configs:
        return None
    rows = [
        [
            el("th", name, scope="row", class_="code"),
            *(el("td", cut(f.get(name, NONE)), class_="code") for f in configs.values()),
        ]
        for name in differ
    ]
    shared = {n: next(iter(configs.values()))[n] for n in names if n not in differ}
    return join(
        table(["key", *configs], rows, numeric=False)
        if rows
        else muted("The configs of all arms are equal."),
        el(
            "details",
            el("summary", f"{len(shared)} keys that all arms share"),
            config_table(shared),
        ),
    )


def _lack(count: int) -> str:
    return f"{count} without a value" if count else ""
