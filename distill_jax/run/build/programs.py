"""The programs of an experiment: its steps, and whether parameters are finite."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill_jax.core import partition
from distill_jax.core.api import PyTree
from distill_jax.run.build import variants
from distill_jax.run.build.experiment import Experiment
from distill_jax.run.build.feed import make_prepare


def make_step(experiment: Experiment, variant: str = "inner") -> Callable:
    """Returns the jitted step `(state, frozen, fed, key) -> (state, metrics [m])`.

    It donates the state. The metrics are in the order of `metric_names`.
    """
    phase, outer = variants.read(variant)
    step = experiment.trainer.pure_step(
        make_prepare(experiment, variant),
        outer=outer,
        phase=phase,
        names=experiment.metric_names(variant),
    )
    shardings = jax.tree.map(lambda x: x.sharding, experiment.abstract_state)
    out = (shardings, partition.replicated(experiment.mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=out)


def compile_step(experiment: Experiment, fed: PyTree, variant: str = "inner") -> Callable:
    """Compiles a step once for all seeds; any other shapes or shardings then raise."""
    if variant not in experiment.caches.steps:
        key = jax.ShapeDtypeStruct(
            (), jax.random.key(0).dtype, sharding=partition.replicated(experiment.mesh)
        )
        step = make_step(experiment, variant)
        frozen = experiment.online(experiment.abstract_frozen, variant)
        # Losses that work device by device find their mesh in the context of the trace.
        with jax.sharding.use_abstract_mesh(experiment.mesh.abstract_mesh):
            lowered = step.lower(experiment.abstract_state, frozen, fed, key)
        experiment.caches.steps[variant] = lowered.compile()
    return experiment.caches.steps[variant]


@functools.cache
def is_finite(mesh: Mesh) -> Callable:
    """Returns the jitted `params -> bool`: whether no parameter is NaN or infinite."""
    leaves_finite = lambda params: [jnp.isfinite(x).all() for x in jax.tree.leaves(params)]  # noqa: E731
    replicated = partition.replicated(mesh)
    return jax.jit(lambda p: jnp.stack(leaves_finite(p)).all(), out_shardings=replicated)
