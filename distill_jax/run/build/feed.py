"""Batches of one run as arguments of a step."""

from typing import Any

import jax

from distill_jax.core import (
    partition,
)
from distill_jax.core.api import (
    PyTree,
)
from distill_jax.data import loader
from distill_jax.run.build.data import batch_shapes
from distill_jax.run.build.experiment import Experiment
from distill_jax.trainer.io.teacher_cache import TeacherOutputs


def feed_shapes(experiment: Experiment, variant: str = "inner") -> PyTree:
    """Returns what a `Feed` gives a step, as shapes with shardings."""

    def one(source, b):
        if experiment.resident:
            sharding = partition.replicated(experiment.mesh)
            return loader.resident_shapes(source, sharding=sharding)
        example = batch_shapes(source, b)
        sharding = partition.over_batch(experiment.mesh)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), example
        )

    train = one(experiment.dataset.train, experiment.config.batch_size)
    if experiment.cache is not None:
        train = _with_answers(experiment, train)
    if variant == "inner":
        return train
    assert experiment.outer is not None
    return {
        "train": train,
        "held_out": one(experiment.dataset.held_out, experiment.outer.batch_size),
    }


def _with_answers(experiment: Experiment, train: Any) -> PyTree:
    cache, mesh = experiment.cache, experiment.mesh
    assert cache is not None
    if not experiment.resident:
        shapes = cache.shapes(experiment.config.batch_size, partition.over_batch(mesh))
        return {**train, "teacher_outputs": shapes}
    table = cache.shapes(len(experiment.dataset.train), partition.replicated(mesh))
    data, window = train
    tables = {name: table for name in ("now", "next")[: cache.views]}
    return data, {**window, "teacher_outputs": tables}


class Feed:
    """Batches of one run as arguments of a step: resident arrays with a window, or streams.

    Args:
      experiment: what is run.
      seed: of the order of the examples.
      start: the first step.
      teacher_outputs: what the batches carry of stored answers, from `stored_answers`.
    """

    def __init__(
        self,
        experiment: Experiment,
        *,
        seed: int,
        start: int,
        teacher_outputs: TeacherOutputs | None = None,
    ):
        self._outer, self._resident = experiment.outer, experiment.resident
        mesh, dataset = experiment.mesh, experiment.dataset

        def make(source, batch_size, start, teacher_outputs=None):
            if self._resident:
                return loader.ResidentLoader(
                    source,
                    batch_size=batch_size,
                    seed=seed,
                    sharding=partition.replicated(mesh),
                    teacher_outputs=teacher_outputs,
                )
            return loader.StreamLoader(
                source,
                batch_size=batch_size,
                seed=seed,
                start=start,
                sharding=partition.over_batch(mesh),
                teacher_outputs=teacher_outputs,
            )

        self._train = make(dataset.train, experiment.config.batch_size, start, teacher_outputs)
        self._held_out: Any = None
        if self._outer is not None:
            first = max(0, self._outer.count(start))
            self._held_out = make(dataset.held_out, self._outer.batch_size, first)

    def __call__(self, step: int, variant: str = "inner") -> PyTree:
        """Returns what the step of that name takes at `step`."""
        train = self._window(self._train, step)
        if variant == "inner":
            return train
        assert self._outer is not None
        index = max(0, self._outer.count(step))
        return {"train": train, "held_out": self._window(self._held_out, index)}

    def _window(self, source: Any, step: int) -> PyTree:
        return (source.data, source.window(step)) if self._resident else source.window(step)

    def close(self) -> None:
        """Ends the threads of streams."""
        for source in (self._train, self._held_out):
            if isinstance(source, loader.StreamLoader):
                source.close()
