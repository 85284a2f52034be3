"""How fast a run was, and how fast its step could be."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from distill_jax.core.api import Role
from distill_jax.core.steps import BoundNets
from distill_jax.report import tables
from distill_jax.run.build import Experiment


def floor(experiment: Experiment) -> dict[str, float]:
    """Returns lower bounds on the computation and memory traffic of a step, over all devices.

    FLOPs: one forward pass of each network that the step applies, plus twice as much for the
      gradient of each network that learns. Bytes: every parameter, moment, average and example read
      once, and every array that the step changes written once. Activations, which a large cache
      could hold, are left
    out. Networks are traced and lowered, not compiled; XLA counts their operations. A method that
    calls a network on several views needs more, and a gradient that stops early less.

    Returns:
      `floor_flops_per_step`, left out where XLA counts none, and `floor_bytes_per_step`.
    """
    flops: float | None = 0.0
    for role, shapes in experiment.shapes.roles.items():
        if role in experiment.cached or flops is None:
            continue
        learns = role in experiment.trainable

        forward = _forward(experiment, role, train=learns)
        lowered = jax.jit(forward).lower(shapes.params, shapes.state, *shapes.inputs)
        counted = (lowered.cost_analysis() or {}).get("flops")
        flops = None if counted is None else flops + (3 if learns else 1) * counted
    state = experiment.abstract_state
    changed = _bytes((state.params, state.targets, state.opt_state, state.model_state))
    read = _bytes((experiment.online(experiment.abstract_frozen), experiment.shapes.batch))
    bound = {"floor_bytes_per_step": float(2 * changed + read)}
    return bound if flops is None else {"floor_flops_per_step": flops, **bound}


def _forward(experiment: Experiment, role: Role, *, train: bool) -> Callable[..., Any]:
    def forward(params, state, *inputs):
        nets = BoundNets(
            experiment.models,
            {role: params},
            {role: state},
            key=jax.random.key(0),
            precision=experiment.config.precision,
        )
        return nets(role, *inputs, train=train)[0]

    return forward


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def summary(
    experiment: Experiment,
    *,
    flops_per_step: float | None,
    seconds_per_step: float | None,
    spent: Mapping[str, float],
) -> dict[str, Any]:
    """Returns the speed entries of a result.

    Args:
      experiment: of the run.
      flops_per_step: of the compiled step over all devices.
      seconds_per_step: median over training.
      spent: seconds since the first step by phase, from `watch.Watch.spend`.

    Returns:
      `flops_per_second`, summed over the devices of a step like all other figures, those of
      `floor`, `floor_over_actual` (their ratio in FLOPs), and `shares` of the time by phase.
    """
    figures: dict[str, Any] = floor(experiment)
    if flops_per_step:
        if seconds_per_step:
            figures["flops_per_second"] = flops_per_step / seconds_per_step
        if "floor_flops_per_step" in figures:
            ratio = figures["floor_flops_per_step"] / flops_per_step
            figures["floor_over_actual"] = round(ratio, 4)
    total = sum(spent.values())
    if total:
        figures["shares"] = {phase: round(s / total, 4) for phase, s in sorted(spent.items())}
    return figures


def line(compute: Mapping[str, Any]) -> str:
    """Returns the speed of a finished run on one line; empty where nothing is known."""
    parts = []
    if flops := compute.get("flops_per_step"):
        pace = compute.get("flops_per_second")
        rate = f", {tables.flop(pace)}/s" if pace else ""
        parts.append(f"{tables.flop(flops)} a step{rate}")
    least, ratio = (compute.get(k) for k in ("floor_flops_per_step", "floor_over_actual"))
    if least is not None and ratio is not None:
        parts.append(f"floor {tables.flop(least)} a step, {ratio:.2f} of that")
    shares = sorted(compute.get("shares", {}).items(), key=lambda item: -item[1])
    if shares:
        parts.append("time: " + ", ".join(f"{phase} {100 * s:.0f} %" for phase, s in shares))
    return "; ".join(parts)
