"""The ratio of a weighting: over time, over examples, and on known faults."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from distill_jax.evaluators import trust
from distill_jax.report import curves, figures
from distill_jax.report.distributions import Ridge, cloud, ridges
from distill_jax.report.example_weight_arrays import FLAGS, StoredWeights
from distill_jax.report.examples import card
from distill_jax.report.figures import Series
from distill_jax.report.folders import Run
from distill_jax.report.html import Html, el, join
from distill_jax.report.page import alert, figure, grid, muted, row, spread, table

GROUPS = {
    1: ("right_far", "teacher right, student far"),
    6: ("right_near", "teacher right, student near"),
    2: ("wrong_far", "teacher wrong, student far"),
    5: ("wrong_near", "teacher wrong, student near"),
}
"""The groups of Hu et al. 2024, table 4, by colour number: two hues, the near ones paler."""

_DASHES = {1: "none", 2: "none", 5: "5 4", 6: "5 4"}
_AREAS = {
    "teacher_wrong_auc": "Finds the teacher's errors",
    "damaged_auc": "Finds the damaged teacher",
}
_NAMES = {
    "ratio_mean": "mean ratio",
    "ratio_std": "its standard deviation over examples",
    "ratio_right": "mean where the teacher is right",
    "ratio_wrong": "mean where the teacher is wrong",
    "teacher_wrong_auc": "AUC of finding the teacher's errors",
    "damaged_auc": "AUC of finding the damaged teacher",
    "ratio_clean": "mean on clean labels",
    "ratio_noisy": "mean on changed labels",
    "ratio_inlier": "mean on usual examples",
    "ratio_outlier": "mean on outliers",
    "ratio_margin_correlation": "rank correlation with the teacher's margin",
}
_ARMS = 12  # in figures, at most
_DOTS = 400  # in a cloud, at most
_BINS = 20  # of the margin
_FEW = 8  # examples of a bin, below which it has no band
_ROWS = 16  # of classes, at most


def section(
    arms: Mapping[str, Sequence[Run]],
    finished: Mapping[str, Sequence[Run]],
    *,
    colours: Mapping[str, int] | None = None,
) -> Html | None:
    """Shows the ratios of the arms that have ratios.

    Args:
      arms: runs by arm, for the curves over time, with bands over seeds.
      finished: runs with stored ratios; numbers are means over them, figures show the first run
        of each arm.
      colours: colour numbers of the overlaid arms of a study; None for a single run.
    """
    problems, by_arm = [], {}
    for arm, runs in finished.items():
        seeds = []
        for run in runs:
            problems += [f"{run.label}: {n}" for n in run.notes if n.startswith("trust.npz")]
            if run.example_weight_arrays:
                try:
                    seeds.append(StoredWeights.read(run))
                except ValueError as error:
                    problems.append(f"{run.label}: trust.npz cannot be used: {error}")
        if seeds:
            by_arm[arm] = seeds[0], [seed.metrics for seed in seeds]
    single = colours is None
    traced = [arm for arm, runs in arms.items() if arm in by_arm or _has_curves(runs)]
    if len(traced) > _ARMS:
        problems.append(f"figures show the first {_ARMS} of {len(traced)} arms")
    first = {arm: by_arm[arm][0] for arm in traced[:_ARMS] if arm in by_arm}
    blocks = [
        _over_time({arm: arms[arm] for arm in traced[:_ARMS]}),
        _areas({arm: arms[arm] for arm in traced}, colours),
        *(_of_examples(first, draw) for draw in (_margins, _by_class, _comparisons)),
    ]
    shown = [block for block in blocks if block]
    if not shown and not problems:
        return None
    seeds = {arm: metrics for arm, (_, metrics) in by_arm.items()}
    numbers = _numbers(seeds, heads=["training part"] if single else list(seeds))
    cards = [_cards(seed, most=12 if single else 6) for seed in first.values()]
    if single:
        panels = [figure(b.title, b.panels[0].plot, b.caption, legend=b.legend) for b in shown]
        side = el("div", numbers, class_="panel facts")
        body = el("div", panels, side if by_arm else None, class_="grid2")
    else:
        body = join(numbers if by_arm else None, [block.html() for block in shown])
    return join(
        muted(
            "The ratio is the teacher's share of the weights of an example: at 0 the student does "
            "not hear the teacher, at 1 it hears nothing else. Right and wrong go by the labels "
            "as they are stored. Curves are of held-out examples; all else is of training examples "
            "at the last step."
            + ("" if single else " Pictures show the first finished seed of an arm."),
        ),
        alert("Please note", problems + _controls(first)),
        body,
        cards if single else _folded(first.values(), cards),
    )


def _has_curves(runs: Sequence[Run]) -> bool:
    names = [f"held_out/ratio_{name}" for name, _ in GROUPS.values()]
    return any(name in record for run in runs for record in run.records for name in names)


def _folded(stored: Iterable[StoredWeights], cards: Sequence[Html | None]) -> Html:
    """Returns collapsible cards, the first one open."""
    parts = [(seed.label, part) for seed, part in zip(stored, cards, strict=True) if part]
    return join(
        el("details", el("summary", f"Examples of {label}"), part, open="" if i == 0 else None)
        for i, (label, part) in enumerate(parts)
    )


@dataclasses.dataclass(frozen=True)
class _Panel:
    arm: str
    plot: Html


@dataclasses.dataclass(frozen=True)
class _Block:
    """Panels of one kind, one per arm or metric."""

    title: str
    caption: str
    panels: Sequence[_Panel]
    legend: Html | None = None

    def html(self) -> Html:
        """Returns the panels under their title, each under its own."""
        return join(
            el("h3", self.title, class_="block"),
            muted(self.caption),
            self.legend,
            grid([figure(p.arm, p.plot) for p in self.panels]),
        )


def _over_time(arms: Mapping[str, Sequence[Run]]) -> _Block | None:
    """Mean ratios of the four groups."""
    charts: dict[str, dict[int, Series]] = {}
    for arm, runs in arms.items():
        for i, (name, title) in GROUPS.items():
            line = curves.band(title, [run.curve(f"held_out/ratio_{name}") for run in runs])
            if line is not None:
                charts.setdefault(arm, {})[i] = line
    if not charts:
        return None
    edges = [
        values
        for chart in charts.values()
        for line in chart.values()
        for values in (line.y, line.low, line.high)
        if values is not None
    ]
    used = {i: title for i, (_, title) in GROUPS.items() if any(i in c for c in charts.values())}
    y_range = _range(np.concatenate(edges))
    panels = [
        _Panel(
            arm,
            figures.line_chart(chart, y_label="mean ratio", y_range=y_range, dashes=_DASHES),
        )
        for arm, chart in charts.items()
    ]
    return _Block(
        "Mean ratio over time",
        "Far and near: the examples of each kind, by default a fifth, in which the probabilities "
        "of student and teacher differ most and least (Hu et al. 2024, table 4).",
        panels,
        figures.key(used, dashes=_DASHES),
    )


def _areas(arms: Mapping[str, Sequence[Run]], colours: Mapping[str, int] | None) -> _Block | None:
    """Detection of faults by the ratio, over time.

    One panel per metric and one line per arm with a colour; without colours, one panel with one
    line per metric.
    """
    charts = {
        metric: {
            1 if colours is None else colours[arm]: line
            for arm, runs in arms.items()
            if colours is None or arm in colours
            if (line := curves.band(arm, [run.curve(f"held_out/{metric}") for run in runs]))
        }
        for metric in _AREAS
    }
    charts = {metric: chart for metric, chart in charts.items() if chart}
    if not charts:
        return None
    caption = (
        "Area under the ROC curve: the share of pairs of a faulty and a sound answer of the "
        "teacher in which the faulty one has the lower ratio. The dashed line is chance."
    )
    if colours is None:
        lines = {
            i: dataclasses.replace(line, name=_AREAS[metric].lower())
            for i, (metric, chart) in enumerate(charts.items(), 1)
            for line in chart.values()
        }
        legend = figures.key({i: line.name for i, line in lines.items()})
        plot = _area_chart(lines, "AUC")
        return _Block("Does a low ratio mean a bad answer?", caption, [_Panel("", plot)], legend)
    if not arms.keys() <= colours.keys():
        caption += " Arms without a colour in the results are left out."
    names = {i: line.name for chart in charts.values() for i, line in chart.items()}
    panels = [_Panel(_AREAS[metric], _area_chart(c, metric)) for metric, c in charts.items()]
    legend = figures.key(dict(sorted(names.items())))
    return _Block("Does a low ratio mean a bad answer?", caption, panels, legend)


def _area_chart(lines: Mapping[int, Series], y_label: str) -> Html:
    edges = [v for s in lines.values() for v in (s.y, s.low, s.high) if v is not None]
    low, high = figures.limits(np.concatenate([*edges, [0.5]]))
    y_range = max(0.0, low), min(1.0, high)
    return figures.line_chart(lines, y_label=y_label, y_range=y_range, level=0.5)


def _of_examples(
    stored: Mapping[str, StoredWeights],
    draw: Callable[[StoredWeights, tuple[float, float]], tuple[str, str, Html | None]],
) -> _Block | None:
    """Draws the ratios of the examples of every arm, with common limits."""
    if not stored:
        return None
    limits = _range(np.concatenate([seed.ratio for seed in stored.values()]))
    drawn = {arm: draw(seed, limits) for arm, seed in stored.items()}
    title, caption, _ = next(iter(drawn.values()))
    panels = [_Panel(arm, plot) for arm, (_, _, plot) in drawn.items() if plot]
    return _Block(title, caption, panels) if panels else None


def _margins(stored: StoredWeights, limits: tuple[float, float]) -> tuple[str, str, Html]:
    counts, lines = _bands(stored.margin, stored.ratio)
    chosen = _spread(stored.margin, stored.ratio)
    dots = {
        i: (name, stored.margin[rows], stored.ratio[rows])
        for i, name, part in ((1, "teacher right", stored.right), (2, "wrong", ~stored.right))
        if len(rows := chosen[part[chosen]])
    }
    plot = cloud(
        dots,
        lines,
        counts=counts,
        x_range=(-1.0, 1.0),
        y_range=limits,
        x_label="teacher's margin",
        y_label="ratio",
    )
    caption = (
        "The margin is the teacher's probability of the label minus its largest other one. The "
        "line is the median, the band holds the middle 80 %, bars above count examples. Dots are "
        "a sample spread over the margins: blue where the teacher is right, orange where wrong."
    )
    return "Ratio over the teacher's margin", caption, plot


def _bands(margin: np.ndarray, ratio: np.ndarray) -> tuple[np.ndarray, list[Series]]:
    """Returns counts `[bins]` over margins from -1 to 1, and medians with 10-90 % bands.

    Bins with few examples have no band, and the line breaks there.
    """
    bin_of = _bin_of(margin)
    counts = np.bincount(bin_of, minlength=_BINS)
    lines = []
    for filled, run in itertools.groupby(range(_BINS), key=lambda j: counts[j] >= _FEW):
        if filled:
            parts = [bin_of == j for j in run]
            low, middle, high = np.array(
                [np.quantile(ratio[part], (0.1, 0.5, 0.9)) for part in parts]
            ).T
            x = np.array([margin[part].mean() for part in parts])
            lines.append(Series(name="median", x=x, y=middle, low=low, high=high))
    return counts, lines


def _bin_of(margin: np.ndarray) -> np.ndarray:
    return np.clip(((margin + 1) / 2 * _BINS).astype(int), 0, _BINS - 1)


def _spread(margin: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """Returns rows of at most `_DOTS` examples, equally many from each bin of the margin.

    Within a bin they are evenly spaced in the rank of the ratio, including its extremes.
    """
    bin_of = _bin_of(margin)
    chosen = []
    for j in np.unique(bin_of):
        rows = np.flatnonzero(bin_of == j)
        rows = rows[np.argsort(ratio[rows], kind="stable")]
        m = min(len(rows), _DOTS // _BINS)
        chosen.append(rows[np.linspace(0, len(rows) - 1, m).round().astype(int)])
    return np.concatenate(chosen)


def _comparisons(
    stored: StoredWeights, limits: tuple[float, float]
) -> tuple[str, str, Html | None]:
    pairs = [(("teacher right", "teacher wrong"), ~stored.right)]
    pairs += [(names, stored.flags[flag]) for flag, names in FLAGS.items() if flag in stored.flags]
    rows = []
    for (usual, marked), mask in pairs:
        if mask.any() and not mask.all():
            area = trust.area_under_roc(-stored.ratio, mask)
            groups = {1: (usual, stored.ratio[~mask]), 2: (marked, stored.ratio[mask])}
            rows.append(Ridge(groups=groups, note=f"AUC {area:.2f}"))
    caption = (
        "Densities of equal area, vertical lines at the means. AUC: how often an example of the "
        "orange group has a lower ratio than one of the blue group."
    )
    plot = ridges(rows, x_range=limits, x_label="ratio", pitch=76, overlap=0.85) if rows else None
    return "Ratio where something is wrong", caption, plot


def _by_class(stored: StoredWeights, limits: tuple[float, float]) -> tuple[str, str, Html]:
    damaged = stored.flags.get("teacher_shift", np.zeros(len(stored.ratio), bool))
    members = [stored.labels == c for c in range(len(stored.classes))]
    present = [c for c, part in enumerate(members) if part.any()]
    present.sort(key=lambda c: float(stored.ratio[members[c]].mean()))
    left_out = len(present) - _ROWS
    if left_out > 0:
        present = present[: _ROWS // 2] + present[-_ROWS // 2 :]
    rows = []
    for c in present:
        values = stored.ratio[members[c]]
        hit = damaged[members[c]].mean() > 0.5
        rows.append(
            Ridge(groups={1 + hit: (stored.classes[c], values)}, note=f"{values.mean():.2f}")
        )
    caption = "Each class at its own scale, sorted by its mean, which stands at the right."
    if any(2 in row.groups for row in rows):
        caption += " Orange: classes in which the teacher is damaged."
    if left_out > 0:
        caption += f" The {left_out} classes in between are left out."
    plot = ridges(rows, x_range=limits, x_label="ratio")
    return "Ratio by class", caption, plot


def _numbers(seeds: Mapping[str, Sequence[Mapping[str, float]]], heads: Sequence[str]) -> Html:
    """Returns means of the metrics over seeds, one column per arm."""
    every = dict.fromkeys(n for metrics in seeds.values() for own in metrics for n in own)
    names = [n for n in _NAMES if n in every] + [n for n in every if n.startswith("mean weight")]
    rows = [
        row(
            _NAMES.get(name, name),
            (spread([f[name] for f in metrics if name in f], 3) for metrics in seeds.values()),
        )
        for name in names
    ]
    several = any(len(metrics) > 1 for metrics in seeds.values())
    note = "Mean ± standard deviation over seeds. " if several else ""
    note += "An AUC of 0.5 and a correlation of 0 are what a ratio gets that knows nothing."
    return join(el("h3", "What the ratio knows"), table(["", *heads], rows), muted(note))


def _cards(stored: StoredWeights, *, most: int) -> Html | None:
    parts = []
    for name, title in (("low", "Lowest ratio"), ("high", "Highest ratio")):
        if name in stored.images:
            pairs = list(zip(*stored.images[name], strict=True))[:most]
            cards = [_card(stored, int(row), image) for row, image in pairs]
            parts.append(el("h3", title, class_="block"))
            parts.append(el("div", cards, class_="examples"))
    return join(parts) if parts else None


def _card(stored: StoredWeights, row: int, image: np.ndarray) -> Html:
    truth = int(stored.labels[row])
    said = [
        (name, i, stored.classes[int(choice[row])], float(p[row]), bool(choice[row] == truth))
        for i, (name, (choice, p)) in enumerate(stored.answers.items(), 1)
    ]
    marks = [names[1] for flag, names in FLAGS.items() if flag in stored.flags]
    hits = [stored.flags[flag][row] for flag in FLAGS if flag in stored.flags]
    ratio = float(stored.ratio[row])
    gauge = el(
        "svg",
        el("rect", x=0, y=0, width=100, height=6, class_="track"),
        el("rect", x=0, y=0, width=100 * min(max(ratio, 0.0), 1.0), height=6),
        viewBox="0 0 100 6",
        preserveAspectRatio="none",
        aria_hidden="true",
        class_="gauge c1",
    )
    return card(
        image,
        kind="training example",
        truth=stored.classes[truth],
        index=int(stored.index[row]),
        said=said,
        more=[
            el("p", "ratio ", el("b", f"{ratio:.3f}"), gauge, class_="ratio"),
            [el("span", m, class_="badge") for m, hit in zip(marks, hits, strict=True) if hit],
        ],
    )


def _controls(stored: Mapping[str, StoredWeights]) -> list[str]:
    words = {"shuffled": "shuffled within the batch", "batch_mean": "replaced by their batch mean"}
    return [
        f"{arm}: ratios are shown as the weighting gives them; before they acted they were "
        f"{words[seed.control]}"
        for arm, seed in stored.items()
        if seed.control
    ]


def _range(ratios: np.ndarray) -> tuple[float, float]:
    """Returns limits of ratios `[n]`: at least 0.1 apart, inside [0, 1] where the ratios are."""
    low, high = float(ratios.min()), float(ratios.max())
    pad = max(0.04 * (high - low), (0.1 - (high - low)) / 2, 0.0)
    inside = low >= 0 and high <= 1
    low, high = low - pad, high + pad
    return (max(low, 0.0), min(high, 1.0)) if inside else (low, high)
