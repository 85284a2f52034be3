"""Describes what a config would run without training: tables from shapes only."""

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax

from distill_jax.core import partition
from distill_jax.report import tables
from distill_jax.run import build as build_lib
from distill_jax.run import collectives, preflight
from distill_jax.run import config as config_lib
from distill_jax.run.build import variants
from distill_jax.run.config import ConfigDict


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.1f} {unit}" if unit != "B" else f"{n:.0f} B"
        n /= 1024
    raise AssertionError


def _leaf_rows(tree) -> list[tuple[str, ...]]:
    rows = []
    for name, leaf in partition.named_leaves(tree).items():
        on_device = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        shape = "x".join(map(str, leaf.shape)) or "scalar"
        spec = str(tuple(leaf.sharding.spec)) if any(leaf.sharding.spec) else "replicated"
        rows.append((name, shape, str(leaf.dtype), spec, _bytes(on_device)))
    return rows


def describe(config: ConfigDict, *, trusted: Collection[str] | None = None) -> str:
    """Describes a run: a summary, the sharding of each leaf, the step, the config.

    The summary has networks with their parameters, length, memory and cost. FLOPs are summed over
    all devices of a step; memory and communication are per device. Compiles for the devices of this
    process. Reads no data, only the shapes of the data set, where its module has a `spec`.

    Args:
      config: the config.
      trusted: as in `build.build`.

    Raises:
      ConfigError: the config does not fit together.
    """
    experiment = build_lib.build(config, shapes_only=True, trusted=trusted)
    warnings: list[str] = []
    preflight.warn(experiment, warnings.append, alone=not config.study.arms, planned=True)
    compiled = {
        variant: build_lib.compile_step(
            experiment, build_lib.feed_shapes(experiment, variant), variant
        )
        for variant in experiment.variants
    }
    header = ("leaf", "shape", "type", "sharding", "per device")
    state = experiment.abstract_state
    leaves = _leaf_rows({"params": state.params, "targets": state.targets})
    leaves += _leaf_rows({"frozen": experiment.abstract_frozen})
    leaves += _leaf_rows({"model_state": state.model_state, "optimizer": state.opt_state})
    cache = experiment.cache
    stored = [("teacher cache", cache.describe(len(experiment.dataset.train)))] if cache else []
    sections = [
        ("summary", _summary(experiment, compiled)),
        *((_step_title(experiment, v), _cost(experiment, step)) for v, step in compiled.items()),
        *stored,
        ("state", tables.plain(leaves, header)),
        ("config", json.dumps(json.loads(config_lib.to_json(config)), indent=1)),
    ]
    parts = ["\n".join(warnings)] if warnings else []
    return "\n\n".join([*parts, *(f"== {title}\n{body}" for title, body in sections)])


def _summary(experiment: build_lib.Experiment, compiled: Mapping[str, Any]) -> str:
    config, roles = experiment.config, experiment.shapes.roles
    count = {r: sum(math.prod(x.shape) for x in jax.tree.leaves(roles[r].params)) for r in roles}
    networks = [
        (
            role,
            (config.roles[role].model or "(as its source)")
            if role in config.roles
            else config.cache.teacher,
            f"{n:,}",
            _kind(config, role),
        )
        for role, n in count.items()
    ]
    sizes = ", ".join(f"{axis}={size}" for axis, size in experiment.mesh.shape.items())
    parts = (f"{len(part):,} {name}" for name, part in experiment.dataset.parts.items())
    flops = experiment.flops_per_step
    peak = max(collectives.memory(step)["peak"] for step in compiled.values())
    steps, per_epoch = experiment.total_steps, experiment.steps_per_epoch
    learned = sum(n for role, n in count.items() if role in experiment.trainable)
    fields = {
        "method": f"{config.objective.name} on {config.data.name}, examples: {', '.join(parts)}",
        "length": f"{steps:,} steps of {config.batch_size} examples, {per_epoch:.2f} an epoch",
        "parameters": f"{sum(count.values()):,}, of which {learned:,} are learned by gradient",
        "memory": f"{_bytes(peak)} at most in a step, on each device",
        "cost": f"{tables.flop(flops)} a step, {tables.flop(flops * steps)} in all"
        if flops
        else "XLA counts no operations here",
        "devices": f"{experiment.mesh.size} ({jax.devices()[0].device_kind}), {sizes}",
    }
    if len(experiment.phases) > 1:
        parts = (f"{type(p.objective).__name__} from step {p.start}" for p in experiment.phases)
        fields["phases"] = ", ".join(parts)
    if experiment.outer is not None:
        how = experiment.outer.options
        fields["outer step"] = f"every {experiment.outer.every}, {how.method}: {how.passes}"
    lines = [f"{name:<12}{text}" for name, text in fields.items()]
    table = tables.plain(networks, ("role", "model", "parameters", "learns"))
    return "\n".join([*lines, "", table])


def _step_title(experiment: build_lib.Experiment, variant: str) -> str:
    if experiment.outer is None and len(experiment.phases) == 1:
        return "step"
    (phase, outer), title = variants.read(variant), "step"
    if experiment.outer is not None:
        title += " in which the weighting learns" if outer else " of the student alone"
    if len(experiment.phases) > 1:
        title += f" from step {experiment.phases[phase].start} on"
    return f"{title}, {experiment.share(variant):.1%} of all"


def _cost(experiment: build_lib.Experiment, step: Any) -> str:
    flops, memory = (step.cost_analysis() or {}).get("flops"), collectives.memory(step)
    cost = tables.flop(flops * experiment.devices) if flops else "not counted"
    return (
        f"operations {cost}, over all devices\n"
        f"arguments  {_bytes(memory['arguments'])}, on each device, as below\n"
        f"outputs    {_bytes(memory['outputs'])} ({_bytes(memory['in_place'])} in place)\n"
        f"temporary  {_bytes(memory['temporary'])}\n"
        f"peak       {_bytes(memory['peak'])}\n\n{_exchange(step)}"
    )


def _exchange(step) -> str:
    header = ("collective", "count", "devices", "bytes", "sent by each")
    rows = [
        (kind, str(total.count), str(group), _bytes(total.nbytes), _bytes(total.sent))
        for (kind, group), total in collectives.totals(collectives.of_compiled(step)).items()
    ]
    return tables.plain(rows, header) if rows else "no collectives"


def _kind(config: ConfigDict, role: str) -> str:
    if role not in config.roles:
        return "a function"
    spec = config.roles[role]
    if spec.frozen:
        return "frozen"
    return f"average of {spec.ema_of}, decay {spec.decay}" if spec.ema_of else "by gradient"
