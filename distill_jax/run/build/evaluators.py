"""The evaluators of a config, and which metrics they measure."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from distill_jax.core.api import (
    Dataset,
    Evaluator,
    Role,
)
from distill_jax.core.errors import ConfigError, nearest
from distill_jax.run.build.experiment import Experiment
from distill_jax.run.build.method import check_made
from distill_jax.run.config import ConfigDict
from distill_jax.run.resolve import bind, resolve


def make_evaluators(
    config: ConfigDict, outputs: Mapping[str, Any], dataset: Dataset, trusted: Collection[str]
) -> dict[str, Evaluator]:
    evaluators = {}
    for name, kwargs in config.evaluators.items():
        make = resolve("evaluators", name, where="evaluators", trusted=trusted)
        at = f"evaluators.{name}"
        evaluator = bind(make, dict(kwargs or {}), where=at)()
        check_made(evaluator, name, "Evaluator", ("outputs", "__call__"), where=at)
        tasks = getattr(evaluator, "tasks", ("classification",))
        if dataset.task not in tasks:
            raise ConfigError(
                f"evaluator {name!r} is for {' and '.join(tasks)}, and the task of the data is "
                f"{dataset.task}",
                where=at,
                hint=f"use {dataset.task} in its place; evaluators.{name}=none leaves it out",
            )
        for role, names in evaluator.outputs.items():
            if role not in outputs:
                by_key = dict(kwargs or {}).get("role") == role
                raise ConfigError(
                    f"evaluator {name!r} reads {role!r}, which the run does not have",
                    where=f"evaluators.{name}" + ".role" * by_key,
                    hint=nearest(role, outputs),
                )
            for output in names:
                if output not in outputs[role]:
                    raise ConfigError(
                        f"evaluator {name!r} reads {output!r}, which {role} does not return",
                        where=f"evaluators.{name}",
                        hint=nearest(output, outputs[role]),
                    )
        if hasattr(evaluator, "measure") and getattr(evaluator, "controls", ()):
            raise ConfigError(
                f"evaluator {name!r} measures with the networks, and its controls replace outputs",
                where=at,
                hint="no controls beside measure",
            )
        for part in getattr(evaluator, "parts", {}):
            if len(getattr(dataset, part)) == 0:
                raise ConfigError(
                    f"evaluator {name!r} needs the {part} part, which is empty",
                    where=f"evaluators.{name}",
                    hint="set data.held_out above 0" if part == "held_out" else "",
                )
        evaluators[name] = evaluator
    return evaluators


def check_metric(experiment: Experiment, metric: str, *, where: str) -> None:
    """Checks that an evaluator will measure `"<split>/<name>"`, by asking each on random outputs.

    Metrics with a control behind their name are of the test split.

    Raises:
      ConfigError: no evaluator does, or the split is empty.
    """
    split, _, name = metric.partition("/")
    if len(getattr(experiment.dataset, split, ())) == 0:
        hint = "set data.held_out above 0" if split == "held_out" else "held_out or test"
        raise ConfigError(f"measures on the {split} split, which is empty", where=where, hint=hint)
    names = [f"{split}/{name}" for own in _measured(experiment, split).values() for name in own]
    if metric not in names:
        raise ConfigError(
            f"no evaluator measures {name!r}", where=where, hint=nearest(metric, names)
        )


def evaluator_of(experiment: Experiment, metric: str) -> str:
    """Returns the name of the evaluator that measures `"<split>/<name>"`, empty if none does."""
    split, _, name = metric.partition("/")
    having = [key for key, own in _measured(experiment, split).items() if name in own]
    return having[-1] if having else ""


def _measured(experiment: Experiment, split: str) -> dict[str, list[str]]:
    """Names of the scalars that each evaluator finds in random outputs of a split."""
    if split in experiment.caches.measured:
        return experiment.caches.measured[split]
    k, random = max(len(experiment.dataset.classes), 2), np.random.default_rng(0)
    rows = np.arange(4 * k)
    example_info = {"label": _labels(experiment.dataset, rows, random), "index": rows}
    names: dict[str, list[str]] = {}
    shapes = {**experiment.outputs, **experiment.measured}
    for key, evaluator in experiment.evaluators.items():
        outputs = {
            role: {name: _random(shapes[role][name], len(rows), random) for name in wanted}
            for role, wanted in (*evaluator.outputs.items(), *_own(experiment, key))
        }
        parts = dict.fromkeys(experiment.parts, (outputs, example_info))
        metrics = ask(evaluator, outputs, example_info, split=split, parts=parts)
        own = [name for name, value in metrics.items() if np.ndim(value) == 0]
        names[key] = [*own]
        for control in getattr(evaluator, "controls", ()) if split == "test" else ():
            if set(evaluator.outputs) & set(experiment.controls.get(control, {})):
                names[key] += [f"{name}_{control}" for name in own]
    experiment.caches.measured[split] = names
    return names


def _own(experiment: Experiment, evaluator: str) -> list[tuple[str, tuple[str, ...]]]:
    """Returns what an evaluator measures, as one more of the outputs that it reads."""
    measured = experiment.measured.get(evaluator)
    return [] if measured is None else [(evaluator, tuple(measured))]


def _random(like: Any, n: int, random: np.random.Generator) -> np.ndarray:
    """Returns random numbers of n examples, zeros where they are whole numbers."""
    shape = (n, *like.shape[1:])
    if not np.issubdtype(like.dtype, np.integer):
        return random.normal(size=shape)
    return np.zeros(shape, like.dtype)


def _labels(dataset: Dataset, rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Returns labels for the task of a data set in which every class, or both values, occur."""
    k = len(dataset.classes)
    if dataset.task == "multilabel":
        return ((rows[:, None] + np.arange(k)) % 2).astype(np.float32)
    if dataset.task == "regression":
        return random.normal(size=(len(rows), k)).astype(np.float32)
    return rows % max(k, 2)


def ask(
    evaluator: Evaluator,
    outputs: Mapping[Role, Mapping[str, np.ndarray]],
    example_info: Mapping[str, np.ndarray],
    *,
    split: str,
    parts: Mapping[str, Any],
) -> Mapping[str, Any]:
    """Calls an evaluator with the arguments that it takes: see `api.Evaluator`."""
    if not hasattr(evaluator, "parts"):
        return evaluator(outputs, example_info)
    call: Any = evaluator
    wanted = {name: parts[name] for name in call.parts}
    return call(outputs, example_info, parts=wanted, split=split)
