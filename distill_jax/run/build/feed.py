"""Batches of one run: as arguments of a step, and from these as a step takes them."""

from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.core import partition, rng
from distill_jax.core.api import Array, Batch, Key, PyTree, Transform
from distill_jax.data import loader
from distill_jax.run.build import variants
from distill_jax.run.build.data import batch_shapes
from distill_jax.run.build.experiment import Experiment
from distill_jax.trainer.io.teacher_cache import TeacherOutputs
from distill_jax.trainer.trainer import Prepare


def feed_shapes(experiment: Experiment, variant: str = "inner") -> PyTree:
    """Returns the arguments that a `Feed` passes to a step, as shapes with shardings."""
    mesh, cache = experiment.mesh, experiment.cache

    def one(source, b):
        if experiment.resident:
            return loader.resident_shapes(source, sharding=partition.replicated(mesh))
        sharding = partition.over_batch(mesh)
        return {}, jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            batch_shapes(source, b),
        )

    b = experiment.config.batch_size
    data, window = one(experiment.dataset.train, b)
    if cache is not None and experiment.resident:
        table = cache.shapes(len(experiment.dataset.train), partition.replicated(mesh))
        window["teacher_outputs"] = dict.fromkeys(("now", "next")[: cache.views], table)
    elif cache is not None:
        window["teacher_outputs"] = cache.shapes(b, partition.over_batch(mesh))
    if not variants.read(variant)[1]:
        return data, window
    assert experiment.outer is not None
    held_out = one(experiment.dataset.outer_part, experiment.outer.batch_size)
    return {"train": (data, window), "held_out": held_out}


class Feed:
    """Batches of one run as arguments of a step: `(data, window)`, see `data.loader`.

    Args:
      experiment: what is run.
      seed: of the order of the examples.
      start: the first step.
      teacher_outputs: the stored teacher outputs that the batches carry, from
        `stored_teacher_outputs`.
    """

    def __init__(
        self,
        experiment: Experiment,
        *,
        seed: int,
        start: int,
        teacher_outputs: TeacherOutputs | None = None,
    ):
        self._outer, mesh = experiment.outer, experiment.mesh

        def make(source, batch_size, start, teacher_outputs=None):
            shared: dict[str, Any] = {
                "batch_size": batch_size,
                "seed": seed,
                "teacher_outputs": teacher_outputs,
            }
            if experiment.resident:
                replicated = partition.replicated(mesh)
                return loader.ResidentLoader(source, sharding=replicated, **shared)
            split = partition.over_batch(mesh)
            return loader.StreamLoader(source, start=start, sharding=split, **shared)

        dataset = experiment.dataset
        self._train = make(dataset.train, experiment.config.batch_size, start, teacher_outputs)
        self._held_out: Any = None
        if self._outer is not None:
            first = max(0, self._outer.count(start))
            self._held_out = make(dataset.outer_part, self._outer.batch_size, first)

    def __call__(self, step: int, variant: str = "inner") -> PyTree:
        """Returns the arguments of the step of that name at `step`."""
        if not variants.read(variant)[1]:
            return self._train.data, self._train.window(step)
        assert self._outer is not None
        train = self._train.data, self._train.window(step - self._outer.options.back)
        index = max(0, self._outer.count(step))
        return {"train": train, "held_out": (self._held_out.data, self._held_out.window(index))}

    def close(self) -> None:
        """Ends the threads of streams."""
        for source in (self._train, self._held_out):
            if isinstance(source, loader.StreamLoader):
                source.close()


def make_prepare(experiment: Experiment, variant: str = "inner") -> Prepare:
    """Returns the pure `(fed, step, key) -> batch` that a step begins with.

    The batch is as `Trainer.pure_step` takes it: that of `step`; a stack of as many as the step
    looks ahead; or, where the weighting learns, `{"train": ..., "held_out": batch}`.
    """
    size, outer, ahead = experiment.config.batch_size, experiment.outer, experiment.config.lookahead
    train, evaluation = experiment.transform(train=True), experiment.transform(train=False)
    over_batch = partition.over_batch(experiment.mesh)

    def batch_of(fed: Any, step: Array, key: Key, batch_size: int, transform: Transform) -> Batch:
        data, window = fed
        if experiment.resident:
            window = loader.fetch_resident(data, window, step, batch_size=batch_size)
        batch: Any = jax.lax.with_sharding_constraint(window, over_batch)
        teacher_outputs = batch.pop("teacher_outputs", None)
        batch = transform(key, batch, step)
        if teacher_outputs is not None:
            assert experiment.cache is not None
            batch = {**batch, "teacher_outputs": experiment.cache.decode(teacher_outputs)}
        return batch

    def batches(fed: Any, step: Array, key: Key, count: int) -> Batch:
        key = rng.stream(key, "transform")
        parts = [batch_of(fed, step + k, key, size, train) for k in range(count)]
        return jax.tree.map(lambda *x: jnp.stack(x), *parts)

    def one(fed: Any, step: Array, key: Key) -> Batch:
        return batch_of(fed, step, rng.stream(key, "transform"), size, train)

    def both(fed: Any, step: Array, key: Key) -> Any:
        assert outer is not None
        count, held_key = outer.options.batches, rng.stream(key, "held_out", "transform")
        first = step - outer.options.back
        seen = (
            batches(fed["train"], first, key, count) if count > 1 else one(fed["train"], step, key)
        )
        index, b = outer.count(step), outer.batch_size
        return {
            "train": seen,
            "held_out": batch_of(fed["held_out"], index, held_key, b, evaluation),
        }

    if variants.read(variant)[1]:
        return both
    wide = ahead.steps if ahead.kind == "wide" else 0
    return (lambda fed, step, key: batches(fed, step, key, wide)) if wide else one
