"""What the runs cost."""

from collections.abc import Mapping, Sequence

import numpy as np

from distill_jax.run.figures import Html, el, join
from distill_jax.run.report.folders import Run, lookup
from distill_jax.run.report.page import table
from distill_jax.run.report.wording import NONE, duration, is_finite, si


def section(arms: Mapping[str, Sequence[Run]]) -> Html | None:
    def mean(runs: Sequence[Run], path: str) -> float | None:
        values = [float(v) for run in runs if is_finite(v := lookup(run.result, path))]
        return float(np.mean(values)) if values else None

    arms = {arm: runs for arm, runs in arms.items() if any(run.result for run in runs)}
    if not arms:
        return None
    every = [run for runs in arms.values() for run in runs]
    roles = list(dict.fromkeys(r for run in every for r in run.result.get("parameters") or {}))
    known = ("seconds", "flops_per_step")
    others = dict.fromkeys(
        name
        for run in every
        for name, value in (run.result.get("compute") or {}).items()
        if name not in known and is_finite(value)
    )
    rows = []
    for arm, runs in arms.items():
        steps, flops = mean(runs, "steps"), mean(runs, "compute.flops_per_step")
        seconds = mean(runs, "compute.seconds")
        cells = [
            duration(seconds) if seconds is not None else NONE,
            f"{steps:,.0f}" if steps is not None else NONE,
            si(flops),
            si(flops * steps if flops is not None and steps is not None else None),
            *(si(mean(runs, f"compute.{name}")) for name in others),
            *(si(mean(runs, f"parameters.{role}")) for role in roles),
        ]
        rows.append([el("th", arm, scope="row"), *(el("td", c, class_="n") for c in cells)])
    heads = ["time", "steps", "FLOPs per step", "FLOPs of training"]
    heads += [name.replace("_", " ") for name in others] + [f"parameters: {r}" for r in roles]
    several = any(len(runs) > 1 for runs in arms.values())
    return join(
        el("p", "Means over the runs of an arm.", class_="muted") if several else None,
        table(["", *heads], rows),
    )
