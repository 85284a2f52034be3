"""Hyperparameters that do not fit the run: its length, its data and the memory of its host.

The range of a single value is checked where the value is defined (`core/ranges.py`). This module
checks values that depend on other parts of the config. Everything is computed from shapes.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.analysis import dependence
from distill_jax.core import bilevel, durations, hypergradient, tokens
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.run.build import Experiment
from distill_jax.run.preflight.finding import Finding


def findings(experiment: Experiment) -> Iterator[Finding]:
    """Yields hyperparameters that do not fit the run."""
    yield from of_memory(experiment)
    yield from of_schedules(experiment)
    yield from of_queues(experiment)
    yield from of_geometry(experiment)
    yield from of_optimizer(experiment)


def _parts(experiment: Experiment) -> dict[str, Any]:
    """Returns the method and the weighting by their group in the config."""
    objective = experiment.objective
    if isinstance(objective, WeightedObjective):
        return {"objective": objective.objective, "weighting": objective.weighting}
    return {"objective": objective}


def of_schedules(experiment: Experiment) -> Iterator[Finding]:
    """Schedules of a method that end after the run, as `api.Objective.schedules` declares them."""
    total = experiment.total_steps
    for group, part in _parts(experiment).items():
        for name, kind in getattr(part, "schedules", {}).items():
            value = getattr(part, name)
            steps = durations.steps(
                value, name, steps_per_epoch=experiment.steps_per_epoch, total_steps=total
            )
            least = f"{total} steps"
            if isinstance(value, str) and "epoch" in value:
                least = f"{total / experiment.steps_per_epoch:.4g} epochs"
            if kind == "hold" and steps >= total:
                what = (
                    f"it lasts {steps:.0f} of {total} steps, so the delayed part would never begin"
                )
                hint = f"less than {least}, or longer training"
            elif kind == "ramp" and steps > total:
                what = (
                    f"it ends after {steps:.0f} steps, and training after {total}: its last value "
                    "would never be reached"
                )
                hint = f"at most {least}, or longer training"
            else:
                continue
            yield Finding("error", what, f"{group}.kwargs.{name}", hint)


def of_queues(experiment: Experiment) -> Iterator[Finding]:
    """Queues so long that an example meets its own earlier keys as negatives.

    Examples come in a new order every epoch, so that the distance of two visits is that of two
    independent uniform draws: with r epochs in the queue, a share r^2 / 2 of the examples (r <= 1)
    or 1 - (2 - r)^2 / 2 (r <= 2) meet themselves.
    """
    objective = _parts(experiment)["objective"]
    n = len(experiment.dataset.train)
    for name, each in objective.remembered(experiment.shapes.batch).items():
        epochs = getattr(objective, name) / (each * n)
        if epochs <= 1:
            continue
        share = 1 - max(2 - epochs, 0) ** 2 / 2
        yield Finding(
            "warning",
            f"it remembers {epochs:.3g} epochs of {n} examples: {share:.0%} of the examples would "
            f"have an earlier key of their own among the negatives; at most {each * n // 2} keys, "
            "half an epoch, leave 12%",
            f"objective.kwargs.{name}",
        )


def memory_limit() -> int:
    """Returns the bytes that the devices of all processes have, or on CPU the hosts of them."""
    devices = jax.local_devices()
    if devices[0].platform != "cpu":
        limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in devices]
        if all(limits):
            return sum(limits) * jax.process_count()
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # of a container
        limit = min(limit, int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text()))
    return limit * jax.process_count()


def of_memory(experiment: Experiment) -> Iterator[Finding]:
    """What needs more memory than there is, by its shapes: networks, optimizer, memory, batch."""
    limit = memory_limit()
    state, config = experiment.abstract_state, experiment.config
    networks: dict[str, Any] = {**state.params, **state.targets, **experiment.abstract_frozen}
    parts = {f"roles.{role}": tree for role, tree in networks.items()}
    parts |= {"objective": state.memory, "optim": state.opt_state}
    parts["data.train_transforms"] = experiment.shapes.batch
    sizes = {where: _bytes(tree) for where, tree in parts.items()}
    if (total := sum(sizes.values())) <= limit:
        return
    where = max(sizes, key=lambda path: sizes[path])
    where = next((path for path in sizes if sizes[path] > limit), where)
    what = f"{_spell(sizes[where])} of {_spell(total)} that a step needs at least, and there are "
    hint = "smaller networks, queues, images or batches"
    if where.startswith("roles.") and config.roles[where[6:]].kwargs:
        where += ".kwargs"
    yield Finding("memory", f"{what}{_spell(limit)}", where, hint)


def _bytes(tree: Any) -> int:
    def one(x: Any) -> int:
        wide = jnp.issubdtype(x.dtype, jax.dtypes.extended)
        return x.size * (8 if wide else x.dtype.itemsize)

    return sum(one(x) for x in jax.tree.leaves(tree))


def _spell(size: int) -> str:
    return f"{size / 2**30:,.3g} GiB"


def of_geometry(experiment: Experiment) -> Iterator[Finding]:
    """Arguments that fit the number of tokens, and not where these lie in the image."""
    inputs = experiment.shapes.batch["input"]
    if isinstance(inputs, Mapping) or inputs.ndim < 4:
        return
    for name, kwargs in experiment.config.data.transform_kwargs.items():
        if "hidden" not in experiment.shapes.batch or "patch_size" not in kwargs:
            continue
        cut = {"patch_size": kwargs.patch_size, "tubelet": kwargs.get("tubelet", 2)}
        grid = tokens.grid_of(inputs.shape[1:], **cut)
        for role, shapes in experiment.shapes.roles.items():
            own = experiment.config.roles[role].kwargs if role in experiment.config.roles else {}
            expected = own.get("grid")
            if expected and tuple(expected) != grid:
                yield Finding(
                    "error",
                    f"a grid of {_by(expected)} tokens, and {name} cuts inputs into {_by(grid)}",
                    f"roles.{role}.kwargs.grid",
                    f"{grid}",
                )
            for key in ("patch_size", "tubelet")[: len(grid) - 1]:
                masked = len(jax.tree.leaves(shapes.inputs)) > 1
                if masked and key in own and own[key] != cut[key]:
                    yield Finding(
                        "error",
                        f"patches of {key} {own[key]}, and {name} hides those of {cut[key]}",
                        f"roles.{role}.kwargs.{key}",
                        f"{cut[key]}, as data.transform_kwargs.{name}.{key}",
                    )
    h, w = inputs.shape[-3:-1]
    if h == w:
        return
    objective = _parts(experiment)["objective"]
    for name in ("student_stages", "student_stage", "teacher_stages", "teacher_stage"):
        role, value = name.partition("_")[0], getattr(objective, name, ())
        outputs = experiment.shapes.roles[role].outputs if role in experiment.shapes.roles else {}
        for stage in (value,) if isinstance(value, str) else value:
            if stage in outputs and outputs[stage].ndim == 3:
                yield Finding(
                    "error",
                    f"the tokens {stage!r} would be read as a square map, and images are {h}x{w}",
                    f"objective.kwargs.{name}",
                    "a stage that is a map or a vector, or square images",
                )


def _by(grid: Any) -> str:
    return " x ".join(map(str, grid))


def of_optimizer(experiment: Experiment) -> Iterator[Finding]:
    """An inner optimizer whose update has no derivative in the gradient, such as its sign."""
    tx = experiment.tx
    if experiment.outer is None or not isinstance(tx, bilevel.Optimizers):
        return
    params = {role: experiment.shapes.roles[role].params for role in experiment.trainable}
    inner, _ = tx.split(params)
    args = inner, jax.eval_shape(tx.inner.init, inner), inner, inner

    def pulled(grads: Any, opt_state: Any, params: Any, cotangent: Any) -> Any:
        return hypergradient.pull_back(tx.inner, grads, opt_state, params, cotangent)

    if all(dependence.dead_leaves(pulled, *args)):
        yield Finding(
            "error",
            "its update does not depend on the size of a gradient, as in methods that take "
            "signs, so no gradient would reach the weighting",
            "optim.name",
            "an optimizer with a derivative, such as sgd or adam",
        )
