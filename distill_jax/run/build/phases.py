"""The phases of `build`: names, data, method, batches, networks, evaluators, experiment."""

import dataclasses
from collections.abc import Callable, Collection

from jax.sharding import Mesh

from distill_jax.core import (
    partition,
)
from distill_jax.core.api import (
    Role,
)
from distill_jax.core.errors import ConfigError
from distill_jax.run import config as config_lib
from distill_jax.run import teacher_cache
from distill_jax.run.arguments import located
from distill_jax.run.build.data import Data, DataReader, make_batches, read_data
from distill_jax.run.build.evaluators import make_evaluators
from distill_jax.run.build.experiment import Experiment, readable
from distill_jax.run.build.method import Method, make_method
from distill_jax.run.build.networks import Networks, make_networks, plan_cache
from distill_jax.run.build.rules import rules_of
from distill_jax.run.config import ConfigDict
from distill_jax.run.resolve import names_in, resolve
from distill_jax.trainer import Options, Trainer
from distill_jax.trainer.options import LookAhead


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """The objects that a config refers to, before anything is read.

    Attributes:
      trusted: names outside this package that may be imported.
      trainable: roles that learn.
      frozen: roles that never learn.
      averages: roles that are moving averages.
      make_objective: the function that `objective.name` refers to.
      mesh: devices.
      rules: partition rules of the state.
      frozen_rules: partition rules of the frozen networks.
    """

    trusted: Collection[str]
    trainable: tuple[Role, ...]
    frozen: tuple[Role, ...]
    averages: tuple[Role, ...]
    make_objective: Callable
    mesh: Mesh
    rules: partition.Rules
    frozen_rules: partition.Rules


def build(
    config: ConfigDict,
    *,
    shapes_only: bool = False,
    trusted: Collection[str] | None = None,
    reader: DataReader | None = None,
) -> Experiment:
    """Turns a config into an experiment; computes nothing, and reads data unless `shapes_only`.

    Args:
      config: the config; it is validated first.
      shapes_only: whether only the shapes of the data set are read instead of its examples.
      trusted: names and modules outside this package that may be imported, see `resolve`. The
        default is those that the config names, so the config must then be the caller's own. For a
        config that was read from a file, as by `config.from_json`, pass the trusted names, or `()`.
      reader: reads the examples, also with `shapes_only`; several configs that have data in common
        can share one.

    Raises:
      ConfigError: anything in the config does not fit anything else in it.
      DataUnavailable: the data is not on this machine.
      CheckpointError: a network to start from is absent, damaged, or of other shapes.
    """
    config_lib.validate(config)
    with located(config):
        return _build(config, shapes_only=shapes_only, trusted=trusted, reader=reader)


def _build(
    config: ConfigDict,
    *,
    shapes_only: bool,
    trusted: Collection[str] | None,
    reader: DataReader | None,
) -> Experiment:
    names = read_names(config, names_in(config) if trusted is None else trusted)
    data = read_data(config, shapes_only=shapes_only, trusted=names.trusted, reader=reader)
    method = make_method(
        config,
        names.make_objective,
        data,
        trainable=names.trainable,
        averages=names.averages,
        mesh=names.mesh,
        trusted=names.trusted,
    )
    batches = make_batches(config, data, trusted=names.trusted)
    networks = make_networks(
        config,
        data,
        batches,
        method,
        trainable=names.trainable,
        trusted=names.trusted,
        shapes_only=shapes_only,
    )
    asked = {role: networks.teacher for role in config.cache.roles}
    asked = asked if teacher_cache.of_view_alone(networks.teacher) else {}
    cache = plan_cache(config, data, batches, method, networks, mesh=names.mesh)
    outputs = readable(method.objective, networks.shapes, {*config.roles, *asked})
    warnings = (*data.report.warnings, *batches.warnings)
    return Experiment(
        config=config,
        trainer=make_trainer(config, names, data, method, networks),
        shapes=networks.shapes,
        dataset=data.dataset,
        data=dataclasses.replace(data.report, warnings=warnings),
        evaluators=make_evaluators(config, outputs, data.dataset, names.trusted),
        schedule=method.schedule,
        outer=method.outer,
        total_steps=data.total_steps,
        steps_per_epoch=data.steps_per_epoch,
        resident=data.resident,
        image_size=batches.image_size,
        trusted=names.trusted,
        cache=cache,
        asked=asked,
        notes=networks.notes,
    )


def make_trainer(
    config: ConfigDict, names: Names, data: Data, method: Method, networks: Networks
) -> Trainer:
    """Returns the trainer of a config, for which a function in place of a teacher is frozen."""
    models, ahead = networks.models, config.lookahead
    learned, averages = set(names.trainable), set(method.ema)
    return Trainer(
        method.objective,
        optimizer=method.optimizer,
        networks={role: models[role] for role in names.trainable},
        frozen={role: m for role, m in models.items() if role not in learned | averages},
        averages=method.ema,
        outer_optimizer=method.outer_optimizer,
        bilevel=method.outer.options if method.outer else None,
        options=Options(
            precision=config.precision,
            accum_steps=config.accum_steps,
            grad_norm=config.log.grad_norm,
            nonfinite="skip" if config.watch.nonfinite == "skip" else "report",
            watch_every=0 if ahead.steps else config.log.every_steps,
            lookahead=LookAhead(ahead.steps, ahead.kind, ahead.restore) if ahead.steps else None,
            mesh=names.mesh,
            partition_rules=names.rules,
            frozen_partition_rules=names.frozen_rules,
            partition_min_size=config.partition.min_size,
            total_steps=data.total_steps,
            steps_per_epoch=data.steps_per_epoch,
        ),
    )


def read_names(config: ConfigDict, trusted: Collection[str]) -> Names:
    """Splits the roles, finds the objective, and lays out the devices."""
    trainable, frozen, averages = _split_roles(config)
    make_objective = resolve(
        "objectives", config.objective.name, where="objective.name", trusted=trusted
    )
    mesh = partition.make_mesh(**{axis: config.mesh[axis] for axis in partition.AXES})
    rules, frozen_rules = (
        rules_of(config, name, mesh, trusted=trusted) for name in ("rules", "frozen_rules")
    )
    partition.check_model_axis(mesh, rules, frozen_rules)
    partition.check_batch(
        config.batch_size, mesh, accum_steps=config.accum_steps, where="batch_size"
    )
    return Names(
        trusted=trusted,
        trainable=trainable,
        frozen=frozen,
        averages=averages,
        make_objective=make_objective,
        mesh=mesh,
        rules=rules,
        frozen_rules=frozen_rules,
    )


def _split_roles(config: ConfigDict):
    averages = tuple(role for role, spec in config.roles.items() if spec.ema_of)
    frozen = tuple(role for role, spec in config.roles.items() if spec.frozen)
    for role in frozen:
        if not config.roles[role].init:
            raise ConfigError(
                "a frozen network without weights",
                where=f"roles.{role}.init",
                hint="give the folder of the run that trained it",
            )
    trainable = tuple(r for r in config.roles if r not in frozen and r not in averages)
    return trainable, frozen, averages
