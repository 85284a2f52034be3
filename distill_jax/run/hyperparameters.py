"""Hyperparameters that do not fit the run: its length, its data and the memory of its host.

What a single value may be is checked where the value lives (`core/ranges.py`). Here is what depends
on other parts of the config. Everything is computed from shapes.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from distill_jax.core.weighing import Weighed
from distill_jax.run.findings import Finding

if TYPE_CHECKING:
    from distill_jax.run.build import Experiment


def findings(experiment: "Experiment") -> Iterator[Finding]:
    """Yields what does not fit the run."""
    yield from of_schedules(experiment)
    yield from of_queues(experiment)


def _parts(experiment: "Experiment") -> dict[str, Any]:
    """Returns the method and the weigher by their group in the config."""
    objective = experiment.objective
    if isinstance(objective, Weighed):
        return {"objective": objective.objective, "weigher": objective.weigher}
    return {"objective": objective}


def of_schedules(experiment: "Experiment") -> Iterator[Finding]:
    """Schedules of a method that end after the run, as `api.Objective.schedules` declares them."""
    total = experiment.total_steps
    for group, part in _parts(experiment).items():
        for name, kind in getattr(part, "schedules", {}).items():
            value = getattr(part, name)
            in_epochs = name.endswith("_epochs")
            steps = value * experiment.steps_per_epoch if in_epochs else value
            least = total / experiment.steps_per_epoch if in_epochs else total
            if kind == "hold" and steps >= total:
                what = f"it lasts {steps:.0f} of {total} steps, so what it delays would never begin"
                hint = f"less than {least:.4g}, or longer training"
            elif kind == "ramp" and steps > total:
                what = (
                    f"it ends after {steps:.0f} steps, and training after {total}: its last value "
                    "would never be reached"
                )
                hint = f"at most {least:.4g}, or longer training"
            else:
                continue
            yield Finding("mistake", what, f"{group}.kwargs.{name}", hint)


def of_queues(experiment: "Experiment") -> Iterator[Finding]:
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
            "doubt",
            f"it remembers {epochs:.3g} epochs of {n} examples: {share:.0%} of the examples would "
            f"have an earlier key of their own among the negatives; at most {each * n // 2} keys, "
            "half an epoch, leave 12%",
            f"objective.kwargs.{name}",
        )
