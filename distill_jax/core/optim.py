"""Optimizers, learning-rate schedules and weight-decay rules, over the dict `{role: params}`."""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from distill_jax.core import layerwise, ranges
from distill_jax.core.api import Array, Params, PyTree, Role
from distill_jax.core.errors import ArgumentError, nearest

Schedule = Callable[[Any], Array]
"""Step -> learning rate, both scalars; traceable."""

Rules = Sequence[tuple[str, bool]]
"""(regex, decayed) pairs; the first regex that matches in `role/path/to/leaf` applies."""


class _Kind(NamedTuple):
    """Weight decay of an optax optimizer.

    Attributes:
      make: the optax function.
      defaults: keyword arguments that the name of the optimizer implies.
      decay: "coupled" adds `weight_decay * params` to the gradient (L2 regularization) before the
        optimizer; "own" passes it to the optimizer; "none" means that decay is not supported.
      masks: keywords of the optax function that take the decay mask.
    """

    make: Callable[..., optax.GradientTransformation]
    defaults: Mapping[str, Any]
    decay: str
    masks: tuple[str, ...] = ()


OPTIMIZERS: Mapping[str, _Kind] = {
    "sgd": _Kind(optax.sgd, {}, "coupled"),
    "momentum": _Kind(optax.sgd, {"momentum": 0.9}, "coupled"),
    "nesterov": _Kind(optax.sgd, {"momentum": 0.9, "nesterov": True}, "coupled"),
    "adam": _Kind(optax.adam, {}, "none"),
    # Decoupled: Loshchilov, Hutter 2019, arXiv:1711.05101, algorithm 2.
    "adamw": _Kind(optax.adamw, {}, "own", ("mask",)),
    # Biases and norm scales are excluded from the layer-wise rate and from the decay, as is common
    # for large batches (You et al. 2017, arXiv:1708.03888, exclude neither).
    "lars": _Kind(optax.lars, {}, "own", ("weight_decay_mask", "trust_ratio_mask")),
    "lamb": _Kind(optax.lamb, {}, "own", ("mask",)),
}

_RANGES = {
    "momentum": "[0, 1)",
    "b1": "[0, 1)",
    "b2": "[0, 1)",
    "eps": "(0, inf)",  # 0 gives 0 / 0 if the gradient was always 0
    "eps_root": "[0, inf)",
    "trust_coefficient": "(0, inf)",
    "final": "[0, inf)",
    "factor": "(0, inf)",
    "timescale": "(0, inf)",
}
_SWITCHES = ("nesterov",)
_DTYPES = ("accumulator_dtype", "mu_dtype")

_MANAGED = ("learning_rate", "weight_decay", "mask", "weight_decay_mask", "trust_ratio_mask")


def make_optimizer(
    *,
    name: str,
    total_steps: int,
    lr: float,
    schedule: str,
    schedule_kwargs: Mapping[str, Any],
    warmup_steps: int,
    weight_decay: float,
    decay_mask: Rules,
    clip_norm: float | None,
    kwargs: Mapping[str, Any],
    freeze: Mapping[Role, Sequence[str]] | None = None,
    lr_by_layer: layerwise.Rates = (),
    layer_decay: float = 1.0,
) -> tuple[optax.GradientTransformation, Schedule]:
    """Builds the optimizer: clipping, then weight decay, then the update rule.

    Args:
      name: a key of `OPTIMIZERS`.
      total_steps: length of training.
      lr: peak learning rate.
      schedule: a key of `SCHEDULES`.
      schedule_kwargs: keyword arguments of the schedule.
      warmup_steps: steps of the linear rise from zero to `lr`; below `total_steps`.
      weight_decay: L2 factor, added to the gradient before momentum, for sgd, momentum and
        nesterov; the decay of the respective paper for adamw, lars and lamb; must be 0 for adam.
      decay_mask: which leaves decay; ignored if it has no effect.
      clip_norm: largest norm of the whole gradient, None for no limit.
      kwargs: further arguments of the optax function of that name.
      freeze: see `layerwise.by_layer`.
      lr_by_layer: see `layerwise.by_layer`.
      layer_decay: see `layerwise.by_layer`.

    Returns:
      The transformation and its schedule. Rules that do not match the parameters raise
      `ArgumentError` in `init`, also under `jax.eval_shape`.

    Raises:
      ArgumentError: a name or keyword is unknown, or arguments exclude each other.
    """
    if name not in OPTIMIZERS:
        hint = nearest(name, OPTIMIZERS)
        raise ArgumentError(f"unknown optimizer {name!r}", where="name", hint=hint)
    kind = OPTIMIZERS[name]
    kwargs = dict(kwargs)
    _check_keywords(kind.make, kwargs, label=name, where="kwargs", managed=_MANAGED)
    if weight_decay and kind.decay == "none":
        raise ArgumentError(
            f"{name} takes no weight decay",
            where="weight_decay",
            hint="did you mean name='adamw'? or set weight_decay=0",
        )
    rate = make_schedule(
        schedule, lr=lr, total_steps=total_steps, warmup_steps=warmup_steps, kwargs=schedule_kwargs
    )
    mask = lambda params: decayed(params, decay_mask)  # noqa: E731
    chain = []
    if clip_norm is not None:
        chain.append(optax.clip_by_global_norm(clip_norm))
    if kind.decay == "coupled" and weight_decay:
        chain.append(optax.add_decayed_weights(weight_decay, mask))
    own = {}
    if kind.decay == "own":
        # A mask of a decay of zero would still be checked against the parameters.
        used = [m for m in kind.masks if weight_decay or m == "trust_ratio_mask"]
        own = {"weight_decay": weight_decay, **dict.fromkeys(used, mask)}
    chain.append(kind.make(rate, **{**kind.defaults, **own, **kwargs}))
    made = optax.chain(*chain)
    if any((freeze or {}).values()) or lr_by_layer or layer_decay != 1:
        made = layerwise.by_layer(
            made, freeze=freeze, lr_by_layer=lr_by_layer, layer_decay=layer_decay
        )
    return made, rate


# Schedules: the factor of the learning rate at step `t`; it stays at 1 until `begin`, the end of
# the warmup, and reaches its last value at `end`, the length of training.


def _progress(t: Array, begin: int, end: int) -> Array:
    return jnp.clip((t - begin) / (end - begin), 0.0, 1.0)


def _constant(t: Array, begin: int, end: int) -> Array:
    del begin, end
    return jnp.ones_like(t)


def _cosine(t: Array, begin: int, end: int, *, final: float = 0.0) -> Array:
    """Half a cosine from 1 to `final` (Loshchilov, Hutter 2017, arXiv:1608.03983, eq. 5)."""
    return final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * _progress(t, begin, end)))


def _linear(t: Array, begin: int, end: int, *, final: float = 0.0) -> Array:
    return 1 + (final - 1) * _progress(t, begin, end)


def _step(
    t: Array, begin: int, end: int, *, milestones: Sequence[float], factor: float = 0.1
) -> Array:
    """Multiplies by `factor` at each milestone: a step, or below 1 a fraction of training."""
    del begin
    steps = []
    for milestone in milestones:
        if not isinstance(milestone, (int, float)) or math.isnan(milestone):
            raise ArgumentError(
                f"milestone {milestone!r} is not a number",
                where="schedule_kwargs.milestones",
                hint="steps, or fractions between 0 and 1",
            )
        step = round(milestone * end) if 0 < milestone < 1 else int(milestone)
        if not 0 < step < end:
            raise ArgumentError(
                f"milestone {milestone} is not within training",
                where="schedule_kwargs.milestones",
                hint=f"steps from 1 to {end - 1}, or fractions between 0 and 1",
            )
        steps.append(step)
    passed = sum((t >= step).astype(t.dtype) for step in steps)
    return jnp.asarray(factor, t.dtype) ** passed


def _rsqrt(t: Array, begin: int, end: int, *, timescale: float = 10_000.0) -> Array:
    """Inverse square root of the steps since the warmup, in units of `timescale`."""
    del end
    return jax.lax.rsqrt(1 + jnp.maximum(t - begin, 0.0) / timescale)


SCHEDULES: Mapping[str, Callable[..., Array]] = {
    "constant": _constant,
    "cosine": _cosine,
    "linear": _linear,
    "step": _step,
    "rsqrt": _rsqrt,
}


def make_schedule(
    name: str,
    *,
    lr: float,
    total_steps: int,
    warmup_steps: int = 0,
    kwargs: Mapping[str, Any] | None = None,
) -> Schedule:
    """Builds the learning rate over training: linear warmup times the named decay.

    Args:
      name: a key of `SCHEDULES`.
      lr: the peak.
      total_steps: length of training.
      warmup_steps: the rate is `lr * step / warmup_steps` before this step.
      kwargs: `final` of cosine and linear, `milestones` and `factor` of step, `timescale` of rsqrt.

    Raises:
      ArgumentError: a name or keyword is unknown, or the warmup is as long as training.
    """
    if name not in SCHEDULES:
        hint = nearest(name, SCHEDULES)
        raise ArgumentError(f"unknown schedule {name!r}", where="schedule", hint=hint)
    if not 0 <= warmup_steps < total_steps:
        raise ArgumentError(
            f"a warmup of {warmup_steps} steps in {total_steps} steps of training",
            where="warmup_steps",
            hint="warm up for a part of training",
        )
    decay, kwargs = SCHEDULES[name], dict(kwargs or {})
    where = "schedule_kwargs"
    _check_keywords(decay, kwargs, label=name, where=where, managed=("t", "begin", "end"))

    def schedule(step: Any) -> Array:
        t = jnp.asarray(step, jnp.float32)
        rate = lr * decay(t, warmup_steps, total_steps, **kwargs)
        return rate * jnp.minimum(t / warmup_steps, 1.0) if warmup_steps else rate

    jax.eval_shape(schedule, 0)  # rejects bad arguments here, not in the step
    return schedule


def _check_keywords(
    fn: Callable[..., Any],
    kwargs: Mapping[str, Any],
    *,
    label: str,
    where: str,
    managed: Iterable[str],
) -> None:
    parameters = inspect.signature(fn).parameters
    accepted = {key: p for key, p in parameters.items() if key not in managed}
    for key in kwargs:
        if key not in accepted:
            hint = nearest(key, accepted)
            raise ArgumentError(
                f"{label} does not accept {key!r}", where=f"{where}.{key}", hint=hint
            )
    for key, parameter in accepted.items():
        if parameter.default is inspect.Parameter.empty and key not in kwargs:
            raise ArgumentError(f"{label} needs {key!r}", where=where, hint=f"set {where}.{key}")
    for key, value in kwargs.items():
        default = accepted[key].default
        if key in _SWITCHES:
            if not isinstance(value, bool):
                raise ArgumentError(f"{value!r} is no switch", where=f"{where}.{key}", hint="true")
        elif key in _DTYPES:
            _check_dtype(value, where=f"{where}.{key}")
        elif key in _RANGES and not (value is None and default is None):
            interval = _RANGES[key]
            if default == 0:  # a published value of 0 is in the range
                interval = interval.replace("(0,", "[0,")
            if value is None or isinstance(value, (tuple, list)):
                raise ArgumentError(f"{key} is {value}", where=f"{where}.{key}", hint="one number")
            ranges.within(interval, where=where, **{key: value})


def _check_dtype(value: Any, *, where: str) -> None:
    try:
        fits = value is None or jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        fits = False
    if not fits:
        hint = "float32, bfloat16, or none for the type of the parameters"
        raise ArgumentError(
            f"{value!r} is no type of floating-point numbers", where=where, hint=hint
        )


def decayed(params: Mapping[str, Params], rules: Rules) -> PyTree:
    """Returns, for each leaf of `{role: params}`, whether it decays.

    Args:
      params: parameters by role; shapes suffice.
      rules: (regex, decayed); the first match decides, and every leaf needs one.

    Raises:
      ArgumentError: no rule matches a leaf, or a rule matches no leaf.
    """
    where = "decay_mask"
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    patterns = [pattern for pattern, _ in rules]
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            raise ArgumentError(
                f"the rule {pattern!r} matches no parameter",
                where=where,
                hint=nearest(pattern, paths[:20]),
            )
    decisions = [next((d for p, d in rules if re.search(p, path)), None) for path in paths]
    uncovered = [path for path, decision in zip(paths, decisions, strict=True) if decision is None]
    if uncovered:
        listed = ", ".join(uncovered[:5]) + (", ..." if len(uncovered) > 5 else "")
        raise ArgumentError(
            f"no rule matches {listed} ({len(uncovered)} of {len(paths)} parameters)",
            where=where,
            hint=f"{nearest(uncovered[0], patterns)}; a last rule ('.', False) matches the rest",
        )
    return jax.tree.unflatten(jax.tree.structure(params), decisions)
