"""What a run starts from: the initial state, frozen networks, stored teacher outputs."""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core import partition, steps, weighted_objective
from distill_jax.core.api import Key, PyTree, Role
from distill_jax.core.errors import CheckpointError, ConfigError
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.data import loader
from distill_jax.data.source import example_ids
from distill_jax.run import foreign, paths, processes, teacher_cache, watch
from distill_jax.run.build.experiment import Experiment, evaluation_batch
from distill_jax.run.build.networks import stored_spec
from distill_jax.run.config import ConfigDict
from distill_jax.trainer.io.network import COMMON, read_network
from distill_jax.trainer.io.paths import NetworkRef
from distill_jax.trainer.io.teacher_cache import TeacherOutputs
from distill_jax.trainer.passes import dataset_pass, measuring


def initial_state(experiment: Experiment, key: Key, config: ConfigDict) -> Any:
    """Creates the state straight into its shardings, then loads warm starts.

    Args:
      key: the root key of the run.
      config: the config of the run, which names the networks to start from.
    """
    new = experiment.init(key)
    for role in experiment.trainable:
        if config.roles[role].init:
            params, model_state = _read(
                experiment, config, role, new.params[role], new.model_state[role]
            )
            new = new.replace(
                params={**new.params, role: params},
                model_state={**new.model_state, role: model_state},
            )
            for target, (source, _) in experiment.ema.items():
                if source == role:
                    copies = jax.tree.map(jnp.copy, (params, model_state))
                    new = new.replace(
                        targets={**new.targets, target: copies[0]},
                        model_state={**new.model_state, target: copies[1]},
                    )
    return new


def with_class_means(experiment: Experiment, state: Any, frozen: steps.Frozen) -> Any:
    """Fills the class-mean table from the training part only, if the weighting needs one."""
    if not isinstance(experiment.objective, WeightedObjective) or "class_means" not in state.memory:
        return state
    objective, frozen = experiment.objective, on_device(experiment, frozen)

    def sums(state, frozen, batch):
        batch = evaluation_batch(experiment, batch, state.step)
        nets = experiment.trainer.bind(state, frozen, batch=batch)
        return objective.class_sums(nets, batch, state.memory)

    sums, _ = _over_training_part(
        experiment, sums, state, frozen, "the class means were known", axis=None
    )
    total = jax.tree.map(lambda x: x.astype(np.float64).sum(axis=0), sums)
    old = state.memory["class_means"]
    means = weighted_objective.class_means(
        *jax.tree.map(jnp.asarray, jax.tree.map(np.float32, total))
    )
    table = jax.device_put(np.asarray(means, old.dtype), old.sharding)
    return state.replace(memory={**state.memory, "class_means": table})


def with_dataset_pass(experiment: Experiment, state: Any, frozen: steps.Frozen, seed: int) -> Any:
    """Runs the dataset pass of an objective and stores its result in the memory."""
    objective = experiment.objective
    if not objective.needs_dataset_pass:
        return state
    frozen = on_device(experiment, frozen)

    def outputs(state, frozen, batch):
        batch = evaluation_batch(experiment, batch, state.step)
        nets = experiment.trainer.bind(state, frozen, batch=batch)
        return dict(objective.dataset_pass(nets, batch, state.memory, state.step))

    rows, _ = _over_training_part(experiment, outputs, state, frozen, "the dataset pass was done")
    generator = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(b"survey")]))
    ids = example_ids(experiment.dataset.train)
    memory = objective.init_memory(rows, ids, jax.device_get(state.memory), generator)
    put = lambda new, old: jax.device_put(np.asarray(new, old.dtype), old.sharding)  # noqa: E731
    return state.replace(memory=jax.tree.map(put, memory, state.memory))


def _over_training_part(
    experiment: Experiment,
    fn: Callable,
    state: Any,
    frozen: steps.Frozen,
    done: str,
    *,
    axis: int | None = 0,
) -> tuple[Any, Any]:
    """Passes `fn(state, frozen, batch)` over the training part, see `dataset_pass`."""
    run = jax.jit(fn, out_shardings=partition.replicated(experiment.mesh))
    batches = loader.eval_batches(experiment.dataset.train, batch_size=experiment.eval_batch_size)

    def alive() -> None:
        watch.alive()
        processes.stop_if_asked(f"before {done}")

    run = functools.partial(run, state, frozen)
    return dataset_pass(run, batches, on_batch=alive, axis=axis)


def frozen_networks(experiment: Experiment, config: ConfigDict) -> steps.Frozen:
    """Reads the networks that never learn from the checkpoints that `config` names.

    Networks whose outputs are stored stay on the host: training does not need them.
    """
    return {
        role: _read(experiment, config, role, *experiment.abstract_frozen[role])
        for role in experiment.frozen
    }


def on_device(experiment: Experiment, frozen: steps.Frozen) -> steps.Frozen:
    """Returns the frozen networks with those from the host put on the devices."""
    put = lambda x, to: jax.device_put(x, to.sharding)  # noqa: E731
    moved = {
        role: jax.tree.map(put, frozen[role], experiment.abstract_frozen[role])
        for role in experiment.cached
        if role in frozen
    }
    return {**frozen, **moved}


def for_evaluation(experiment: Experiment, frozen: steps.Frozen) -> steps.Frozen:
    """Returns the frozen networks that evaluators may read, on the devices."""
    read = {role for evaluator in experiment.evaluators.values() for role in evaluator.outputs}
    if read <= set(experiment.shapes.roles) and not measuring(experiment.evaluators):
        frozen = {role: network for role, network in frozen.items() if role in read}
    return on_device(experiment, frozen)


def stored_teacher_outputs(
    experiment: Experiment,
    config: ConfigDict,
    frozen: steps.Frozen,
    log_line: Callable[[str], None],
) -> TeacherOutputs | None:
    """Opens the stored outputs that a run reads, and fills in missing ones.

    Args:
      config: of the run, with its seed.
      frozen: from `frozen_networks`.
      log_line: prints a line.

    Raises:
      ConfigError: the folder holds outputs for other inputs or networks.
    """
    if experiment.cache is None:
        return None
    return teacher_cache.prepare(
        config,
        experiment.cache,
        source=experiment.dataset.train,
        models=experiment.models,
        frozen=frozen,
        transform=experiment.transform(train=True),
        log_line=log_line,
    )


def _read(
    experiment: Experiment, config: ConfigDict, role: Role, params: PyTree, model_state: PyTree
):
    like, where, spec = (params, model_state), f"roles.{role}.init", config.roles[role]
    if paths.is_foreign(spec.init):
        values = foreign.read(spec.init, spec.model, like, frozen=spec.frozen, where=where)
    else:
        ref = NetworkRef.parse(spec.init, where=where)
        if ref.part == COMMON and spec.frozen:
            what, hint = "a frozen network has no first values to keep", "a whole network, or '*'"
            raise ConfigError(what, where=where, hint=hint)
        try:
            values = read_network(ref.path, role=ref.role, part=ref.part, like=like, where=where)
        except CheckpointError as error:
            name = spec.model and not ref.part and stored_spec(ref, where=where)[0]
            if name and name != spec.model:
                raise ConfigError(
                    f"holds a network {name}, not {spec.model}",
                    where=where,
                    hint=f"roles.{role}.model={name}, or empty: the run names it then",
                ) from error
            raise
    if role in experiment.cached:
        return values
    put = lambda x, to: jax.device_put(np.asarray(x, to.dtype), to.sharding)  # noqa: E731
    return jax.tree.map(put, values, like)
