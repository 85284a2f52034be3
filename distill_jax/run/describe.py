"""What a config would run, without reading data or training: tables from shapes alone."""

import json
import math
from collections.abc import Collection

import jax

from distill_jax.core import partition
from distill_jax.run import build as build_lib
from distill_jax.run import collectives
from distill_jax.run import config as config_lib
from distill_jax.run.config import ConfigDict


def _table(rows: list[tuple[str, ...]], header: tuple[str, ...]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, tuple("-" * w for w in widths), *rows]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in lines
    )


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
    """Returns the resolved config, the parameters, the sharding of each leaf and the step's cost.

    The cost is that of the compiled step on each device: operations, memory, and what it exchanges
    with others. Compiles for the devices of this process. Reads no data: the data set answers with
    its shapes.

    Args:
      config: the config.
      trusted: as in `build.build`.

    Raises:
      ConfigError: the config does not fit together.
    """
    experiment = build_lib.build(config, shapes_only=True, trusted=trusted)
    warnings: list[str] = []
    experiment.say_doubts(warnings.append, alone=not config.study.arms)
    compiled = {
        variant: experiment.compile_step(build_lib.feed_shapes(experiment, variant), variant)
        for variant in experiment.variants
    }
    parameters = [
        (
            role,
            (config.roles[role].model or "(as its source)")
            if role in config.roles
            else config.cache.teacher,
            f"{sum(math.prod(x.shape) for x in jax.tree.leaves(found.params)):,}",
            _kind(config, role),
        )
        for role, found in experiment.shapes.roles.items()
    ]
    header = ("leaf", "shape", "type", "sharding", "per device")
    state = experiment.abstract_state
    leaves = _leaf_rows({"params": state.params, "targets": state.targets})
    leaves += _leaf_rows({"frozen": experiment.abstract_frozen})
    leaves += _leaf_rows({"model_state": state.model_state, "optimizer": state.opt_state})
    sizes = ", ".join(f"{axis}={size}" for axis, size in experiment.mesh.shape.items())
    cache = experiment.cache
    stored = [("teacher cache", cache.describe(len(experiment.dataset.train)))] if cache else []
    sections = [
        ("config", json.dumps(json.loads(config_lib.to_json(config)), indent=1)),
        (
            "run",
            f"{experiment.total_steps:,} steps of {config.batch_size} examples, "
            f"{experiment.steps_per_epoch:.2f} steps an epoch\n"
            f"mesh: {sizes} ({jax.devices()[0].device_kind})",
        ),
        ("networks", _table(parameters, ("role", "model", "parameters", "learns"))),
        ("state", _table(leaves, header)),
        *stored,
        *((_step_title(experiment, v), _cost(step)) for v, step in compiled.items()),
    ]
    found = ["\n".join(warnings)] if warnings else []
    return "\n\n".join([*found, *(f"== {title}\n{body}" for title, body in sections)])


def _step_title(experiment: build_lib.Experiment, variant: str) -> str:
    if experiment.outer is None:
        return "step, on each device"
    share = experiment.outer.share(experiment.total_steps)
    if variant == "outer":
        return f"step in which the weigher learns, {share:.1%} of all, on each device"
    return f"step of the student alone, {1 - share:.1%} of all, on each device"


def _cost(step) -> str:
    cost, memory = step.cost_analysis() or {}, collectives.memory(step)
    return (
        f"FLOPs      {cost.get('flops', float('nan')):.4g}\n"
        f"arguments  {_bytes(memory['arguments'])}\n"
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
    return _table(rows, header) if rows else "no collectives"


def _kind(config: ConfigDict, role: str) -> str:
    if role not in config.roles:
        return "a function"
    spec = config.roles[role]
    if spec.frozen:
        return "frozen"
    return f"average of {spec.ema_of}, decay {spec.decay}" if spec.ema_of else "by gradient"
