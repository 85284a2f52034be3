"""Arguments of a method and its weighting that nothing reads."""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.run import config as config_lib
from distill_jax.run.build import Experiment
from distill_jax.run.preflight.finding import Finding


def findings(experiment: Experiment, read: Mapping[str, set[str]]) -> Iterator[Finding]:
    """Yields arguments that are set and were not read.

    Args:
      experiment: what will be run.
      read: the fields that a trace read, by group of the config.
    """
    config, objective = experiment.config, experiment.objective
    things: dict[str, Any] = {"objective": objective}
    if isinstance(objective, WeightedObjective):
        things = {"objective": objective.objective}
        if not objective.weighting.by_gradient:
            things["weighting"] = objective.weighting
    for group, thing in things.items():
        fields, used = defaults(thing), read[group]
        if getattr(thing, "needs_dataset_pass", False):
            used = used | named_in(type(thing))
        for name, value in config[group].kwargs.items():
            if name in fields and name not in used and value != fields[name]:
                what = f"{type(thing).__name__} does not read it with these other arguments"
                yield Finding("unused", what, f"{group}.kwargs.{name}", "leave it out")
    if (
        isinstance(objective, WeightedObjective)
        and experiment.outer is None
        and objective.control == "none"
    ):
        template = config_lib.flatten(config_lib.base().bilevel)
        for name, value in config_lib.flatten(config.bilevel).items():
            if value != template.get(name):
                what, hint = f"{config.weighting.name} does not learn", "leave it at its default"
                yield Finding("unused", what, f"bilevel.{name}", hint)


def defaults(thing: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass with their defaults; empty for any other object."""
    if not dataclasses.is_dataclass(thing):
        return {}
    return {field.name: field.default for field in dataclasses.fields(thing)}


def noting(thing: Any, read: set[str]) -> Any:
    """Returns a copy of an object that notes each attribute that is read of it."""
    cls = type(thing)

    def __getattribute__(self: Any, name: str) -> Any:
        read.add(name)
        return object.__getattribute__(self, name)

    copy = object.__new__(type(cls.__name__, (cls,), {"__getattribute__": __getattribute__}))
    copy.__dict__.update(vars(thing))
    for name in ("roles", "auxiliary", "couples_batch", "needs_dataset_pass"):  # of the framework
        getattr(copy, name, None)
    return copy


def named_in(cls: type) -> set[str]:
    """Returns every name in the code of a class, parts of which run only on the host."""
    functions = (x for base in cls.__mro__ for x in vars(base).values() if inspect.isfunction(x))
    names, left = set(), [function.__code__ for function in functions]
    while left:
        code = left.pop()
        names |= set(code.co_names) if code.co_name != "__post_init__" else set()
        left += [c for c in code.co_consts if inspect.iscode(c)]
    return names
