"""The method of a config: its objective, weighting, optimizers and moving averages."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import optax
from jax.sharding import Mesh

from distill_jax.core import (
    bilevel,
    lookahead,
    optim,
    partition,
    phases,
    steps,
    weighted_objective,
)
from distill_jax.core.api import (
    Dataset,
    Objective,
    Role,
)
from distill_jax.core.errors import ConfigError, below, explained
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.data import labels
from distill_jax.data.moments import example_array
from distill_jax.data.source import example_ids, example_labels
from distill_jax.run import config as config_lib
from distill_jax.run.build.data import Data
from distill_jax.run.config import ConfigDict
from distill_jax.run.resolve import bind, resolve


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    """When the weighting learns, and from how much.

    Attributes:
      options: how its gradient is taken.
      every: student steps between two of the weighting.
      warmup: student steps before the first.
      batch_size: held-out examples a step.
    """

    options: bilevel.Bilevel
    every: int
    warmup: int
    batch_size: int

    def due(self, step: int) -> bool:
        return step >= self.warmup and (step - self.warmup) % self.every == 0

    def count(self, step: Any) -> Any:
        """Returns how many outer steps came before `step`; also under `jit`."""
        return (step - self.warmup) // self.every

    def steps_before(self, step: int) -> int:
        """Returns in how many steps before `step` the weighting learns."""
        return max(0, -(-(step - self.warmup) // self.every))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What a run minimises, and how.

    Attributes:
      objective: the method, with the weighting if the config names one.
      phases: its parts of training.
      optimizer: of the networks that learn from the training loss.
      outer_optimizer: of the weighting, where it has one of its own.
      schedule: of the learning rate.
      outer: when the weighting learns; None where it does not.
      ema: `{role: (source, decay)}`.
    """

    objective: Objective
    phases: tuple[phases.Phase, ...]
    optimizer: optax.GradientTransformation
    outer_optimizer: optax.GradientTransformation | None
    schedule: optax.Schedule
    outer: Outer | None
    ema: Mapping[Role, tuple[Role, steps.Decay]]


def make_method(
    config: ConfigDict,
    make_objective: Callable,
    data: Data,
    *,
    trainable: tuple[Role, ...],
    averages: tuple[Role, ...],
    mesh: Mesh,
    trusted: Collection[str],
) -> Method:
    """Builds objective, weighting and optimizers.

    Args:
      config: a config.
      make_objective: the function that `objective.name` refers to.
      data: the data.
      trainable: roles that learn.
      averages: roles that are moving averages.
      mesh: devices.
      trusted: as in `resolve`.
    """
    dataset, total_steps = data.dataset, data.total_steps
    arguments = schedule_args(config, data.steps_per_epoch, total_steps)
    with below("optim", {**{key: key for key in arguments}, "warmup_steps": "warmup"}):
        optimizer, schedule = optim.make_optimizer(total_steps=total_steps, **arguments)
    ema = {role: _moving_average(config.roles[role], total_steps) for role in averages}
    run_info = {
        "num_classes": len(dataset.classes),
        "task": dataset.task,
        "num_examples": int(example_ids(dataset.train).max(initial=-1)) + 1,
        "total_steps": total_steps,
        "steps_per_epoch": data.steps_per_epoch,
    }
    kwargs = config.objective.kwargs.to_dict()
    run_info |= label_statistics(dataset, kwargs)
    objective = bind(make_objective, kwargs, where="objective.kwargs", provided=run_info)()
    check_made(
        objective, config.objective.name, "Objective", ("roles", "loss"), where="objective.name"
    )
    _check_task(config, objective, dataset)
    objective = _weighted(config, objective, dataset, total_steps, trusted)
    _check_lookahead(config, dataset, ema, resident=data.resident)
    outer_optimizer, outer = _two_levels(config, objective, trainable, data)
    if outer is not None:
        _check_outer(config, outer, dataset, mesh, resident=data.resident)
    length = {"total_steps": total_steps, "steps_per_epoch": data.steps_per_epoch}
    return Method(
        objective=objective,
        phases=phases.of(objective, **length),
        optimizer=optimizer,
        outer_optimizer=outer_optimizer,
        schedule=schedule,
        outer=outer,
        ema=ema,
    )


def label_statistics(dataset: Dataset, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the statistics of the training part that a label loss needs, if any.

    These are `label_scale` for real values and `label_counts` for `class_weights="balanced"`.
    Labels are read only for these.
    """
    train = dataset.train
    needed = dataset.task == "regression" or kwargs.get("class_weights") == "balanced"
    if not needed:
        return {}
    found, labelled = example_labels(train), example_array(train, "labelled")
    if dataset.task == "regression":
        return {"label_scale": tuple(labels.label_scale(found, labelled).tolist())}
    k = len(dataset.classes)
    counts = labels.label_counts(found, labelled, k=k).tolist()
    n = len(found) if labelled is None else int((labelled > 0).reshape(len(found), -1).any(1).sum())
    return {"label_counts": (*map(float, counts), float(n))}


def _check_task(config: ConfigDict, objective: Objective, dataset: Dataset) -> None:
    """Refuses methods that read the labels of another task."""
    tasks = getattr(objective, "tasks", Objective.tasks)
    if dataset.task not in tasks:
        raise ConfigError(
            f"{config.objective.name} is for {' and '.join(tasks)}, and the task of the data is "
            f"{dataset.task}",
            where="objective.name",
            hint="docs/tasks.md lists the methods that support it, kd and supervised among them; "
            "your own method declares it in `tasks`",
        )


def check_made(made: Any, name: str, kind: str, has: Sequence[str], *, where: str) -> None:
    """Raises `ConfigError` for an object that is not an objective, weighting or evaluator."""
    with explained(f"{name} returned a {type(made).__name__}, which cannot be read", where=where):
        whole = all(hasattr(made, attribute) for attribute in has)
    if isinstance(made, type) or not whole:
        raise ConfigError(
            f"{name} returned a {type(made).__name__}",
            where=where,
            hint=f"a distill_jax.core.api.{kind}, with {', '.join(has)}",
        )


def _weighted(
    config: ConfigDict,
    objective: Objective,
    dataset: Dataset,
    total: int,
    trusted: Collection[str],
) -> Objective:
    """Returns the objective, with the weighting if the config names one."""
    spec = config.weighting
    if not spec.name:
        return objective
    return WeightedObjective(
        objective=objective,
        weighting=make_weighting(config, total, trusted),
        loss_terms=tuple(spec.loss_terms),
        num_classes=len(dataset.classes),
        task=dataset.task,
        control=spec.control,
        stop_features=spec.stop_features,
    )


def make_weighting(config: ConfigDict, total: int, trusted: Collection[str]) -> Any:
    """Returns the weighting that a config names; `total` is its number of steps."""
    spec = config.weighting
    make = resolve("weighting", spec.name, where="weighting.name", trusted=trusted)
    provided = {"total_steps": total}
    weighting = bind(make, spec.kwargs.to_dict(), where="weighting.kwargs", provided=provided)()
    check_made(
        weighting,
        spec.name,
        "ExampleWeighting",
        ("roles", "needs", "__call__"),
        where="weighting.name",
    )
    return weighting


def _two_levels(
    config: ConfigDict, objective: Objective, trainable: tuple[Role, ...], data: Data
) -> tuple[optax.GradientTransformation | None, Outer | None]:
    """Returns the weighting's optimizer, and when it learns; None where it has none or does not."""
    if not isinstance(objective, WeightedObjective):
        return None, None
    roles = tuple(role for role in weighted_objective.networks(objective) if role in trainable)
    by_gradient = objective.weighting.by_gradient
    if not by_gradient and (not roles or objective.control == "joint"):
        return None, None
    spec = config.bilevel
    if config.accum_steps > 1:
        raise ConfigError(
            "a learned weighting does not work with gradient accumulation",
            where="accum_steps",
            hint="set accum_steps to 1, and bilevel.low_memory=true to save memory",
        )
    with below("bilevel.optim", config.optim.keys()):
        outer_tx, _ = optim.make_optimizer(
            name=spec.optim.name,
            total_steps=data.total_steps,
            lr=spec.optim.lr,
            schedule="constant",
            schedule_kwargs={},
            warmup_steps=0,
            weight_decay=spec.optim.weight_decay if roles else 0.0,
            decay_mask=((r"kernel$", True), (r".", False)),
            clip_norm=None,
            kwargs=spec.optim.kwargs.to_dict(),
        )
    if objective.control == "frozen":
        return outer_tx, None
    warmup = config_lib.duration(config, "bilevel.warmup", default=0, **data.duration)
    if spec.method == "truncated":  # so many steps have to be there
        warmup = max(warmup, spec.horizon - 1)
    with below("bilevel", config.bilevel.keys()):
        options = bilevel.Bilevel(
            method=spec.method,
            outer_update=spec.outer_update,
            unroll=spec.unroll,
            horizon=spec.horizon,
            damping=spec.damping,
            forget=spec.forget,
            every=spec.every,
            warmup=warmup,
            jvp_fraction=spec.jvp_fraction,
            low_memory=spec.low_memory,
            outer_terms=tuple(spec.outer_loss),
        )
    outer = Outer(
        options=options,
        every=spec.every,
        warmup=warmup,
        batch_size=max(1, round(spec.outer_batch * config.batch_size)),
    )
    if by_gradient and (outer.every, outer.warmup) != (1, 0):
        raise ConfigError(
            f"{config.weighting.name} takes its weights from a gradient in every step",
            where="bilevel.every" if outer.every != 1 else "bilevel.warmup",
            hint="set bilevel.every to 1 and no warmup",
        )
    return outer_tx, outer


def _check_outer(config, outer: Outer, dataset: Dataset, mesh: Mesh, *, resident: bool) -> None:
    n = len(dataset.outer_part)
    if outer.batch_size > n:
        raise ConfigError(
            f"a held-out batch of {outer.batch_size} from {n} held-out examples"
            + (" for the weighting" if dataset.outer is not None else ""),
            where="bilevel.outer_batch" if n else "data.held_out",
            hint="the weighting learns from the held-out part, or from the share data.outer of it: "
            "enlarge it, or lower outer_batch",
        )
    partition.check_batch(outer.batch_size, mesh, where="bilevel.outer_batch")
    count, back = outer.options.batches, outer.options.back
    if count > 1 and (not resident or count * config.batch_size > len(dataset.train)):
        raise ConfigError(
            f"{count} steps look {count} batches {'back' if back else 'ahead'}",
            where="bilevel.horizon" if back else "bilevel.unroll",
            hint="data.resident=yes, and no more batches than an epoch has",
        )


def _check_lookahead(config, dataset: Dataset, ema, *, resident: bool) -> None:
    spec = config.lookahead
    if not spec.steps:
        return
    if config.weighting.name:
        raise ConfigError(
            "lookahead does not work with a weighting",
            where="lookahead.steps",
            hint="set lookahead.steps=0, or weighting.name=''",
        )
    if config.watch.nonfinite == "skip":
        raise ConfigError(
            "lookahead moves averages before a step is known to be finite",
            where="watch.nonfinite",
            hint="set watch.nonfinite=stop, or lookahead.steps=0",
        )
    with below("lookahead", spec.keys()):
        lookahead.make_lookahead_step(lambda *_: _, steps=spec.steps, ema=ema)  # its own checks
    if spec.kind == "wide" and (
        not resident or spec.steps * config.batch_size > len(dataset.train)
    ):
        raise ConfigError(
            f"{spec.steps} wide steps look {spec.steps} batches ahead",
            where="lookahead.steps",
            hint="data.resident=yes, and no more batches than an epoch has",
        )


def _moving_average(spec: ConfigDict, total_steps: int) -> tuple[Role, steps.Decay]:
    return spec.ema_of, steps.rising_decay(spec.decay, spec.decay_schedule, total_steps)


def schedule_args(config: ConfigDict, steps_per_epoch: float, total_steps: int) -> dict:
    """Returns the arguments of `optim.make_optimizer` that a config gives."""
    o = config.optim
    warmup = config_lib.duration(
        config,
        "optim.warmup",
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        default=0,
    )
    return {
        "name": o.name,
        "lr": o.lr,
        "schedule": o.schedule,
        "schedule_kwargs": o.schedule_kwargs.to_dict(),
        "warmup_steps": warmup,
        "weight_decay": o.weight_decay,
        "decay_mask": o.decay_mask,
        "clip_norm": o.clip_norm,
        "kwargs": o.kwargs.to_dict(),
        "freeze": {role: tuple(spec.freeze) for role, spec in config.roles.items()},
        "lr_by_layer": o.lr_by_layer,
        "layer_decay": o.layer_decay,
    }
