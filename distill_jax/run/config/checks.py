"""What can be known to be wrong with a config before data and arrays exist."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distill_jax.core.errors import ConfigError, nearest
from distill_jax.evaluators._directions import direction
from distill_jax.run import loggers
from distill_jax.run.config import durations
from distill_jax.run.config.schema import (
    CHOICES,
    DURATIONS,
    OPEN,
    SPLITS,
    TRANSFORMS,
    ConfigDict,
    template,
)
from distill_jax.run.config.tree import is_a, lookup, mistyped, unknown


def check_run(config: ConfigDict) -> None:
    """Checks a config as that of one run; see `validate`."""
    check_values(config)
    check_structure(config, template(config))
    _check_numbers(config)
    for path, options in CHOICES.items():
        value = lookup(config, path)
        if value not in options:
            raise ConfigError(f"unknown value {value!r}", where=path, hint=nearest(value, options))
    for path in DURATIONS:
        durations.read(config, path)
    if config.total is None:
        hint = 'set total, such as total="20 epochs" or a number of steps'
        raise ConfigError("no length of training is set", where="total", hint=hint)
    for group in ("objective", "data"):
        if not config[group].name:
            hint = f"name a module of distill_jax.{group.removesuffix('s')}"
            hint += "s" if group == "objective" else ""
            raise ConfigError("no name is set", where=f"{group}.name", hint=hint)
    _check_roles(config)
    _check_data(config)
    _check_cache(config)
    _check_rules(config.optim.decay_mask, where="optim.decay_mask")
    _check_selection(config)
    loggers.check_names(tuple(config.log.to), where="log.to")


def _check_selection(config: ConfigDict) -> None:
    trains_on = config.data.corrupt.get("train_on_held_out", 0)
    nothing_held_out = config.data.held_out == 0 or trains_on == 1
    if config.eval.metric == "" and nothing_held_out:
        pass  # nothing to select on: the last state is the result
    elif check_metric(config, "eval.metric") == "test":
        raise ConfigError(
            "the test split is read only to report, never to select",
            where="eval.metric",
            hint="use held_out/" + config.eval.metric.partition("/")[2],
        )
    if config.eval.mode != (best := direction(config.eval.metric) or config.eval.mode):
        raise ConfigError(
            f"{config.eval.mode} would select the worst by {config.eval.metric}",
            where="eval.mode",
            hint=f'"{best}" is the better direction',
        )
    check_metric(config, "study.metric")


def check_values(value: Any, path: str = "", above: tuple[int, ...] = ()) -> None:
    """Refuses values that cannot be stored: functions, arrays, cyclic configs, unnamed keys.

    Numbers in open groups are finite; those elsewhere have ranges of their own.
    """
    if id(value) in above:
        raise ConfigError("a group holds itself", where=path, hint="store a copy of it")
    if isinstance(value, (Mapping, ConfigDict)):
        for key, item in value.items():
            if not isinstance(key, str):
                hint = "write it as a string, or use a tuple of pairs"
                raise ConfigError(f"the key {key!r} is not a string", where=path, hint=hint)
            check_values(item, f"{path}.{key}".lstrip("."), (*above, id(value)))
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_values(item, path, (*above, id(value)))
    elif isinstance(value, float):
        if not math.isfinite(value) and OPEN.fullmatch(path.rpartition(".")[0]):
            raise ConfigError(f"{value} is not finite", where=path, hint="a finite number")
    elif value is not None and not isinstance(value, (bool, int, str)):
        raise ConfigError(
            f"a config cannot hold a {type(value).__name__}",
            where=path,
            hint="numbers, strings, booleans, tuples, dicts; code is named 'package.module:Symbol'",
        )


def check_structure(config: ConfigDict, template: ConfigDict, prefix: str = "") -> None:
    for key in config:
        if key not in template:
            raise unknown(prefix.rstrip("."), key, template)
    for key, default in template.items():
        path = f"{prefix}{key}"
        if key not in config:
            raise ConfigError("missing key", where=path, hint="start from config.base() or role()")
        value = config[key]
        if isinstance(default, ConfigDict):
            if not isinstance(value, ConfigDict):
                raise mistyped(value, ConfigDict, path)
            if path == "roles" or not OPEN.fullmatch(path):
                check_structure(value, default, f"{path}.")
            continue
        if path in DURATIONS:
            continue
        kind = template.get_type(key)
        if value is None and default is None:
            continue
        if not (is_a(value, kind) or (kind is float and type(value) is int)):
            raise mistyped(value, kind, path)


def _check_numbers(config: ConfigDict) -> None:
    def check(path: str, rule: bool, hint: str) -> None:
        if not rule:
            raise ConfigError(f"{lookup(config, path)} is out of range", where=path, hint=hint)

    for path in ("batch_size", "accum_steps", "eval.batch_size", "log.every_steps", "optim.lr"):
        check(path, 0 < lookup(config, path) < math.inf, "a positive number")
    for path in ("batch_size", "eval.batch_size"):
        check(path, lookup(config, path) < 2**31, "below 2**31: rows are counted in 32 bits")
    check("checkpoint.keep", config.checkpoint.keep >= 1, "at least 1")
    check("lookahead.steps", config.lookahead.steps >= 0, "0 for off, or more")
    check("bilevel.every", config.bilevel.every >= 1, "at least 1")
    check("bilevel.outer_batch", 0 < config.bilevel.outer_batch < math.inf, "a positive share")
    for path in ("bilevel.optim.lr", "bilevel.optim.weight_decay"):
        check(path, 0 <= lookup(config, path) < math.inf, "0 or more")
    check("log.images", 0 <= config.log.images <= 256, "0 for none, to 256")
    if config.log.images and not config.log.tensorboard:
        hint = "log.tensorboard=true, or log.images=0"
        raise ConfigError("TensorBoard shows them, and is off", where="log.images", hint=hint)
    for path in ("watch.stall_seconds", "watch.spike"):
        check(path, 0 <= lookup(config, path) < math.inf, "0 for off, or more")
    check("seed", 0 <= config.seed < 2**32, "from 0 to 2**32 - 1")
    check("data.held_out", 0 <= config.data.held_out < 1, "a fraction from 0 to below 1")
    share = config.data.outer
    check("data.outer", share is None or 0 <= share < 1, "a share from 0 to below 1, or none")
    check("optim.weight_decay", 0 <= config.optim.weight_decay < math.inf, "0 or more")
    clip = config.optim.clip_norm
    check("optim.clip_norm", clip is None or 0 < clip < math.inf, "positive, or none for no limit")
    axes = ("data", "fsdp", "model")
    for axis in axes:
        size = config.mesh[axis]
        check(f"mesh.{axis}", size >= 1 or size == -1, "at least 1, or -1 for the remainder")
    if sum(config.mesh[axis] == -1 for axis in axes) > 1:
        raise ConfigError("only one axis can take the remainder", where="mesh", hint="set one")
    check("data.at_most", config.data.at_most >= 0, "0 for all, or more")
    check("data.views", config.data.views >= 0, "0 for a new view every epoch, or more")
    check("mesh.cpu_devices", config.mesh.cpu_devices >= 0, "0 for automatic, or more")
    check("partition.min_size", config.partition.min_size >= 0, "0 or more")
    if config.batch_size % config.accum_steps:
        raise ConfigError(
            f"{config.batch_size} examples do not divide into {config.accum_steps} micro-batches",
            where="accum_steps",
            hint="a divisor of batch_size",
        )


def _check_roles(config: ConfigDict) -> None:
    trainable = [n for n, r in config.roles.items() if not r.frozen and r.ema_of is None]
    for name, group in config.roles.items():
        where = f"roles.{name}"
        _check_frozen_parts(group, where)
        _check_classes(group, f"{where}.classes")
        if group.ema_of is not None:
            if group.frozen:
                raise ConfigError(
                    "a frozen role cannot be a moving average",
                    where=f"{where}.frozen",
                    hint=f"drop frozen, or drop {where}.ema_of",
                )
            if group.ema_of not in trainable:
                raise ConfigError(
                    f"{group.ema_of!r} is not a trainable role",
                    where=f"{where}.ema_of",
                    hint=nearest(group.ema_of, trainable),
                )
            if not 0 <= group.decay <= 1:
                raise ConfigError(
                    f"{group.decay} is out of range", where=f"{where}.decay", hint="from 0 to 1"
                )
            if group.decay_schedule not in ("constant", "cosine", "linear"):
                raise ConfigError(
                    f"unknown value {group.decay_schedule!r}",
                    where=f"{where}.decay_schedule",
                    hint=nearest(group.decay_schedule, ("constant", "cosine", "linear")),
                )
        elif not group.model and not group.init:
            raise ConfigError(
                "no model is named",
                where=f"{where}.model",
                hint="name a module of distill_jax.models, or set init or ema_of",
            )
    if not trainable:
        hint = "add role(model, ...) that is neither frozen nor a moving average"
        raise ConfigError("no role is trainable", where="roles", hint=hint)


def _check_frozen_parts(group: ConfigDict, where: str) -> None:
    if not group.freeze:
        return
    for pattern in group.freeze:
        if not isinstance(pattern, str):
            raise mistyped(pattern, str, f"{where}.freeze")
    if group.frozen or group.ema_of is not None:
        what = "a frozen role" if group.frozen else "a moving average"
        raise ConfigError(
            f"{what} learns nothing, so no part of it can be kept from it",
            where=f"{where}.freeze",
            hint="leave it out",
        )


def _check_classes(group: ConfigDict, where: str) -> None:
    if not group.classes:
        return
    if not group.frozen:
        raise ConfigError(
            "is for a frozen network that was trained on other classes",
            where=where,
            hint="leave it out: a network that learns has the classes of the data",
        )
    if [type(one) for one in group.classes] != [str]:  # else a file, see class_map
        check_class_groups(group.classes, where)


def check_class_groups(groups: Sequence[Any], where: str) -> None:
    """Refuses what is no list of classes and of groups of them, each class once."""
    members = []
    for one in groups:
        found = (one,) if type(one) is int else one
        if not isinstance(found, (tuple, list)) or not found:
            raise ConfigError(f"{one!r} is no class", where=where, hint="(3, (5, 7), 0)")
        if not all(type(index) is int and index >= 0 for index in found):
            raise ConfigError(f"{one!r} is no class", where=where, hint="indices from 0")
        members += found
    if twice := {index for index in members if members.count(index) > 1}:
        raise ConfigError(f"class {min(twice)} is named twice", where=where, hint="each once")


def _check_data(config: ConfigDict) -> None:
    used = [name for key in TRANSFORMS for name in config.data[key]]
    for path in (f"data.{key}" for key in TRANSFORMS):
        for transform in lookup(config, path):
            if not isinstance(transform, str):
                raise mistyped(transform, str, path)
    if config.data.teacher_transforms and config.data.teacher_view == "independent":
        raise ConfigError(
            "an independent view has the transforms of training",
            where="data.teacher_transforms",
            hint="leave out data.teacher_view, or these",
        )
    for group in ("objective", "weighting"):
        for name in ("total_steps", "steps_per_epoch", "num_examples"):
            if name in config[group].kwargs:
                raise ConfigError(
                    "is set by the run and would be overridden",
                    where=f"{group}.kwargs.{name}",
                    hint="leave it out",
                )
    if "held_out" in config.data.kwargs:
        raise ConfigError(
            "would override data.held_out",
            where="data.kwargs.held_out",
            hint="set data.held_out, and leave this out",
        )
    for transform in config.data.transform_kwargs:
        if transform not in used:
            raise ConfigError(
                f"arguments for {transform!r}, which is not among the transforms",
                where=f"data.transform_kwargs.{transform}",
                hint=nearest(transform, used),
            )


def _check_cache(config: ConfigDict) -> None:
    cache = config.cache
    if not cache.dir:
        if cache.teacher:
            raise ConfigError(
                "outputs of a function are stored before training",
                where="cache.dir",
                hint="name the folder of its outputs",
            )
        return
    for path in ("cache.roles", "cache.outputs"):
        if not lookup(config, path) or not all(isinstance(x, str) for x in lookup(config, path)):
            raise ConfigError("needs names", where=path, hint="('teacher',) or ('logits',)")
    if cache.teacher and len(cache.roles) != 1:
        raise ConfigError("one function replaces one role", where="cache.roles")
    if cache.teacher and cache.roles[0] in config.roles:
        raise ConfigError(
            f"{cache.teacher} replaces it, so it has no network",
            where=f"roles.{cache.roles[0]}",
            hint="delete the role, or cache.teacher",
        )


def _check_rules(rules: Iterable[Any], *, where: str) -> None:
    for rule in rules:
        match rule:
            case (str(pattern), bool()):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ConfigError(f"{pattern!r} is not a regex: {error}", where=where) from None
            case _:
                hint = '("kernel$", True)'
                raise ConfigError(f"{rule!r} is not a rule", where=where, hint=f"example: {hint}")


def check_metric(config: ConfigDict, path: str) -> str:
    metric = lookup(config, path)
    split, slash, name = metric.partition("/")
    if not (slash and name):
        hint = f"split/metric, such as held_out/{metric or 'accuracy'}"
        raise ConfigError(f"{metric!r} names no split or no metric", where=path, hint=hint)
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}", where=path, hint=nearest(split, SPLITS))
    if split == "train":
        raise ConfigError(
            "evaluators do not measure the train split", where=path, hint=f"use held_out/{name}"
        )
    return split
