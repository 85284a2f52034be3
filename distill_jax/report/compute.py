"""Cost of the runs."""

from collections.abc import Mapping, Sequence

import numpy as np

from distill_jax.report import figures
from distill_jax.report.folders import Run, lookup
from distill_jax.report.html import Html, join
from distill_jax.report.page import figure, grid, muted, row, table
from distill_jax.report.wording import NONE, duration, is_finite, si

_FLOOR = ("flops_per_second", "floor_flops_per_step", "floor_over_actual", "floor_bytes_per_step")

_COSTS = {1: ("flops_per_step", "FLOPs"), 5: ("seconds_per_step", "time")}


def section(arms: Mapping[str, Sequence[Run]], *, base: str | None = None) -> Html | None:
    """Shows the cost of the arms, and the cost of their steps relative to the arm `base`."""
    arms = {arm: runs for arm, runs in arms.items() if any(run.result for run in runs)}
    if not arms:
        return None
    every = [run for runs in arms.values() for run in runs]
    roles = list(dict.fromkeys(r for run in every for r in run.result.get("parameters") or {}))
    known = ("seconds", "flops_per_step", "seconds_per_step", *_FLOOR)
    names = dict.fromkeys(
        name
        for run in every
        for name, value in (run.result.get("compute") or {}).items()
        if is_finite(value)
    )
    others = [name for name in names if name not in known]
    timed = "seconds_per_step" in names
    rows = []
    for arm, runs in arms.items():
        steps, flops = _mean(runs, "steps"), _mean(runs, "compute.flops_per_step")
        seconds, pace = _mean(runs, "compute.seconds"), _mean(runs, "compute.seconds_per_step")
        cells = [
            duration(seconds) if seconds is not None else NONE,
            f"{steps:,.0f}" if steps is not None else NONE,
            *[NONE if pace is None else f"{1e3 * pace:.3g} ms"] * timed,
            si(flops),
            si(flops * steps if flops is not None and steps is not None else None),
            *(si(_mean(runs, f"compute.{name}")) for name in others),
            *(si(_mean(runs, f"parameters.{role}")) for role in roles),
        ]
        rows.append(row(arm, cells))
    heads = ["time", "steps", *["time per step"] * timed, "FLOPs per step", "FLOPs of training"]
    heads += [name.replace("_", " ") for name in others] + [f"parameters: {r}" for r in roles]
    several = any(len(runs) > 1 for runs in arms.values())
    text = "FLOPs are those of the compiled step over all its devices."
    return join(
        muted(text + " Means over the runs of an arm." * several),
        table(["", *heads], rows),
        _floors(arms),
        _shares(arms),
        _relative(arms, base) if base in arms else None,
    )


def _mean(runs: Sequence[Run], path: str) -> float | None:
    values = [float(v) for run in runs if is_finite(v := lookup(run.result, path))]
    return float(np.mean(values)) if values else None


def _floors(arms: Mapping[str, Sequence[Run]]) -> Html | None:
    """Compares the steps with a floor of their cost."""
    floors = {
        arm: [_mean(runs, f"compute.{name}") for name in _FLOOR] for arm, runs in arms.items()
    }
    if not any(value is not None for values in floors.values() for value in values):
        return None
    rows = []
    for arm, (speed, flops, ratio, moved) in floors.items():
        share = NONE if ratio is None else f"{ratio:.2f}"
        rows.append(row(arm, (si(speed), si(flops), share, si(moved))))
    caption = (
        "The floor is one forward pass of each network that a step applies, three of each that "
        "learns, and every parameter, moment and example moved once. The gradient with respect to "
        "the input of the first layer counts, although a step does without: a network of few "
        "layers may be below its floor."
    )
    return join(
        table(["", "FLOP/s", "floor, FLOPs", "floor over actual", "floor, bytes"], rows),
        muted(caption),
    )


def _shares(arms: Mapping[str, Sequence[Run]]) -> Html | None:
    """Shows a breakdown of the time after the first step."""
    every = [run for runs in arms.values() for run in runs]
    phases = sorted({p for run in every for p in lookup(run.result, "compute.shares") or {}})
    if not phases:
        return None
    rows = []
    for arm, runs in arms.items():
        shares = [_mean(runs, f"compute.shares.{phase}") for phase in phases]
        rows.append(row(arm, [NONE if s is None else f"{100 * s:.1f} %" for s in shares]))
    caption = (
        "Where the time after the first step went, as the host sees it: reading data, calling the "
        "step (which computes, where a backend computes in the call), waiting for the device, "
        "evaluating, saving, waiting for other processes."
    )
    return join(table(["time in", *phases], rows), muted(caption))


def _relative(arms: Mapping[str, Sequence[Run]], base: str) -> Html | None:
    """Draws the cost of a step of each arm over that of `base`, where both are known."""
    costs = {
        i: {arm: _mean(runs, f"compute.{path}") for arm, runs in arms.items()}
        for i, (path, _) in _COSTS.items()
    }
    kinds = {i: name for i, (_, name) in _COSTS.items() if (costs[i][base] or 0) > 0}
    rows = [
        figures.Bars(
            name=arm,
            values={i: v / b for i in kinds if (v := costs[i][arm]) and (b := costs[i][base])},
        )
        for arm in arms
    ]
    if not kinds or sum(bool(bars.values) for bars in rows) < 2:
        return None
    plot = figures.bar_chart(
        rows, kinds=kinds, x_label=f"relative to {base}", level=1.0, unit="\u00d7"
    )
    caption = (
        "FLOPs are those of the compiled steps, averaged over the schedule; time is the median "
        "over training, which depends on what else the machine did."
    )
    return grid([figure("Cost of a step", plot, caption, legend=figures.swatches(kinds))])
