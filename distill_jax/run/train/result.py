"""The result of a run, as it is written and printed."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from distill_jax.core.partition import named_leaves
from distill_jax.report import tables
from distill_jax.report.wording import alarm_line
from distill_jax.run import speed
from distill_jax.run.build import Experiment
from distill_jax.run.config import ConfigDict
from distill_jax.run.watch import Watch


def format_result(result: Mapping[str, Any]) -> str:
    """Formats the metrics of a finished run: the last state, and the best by held-out metric."""
    states = {"last": {"step": result["steps"], **result["metrics"]}, "best": result["best"]}
    lines = [tables.metrics(states, chosen_by=result.get("chosen_by") or "")]
    lines += lost_line(result.get("selection_lost", ()))
    if result.get("skipped"):
        lines.append(f"{result['skipped']} steps were skipped: their loss was not finite")
    lines += [alarm_line(alarm) for alarm in result.get("alarms", ())]
    if speed_line := speed.line(result.get("compute", {})):
        lines.append(speed_line)
    return "\n".join(lines)


def lost_line(lost: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the warning that better states than the chosen one were lost, if any."""
    if not lost:
        return []
    steps = ", ".join(str(row["step"]) for row in lost)
    return [f"warning: the checkpoint of step {steps}, lost since, may have been the best"]


def of_experiment(experiment: Experiment) -> dict[str, Any]:
    """Returns the entries of a result about the data and the networks."""
    return {
        "classes": list(experiment.dataset.classes),
        "task": experiment.dataset.task,
        "provenance": {
            split: part.provenance._asdict() for split, part in experiment.dataset.parts.items()
        },
        "data": {
            "scanned": experiment.data.scanned,
            "in_training": {
                name: {"repeated": found.repeated, "of": found.of, "text": found.spell(name)}
                for name, found in experiment.overlaps.items()
                if found.repeated
            },
        },
        "parameters": {
            role: sum(int(np.prod(x.shape)) for x in named_leaves(found.params).values())
            for role, found in experiment.shapes.roles.items()
        },
    }


def of_compute(
    experiment: Experiment,
    config: ConfigDict,
    *,
    flops_per_step: float | None,
    paces: Sequence[float],
    phases: Mapping[str, float],
    watch: Watch,
    side_by_side: int = 1,
) -> dict[str, Any]:
    """Returns the entries of a result about operations and time.

    Args:
      experiment: what was run.
      config: of the run.
      flops_per_step: of the compiled step over all devices.
      paces: seconds of a step between events.
      phases: seconds by phase of the process.
      watch: of the steps.
      side_by_side: runs that shared the time.
    """
    pace = round(float(np.median(paces)) / side_by_side, 6) if paces else None
    return {
        "flops_per_step": flops_per_step,
        "seconds_per_step": pace,
        **speed.summary(
            experiment,
            flops_per_step=flops_per_step,
            seconds_per_step=pace,
            spent=watch.spend(),
        ),
        "compilations_after_start": len(watch.recompiled),
        "examples": experiment.total_steps * config.batch_size,
        "devices": jax.device_count(),
        "phases": {name: round(t / side_by_side, 3) for name, t in phases.items()},
        **({"side_by_side": side_by_side} if side_by_side > 1 else {}),
    }
