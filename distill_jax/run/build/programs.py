"""The programs of an experiment: the step, what evaluators read, whether parameters are finite."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill_jax.core import (
    partition,
    rng,
    steps,
)
from distill_jax.core.api import (
    PyTree,
    Role,
)
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.data import loader
from distill_jax.run.build.experiment import Experiment, evaluation_batch
from distill_jax.trainer.update import make_update


def make_step(experiment: Experiment, variant: str = "inner") -> Callable:
    """Returns the jitted step `(state, frozen, fed, key) -> (state, metrics)`.

    It donates the state. The metrics are one array `[m]` in the order of `metric_names`: each
    output of a step costs the host some microseconds, which shows where steps are short.
    """
    config, outer = experiment.config, experiment.outer
    update = make_update(
        experiment.objective,
        experiment.gathered_models,
        experiment.tx,
        experiment.options,
        averages=experiment.ema,
        two_level=outer.options if outer else None,
        outer=variant == "outer",
    )
    ahead = config.lookahead
    wide = ahead.steps if ahead.kind == "wide" else 0
    names = experiment.metric_names(variant)
    train, evaluation = experiment.transform(train=True), experiment.transform(train=False)
    over_batch = partition.over_batch(experiment.mesh)

    def batch_of(fed, step, batch_size, transform, key):
        if experiment.resident:
            data, window = fed
            fed = loader.fetch_resident(data, window, step, batch_size=batch_size)
        batch = jax.lax.with_sharding_constraint(fed, over_batch)
        teacher_outputs = batch.pop("teacher_outputs", None)
        batch = transform(key, batch, step)
        if teacher_outputs is not None:
            assert experiment.cache is not None
            batch = {**batch, "teacher_outputs": experiment.cache.decode(teacher_outputs)}
        return batch

    def train_batch(fed, step, key):
        return batch_of(fed, step, config.batch_size, train, rng.stream(key, "transform"))

    def future_batches(fed, step, key):
        batches = [train_batch(fed, step + k, key) for k in range(wide)]
        return jax.tree.map(lambda *x: jnp.stack(x), *batches)

    def both_batches(fed, step, key):
        assert outer is not None
        ahead = [train_batch(fed["train"], step + k, key) for k in range(outer.options.unroll)]
        together = jax.tree.map(lambda *x: jnp.stack(x), *ahead)
        held_key = rng.stream(key, "held_out", "transform")
        held_out = batch_of(
            fed["held_out"], outer.count(step), outer.batch_size, evaluation, held_key
        )
        return {"train": together if len(ahead) > 1 else ahead[0], "held_out": held_out}

    def step(state, frozen, fed, key):
        make = both_batches if variant == "outer" else future_batches if wide else train_batch
        state, metrics = update(state, frozen, make(fed, state.step, key), key)
        return state, jnp.stack([metrics[name] for name in names])

    shardings = jax.tree.map(lambda x: x.sharding, experiment.abstract_state)
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings, partition.replicated(experiment.mesh)),
    )


def compile_step(experiment: Experiment, fed: PyTree, variant: str = "inner") -> Callable:
    """Compiles a step once for all seeds; any other shapes or shardings then raise."""
    if variant not in experiment.caches.steps:
        key = jax.ShapeDtypeStruct(
            (), jax.random.key(0).dtype, sharding=partition.replicated(experiment.mesh)
        )
        step = make_step(experiment, variant)
        frozen = experiment.online(experiment.abstract_frozen)
        # Losses that work device by device find their mesh in the context of the trace.
        with jax.sharding.use_abstract_mesh(experiment.mesh.abstract_mesh):
            lowered = step.lower(experiment.abstract_state, frozen, fed, key)
        experiment.caches.steps[variant] = lowered.compile()
    return experiment.caches.steps[variant]


def predict(experiment: Experiment) -> Callable:
    """Returns the jitted `(state, frozen, batch) -> {role: {name: [b, ...]}}` of the evaluators."""
    if experiment.caches.predict is None:
        experiment.caches.predict = _make_predict(experiment)
    return experiment.caches.predict


def _make_predict(experiment: Experiment) -> Callable:
    wanted: dict[Role, tuple[str, ...]] = {}
    for evaluator in experiment.evaluators.values():
        for role, names in evaluator.outputs.items():
            wanted[role] = tuple(dict.fromkeys((*wanted.get(role, ()), *names)))
    objective = experiment.objective
    derived: dict[str, Callable] = {
        name: lambda *args, name=name: objective.predictions(*args)[name]
        for name in experiment.shapes.predictions
    }
    if isinstance(objective, WeightedObjective):
        derived["example_weights"] = objective.example_weights
    predict = steps.make_predict(
        experiment.gathered_models, wanted, precision=experiment.config.precision, derived=derived
    )

    def run(state, frozen, batch):
        return predict(state, frozen, evaluation_batch(experiment, batch, state.step))

    return jax.jit(run, out_shardings=partition.replicated(experiment.mesh))


@functools.cache
def is_finite(mesh: Mesh) -> Callable:
    """Returns the jitted `params -> bool`: whether no parameter is NaN or infinite."""
    leaves_finite = lambda params: [jnp.isfinite(x).all() for x in jax.tree.leaves(params)]  # noqa: E731
    replicated = partition.replicated(mesh)
    return jax.jit(lambda p: jnp.stack(leaves_finite(p)).all(), out_shardings=replicated)
