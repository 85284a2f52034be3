"""Configs that earlier versions stored, in the spelling of this one.

`convert` is applied to stored configs in run folders, never to user input: there an old spelling is
refused, and the message names the new one. `CONVERSIONS` lists what changed, oldest first; each
entry leaves a config of this version as it is. To rename a key, add a line to `RENAMED`.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from distill_jax.core import durations
from distill_jax.core.errors import ConfigError

RENAMED = {
    "weigher": "weighting",
    "roles.weigher": "roles.weighting",
    "weighting.signals": "weighting.loss_terms",
    "bilevel.part": "bilevel.jvp_fraction",
    "bilevel.order": "bilevel.outer_update",
    "study.lanes": "study.replicas",
    "objective.kwargs.kd_weight": "objective.kwargs.distillation_weight",
}
"""Old path of a key or group -> its new path, in this order, in configs and in arms of studies."""

RENAMED_VALUES: dict[str, Mapping[Any, Any]] = {
    "bilevel.outer_update": {"real": "after_step", "virtual": "lookahead"},
    "weighting.kwargs.normalize": {"signals": "loss_terms"},
}
"""New path of a key -> {old value: new value}."""

DURATIONS = ("total", "optim.warmup", "bilevel.warmup", "eval.every", "checkpoint.every")
"""Keys that held a group of units, one of which was set."""

METHODS = {
    "warmup_epochs": "warmup",
    "ramp_epochs": "ramp",
    "temperature_epochs": "temperature_warmup",
    "frozen_epochs": "freeze_prototypes",
    "heads_epochs": "heads_only",
}
"""Arguments of methods of this package that held a number of epochs -> durations."""


def convert(stored: Mapping[str, Any], *, where: str = "config.json") -> dict[str, Any]:
    """Returns a stored config in the spelling of this version; one of this version stays as it is.

    Args:
      stored: what `to_json` of this or an earlier version wrote.
      where: the file to name in errors.

    Raises:
      ConfigError: it holds two lengths for one duration.
    """
    config = copy.deepcopy(dict(stored))
    study = config.get("study")
    own_arms = study.get("arms") if isinstance(study, dict) else None
    arms = list(own_arms.values()) if isinstance(own_arms, dict) else []
    for one in (config, *(arm for arm in arms if isinstance(arm, dict))):
        for _, change in CONVERSIONS:
            try:
                change(one, config)
            except ValueError as error:
                raise ConfigError(str(error), where=where) from None
    return config


def one_duration(units: Mapping[str, Any]) -> str | None:
    """Returns a group of units as one value, None where no unit is set.

    Raises:
      ValueError: two units are set, or a unit holds no number.
    """
    given = {}
    for unit, value in units.items():
        if value is not None and str(value).lower() != "none":
            given[unit] = durations.parse(f"{value} {unit}", unit)
    if len(given) > 1:
        raise ValueError(f"ambiguous duration: {' and '.join(f'{u}={units[u]}' for u in given)}")
    return next((durations.spell(*one) for one in given.values()), None)


def renamed(path: str) -> str:
    """Returns the new path of a key or of a path below a group; unchanged if it was not renamed."""
    for old, new in RENAMED.items():
        if f"{path}.".startswith(f"{old}."):
            path = new + path[len(old) :]
    return path


def _one_value(config: dict[str, Any], full_config: Mapping[str, Any]) -> None:
    del full_config
    for path in DURATIONS:
        for group, key in _at(config, path):
            units = group[key]
            if isinstance(units, dict) and units.keys() <= set(durations.UNITS):
                group[key] = one_duration(units)


def _epochs_of_methods(config: dict[str, Any], full_config: Mapping[str, Any]) -> None:
    """Durations of methods were numbers of epochs; methods of others keep their arguments."""
    named: Any = next((group[key] for group, key in _at(config, "objective.name")), None)
    named = named or next(
        (group[key] for group, key in _at(dict(full_config), "objective.name")), ""
    )
    if ":" in str(named):
        return
    for group, key in _at(config, "objective.kwargs"):
        kwargs = group[key]
        for old in METHODS.keys() & kwargs.keys() if isinstance(kwargs, dict) else ():
            kwargs[METHODS[old]] = one_duration({"epochs": kwargs.pop(old)})


def _renamed(config: dict[str, Any], full_config: Mapping[str, Any]) -> None:
    del full_config
    for old, new in RENAMED.items():
        for group, key in list(_at(config, old)):
            value = group.pop(key)
            *parents, last = new.split(".")
            node = config
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
    for path, values in RENAMED_VALUES.items():
        for group, key in _at(config, path):
            if isinstance(group[key], str):
                group[key] = values.get(group[key], group[key])


def _one_held_out_part(config: dict[str, Any], whole: Mapping[str, Any]) -> None:
    """One held-out part had both uses: training the weighting and selecting checkpoints."""
    data = config.get("data")
    if config is whole and isinstance(data, dict):
        data.setdefault("outer", 0.0)


def _at(config: dict[str, Any], path: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields the group and the key that a path names, if the config has them."""
    *parents, key = path.split(".")
    node: Any = config
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if isinstance(node, dict) and key in node:
        yield node, key


CONVERSIONS: tuple[tuple[str, Callable[[dict[str, Any], Mapping[str, Any]], None]], ...] = (
    ("0.1: a duration was a group of units", _one_value),
    ("0.1: durations of methods were numbers of epochs", _epochs_of_methods),
    ("0.1: keys had other names", _renamed),
    ("0.1: the held-out part had no outer part", _one_held_out_part),
)
