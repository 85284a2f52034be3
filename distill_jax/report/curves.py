"""Learning curves, with bands over seeds."""

from collections.abc import Mapping, Sequence

import numpy as np

from distill_jax.report import figures
from distill_jax.report.folders import Run
from distill_jax.report.html import Html, el, join
from distill_jax.report.page import figure, muted

_POINTS = 240  # maximum per curve; more are not visible and enlarge the file


def section(arms: Mapping[str, Sequence[Run]], *, names: Sequence[str]) -> Html | None:
    panels = []
    alone = next(iter(arms.values())) if len(arms) == 1 else ()
    starts = [s["from"] for s in alone[0].segments[1:]] if len(alone) == 1 else []
    for name in names:
        series = {
            i: line
            for i, (arm, runs) in enumerate(arms.items(), len(arms) == 1)
            if (line := band(arm, [run.curve(name) for run in runs])) is not None
        }
        if series:
            low = min(float(s.y.min() if s.low is None else s.low.min()) for s in series.values())
            high = max(float(s.y.max()) for s in series.values())
            log = "loss" in name and low > 0 and high / low > 30
            plot = figures.line_chart(series, y_label=name, log=log, at=starts)
            panels.append(figure(name + (", log scale" if log else ""), plot))
    if not panels:
        return None
    marks = "Dashed vertical lines: the run went on differently from here (see Segments)."
    several = any(len(runs) > 1 for runs in arms.values())
    return join(
        muted("Lines are means over seeds, bands span the seeds.") if several else None,
        muted(marks) if starts else None,
        figures.key(list(arms)) if len(arms) > 1 else None,
        el("div", panels, class_="grid2"),
    )


def band(name: str, curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> figures.Series | None:
    """Returns the mean and range of several curves over the steps that all of them reached."""
    curves = [curve for curve in curves if len(curve[0])]
    if not curves:
        return None
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = max((x for x, _ in curves), key=len)
    grid = grid[(grid >= start) & (grid <= end)]
    if not len(grid):
        return None
    values = np.stack([np.interp(grid, x, y) for x, y in curves])
    parts = np.array_split(np.arange(len(grid)), min(_POINTS, len(grid)))
    x = np.array([grid[part].mean() for part in parts])
    y = np.stack([values[:, part].mean(axis=1) for part in parts], axis=1)
    band = len(curves) > 1
    return figures.Series(
        name=name,
        x=x,
        y=y.mean(axis=0),
        low=y.min(axis=0) if band else None,
        high=y.max(axis=0) if band else None,
    )
