"""`Experiment`: a config as data, pure functions and shapes."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from distill_jax.core import partition, rng, state, steps
from distill_jax.core import phases as phases_lib
from distill_jax.core.api import (
    Batch,
    Dataset,
    Evaluator,
    Model,
    Objective,
    Role,
    Transform,
)
from distill_jax.core.replicas import REPLICA
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.data import checks, moments, shared_examples
from distill_jax.run import foreign
from distill_jax.run.build import variants as variants_lib
from distill_jax.run.build.data import batch_shapes, make_transform
from distill_jax.run.build.method import Outer
from distill_jax.run.build.networks import role_spec
from distill_jax.run.build.rules import rules_of_config
from distill_jax.run.config import ConfigDict
from distill_jax.trainer import Trainer
from distill_jax.trainer.io.teacher_cache import Plan
from distill_jax.trainer.passes import measuring, wanted_by
from distill_jax.trainer.update import metric_names

RAW_WIDTH = 4096
"""Inputs of more numbers than this are no control of embeddings."""


@dataclasses.dataclass
class Caches:
    """Facts about an experiment that are computed once.

    Attributes:
      steps: the compiled steps by name.
      controls: the programs of controls, see `controls.Programs`.
      measured: names of the scalars that evaluators measure, by split and evaluator.
      asked: outputs of functions that replace networks, by split and examples.
      warned: whether its warnings were printed.
    """

    steps: dict[str, Any] = dataclasses.field(default_factory=dict)
    controls: Any = None
    measured: dict[str, dict[str, list[str]]] = dataclasses.field(default_factory=dict)
    asked: dict[Any, Any] = dataclasses.field(default_factory=dict)
    warned: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Experiment:
    """A trainer together with the data, evaluators and lengths of a run; the same for every seed.

    The functions that compile and run it are in the neighbouring modules.

    A copy by `dataclasses.replace` has empty caches.

    Attributes:
      trainer: performs the computation.
      shapes: of its networks, losses and memories on a batch.
      data: findings about the data set.
      schedule: of the learning rate.
      outer: when the weighting learns; None where it does not.
      resident: whether the examples lie on the devices.
      cache: which teacher outputs are stored.
      asked: functions that replace networks and that evaluators may read, see `teacher_outputs`.
      notes: warnings about the first weights of networks.
    """

    config: ConfigDict
    trainer: Trainer
    shapes: state.Shapes
    dataset: Dataset
    data: checks.Report = dataclasses.field(default_factory=checks.Report)
    evaluators: Mapping[str, Evaluator]
    schedule: optax.Schedule
    outer: Outer | None
    total_steps: int
    steps_per_epoch: float
    resident: bool
    image_size: int
    trusted: Collection[str]
    cache: Plan | None = None
    asked: Mapping[Role, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    caches: Caches = dataclasses.field(init=False, repr=False, default_factory=Caches)

    @property
    def mesh(self) -> Mesh:
        return self.trainer.mesh

    @property
    def objective(self) -> Objective:
        return self.trainer.objective

    @property
    def models(self) -> Mapping[Role, Model]:
        return self.trainer.models

    @property
    def tx(self) -> Any:
        return self.trainer.tx

    @property
    def trainable(self) -> tuple[Role, ...]:
        return tuple(self.trainer.networks)

    @property
    def frozen(self) -> tuple[Role, ...]:
        """Networks that never learn; a function that replaces a network is not included."""
        return tuple(role for role in self.trainer.frozen if role in self.config.roles)

    @property
    def ema(self) -> Mapping[Role, tuple[Role, steps.Decay]]:
        return self.trainer.averages

    @property
    def phases(self) -> tuple[phases_lib.Phase, ...]:
        """The parts of training, one for most methods."""
        return self.trainer.phases

    def variant(self, step: int) -> str:
        """Returns the name of the compiled step that is due: see `variants.name`."""
        outer = self.outer is not None and self.outer.due(step)
        return variants_lib.name(phases_lib.at(self.phases, step), outer=outer)

    @property
    def variants(self) -> tuple[str, ...]:
        """The steps that training uses."""
        if self.outer is None:
            kinds = (False,)
        else:
            kinds = (True,) if (self.outer.every, self.outer.warmup) == (1, 0) else (False, True)
        names = [variants_lib.name(i, outer=x) for i in range(len(self.phases)) for x in kinds]
        return tuple(n for n in names if len(self.phases) == 1 or self.share(n))

    def share(self, variant: str) -> float:
        """Returns the share of the steps of training that are of a variant."""
        phase, outer = variants_lib.read(variant)
        total, before = self.total_steps, self.outer.steps_before if self.outer else lambda _: 0
        first, end = [*(min(p.start, total) for p in self.phases), total][phase : phase + 2]
        learning = (before(end) - before(first)) / total
        return learning if outer else (end - first) / total - learning

    def in_phase(self, index: int) -> "Experiment":
        """Returns the experiment as it is in one phase: its objective, networks and shapes."""
        if len(self.phases) == 1:
            return self
        part = self.with_trainer(
            objective=self.phases[index].objective,
            frozen=phases_lib.used(self.phases, index, self.trainer.frozen),
        )
        return dataclasses.replace(part, shapes=self.shapes.phases[index])

    def transform(self, *, train: bool) -> Transform:
        """Returns the transforms of training or evaluation batches."""
        return make_transform(self.config, self.dataset, train=train, trusted=self.trusted)

    def with_trainer(self, **changes: Any) -> "Experiment":
        """Returns a copy whose trainer differs in these arguments."""
        return dataclasses.replace(self, trainer=dataclasses.replace(self.trainer, **changes))

    def on_mesh(self, mesh: Mesh) -> "Experiment":
        """Returns a copy on other devices."""
        return self.with_trainer(options=dataclasses.replace(self.trainer.options, mesh=mesh))

    @functools.cached_property
    def overlaps(self) -> Mapping[str, shared_examples.Overlap]:
        """What of the other parts is in the training part, see `shared_examples.overlaps`."""
        return shared_examples.overlaps(self.dataset)

    @functools.cached_property
    def signature(self) -> dict[str, Any]:
        """What it takes to apply the trained networks elsewhere; JSON-like.

        `input` is the shape and type of one raw example, `networks` the model and arguments of each
        network that a checkpoint holds, `task` that of the labels unless it is classification,
        `statistics` the mean and deviation of the training part where evaluation normalizes by
        them, `cards` the arguments of transforms `card:<role>` where it has such.
        """
        data = self.config.data
        one = self.dataset.train.read(np.zeros(1, np.int64))["input"]
        own = data.transform_kwargs.get("normalize", {}).get("mean") is None
        statistics = None
        if "normalize" in data.eval_transforms and own:
            statistics = [np.asarray(x).tolist() for x in moments.statistics(self.dataset.train)]
        networks = {}
        for role in (*self.trainable, *self.ema):
            name, kwargs = role_spec(self.config, role)
            networks[role] = {"model": name, "kwargs": kwargs}
        return {
            "input": jax.tree.map(lambda x: {"shape": x.shape[1:], "dtype": str(x.dtype)}, one),
            "classes": self.dataset.classes,
            "cardinalities": self.dataset.cardinalities,
            "image_size": self.image_size,
            **({"vocabulary": self.dataset.vocabulary} if self.dataset.vocabulary else {}),
            **({"task": task} if (task := self.dataset.task) != "classification" else {}),
            "statistics": statistics,
            "networks": networks,
            **({"cards": cards} if (cards := foreign.cards(self.config)) else {}),
        }

    @functools.cached_property
    def abstract_state(self) -> Any:
        """The training state as shapes with shardings."""
        with rules_of_config():
            return self.trainer.abstract_state(self.shapes)

    @functools.cached_property
    def abstract_frozen(self) -> Any:
        with rules_of_config():
            return self.trainer.abstract_frozen(self.shapes)

    @functools.cached_property
    def init(self) -> Callable:
        """The compiled `key -> TrainState`, before warm starts."""
        with rules_of_config():
            return self.trainer.compile_init(self.shapes)

    @functools.cached_property
    def predict(self) -> Callable:
        """The jitted `(state, frozen, batch) -> {role: {name: [b, ...]}}` of the evaluators."""
        wanted = tuple(x for x in wanted_by(self.evaluators) if x[0] not in self.asked)
        measures = measuring(self.evaluators)

        def run(state, frozen, batch):
            batch = evaluation_batch(self, batch, state.step)
            return self.trainer.outputs(state, frozen, batch, wanted, measures)

        return jax.jit(run, out_shardings=partition.replicated(self.mesh))

    @functools.cached_property
    def measured(self) -> Mapping[str, Mapping[str, Any]]:
        """Shapes of what evaluators measure with the networks, `{evaluator: {name: [b, ...]}}`."""
        names = [name for name, _ in measuring(self.evaluators)]
        if not names:
            return {}
        batch = batch_shapes(self.dataset.train, self.eval_batch_size)
        found = jax.eval_shape(self.predict, self.abstract_state, self.abstract_frozen, batch)
        return {name: found[name] for name in names}

    def metric_names(self, variant: str = "inner") -> tuple[str, ...]:
        """Names of a step's metrics."""
        trainer, (phase, outer) = self.trainer, variants_lib.read(variant)
        shapes = self.shapes.phases[phase] if self.shapes.phases else self.shapes
        how = {"two_levels": trainer.two_levels, "outer": outer}
        return metric_names(shapes.terms, trainer.options, **how)

    @property
    def devices(self) -> int:
        """Devices among which the work of a step of one run is divided."""
        return self.mesh.size // self.mesh.shape.get(REPLICA, 1)

    @property
    def flops_per_step(self) -> float | None:
        """See `flops_of`; of the steps that are compiled."""
        return flops_of(self, self.caches.steps)

    @functools.cached_property
    def outputs(self) -> Mapping[str, Mapping[str, Any]]:
        """Shapes of what evaluators may read: see `readable`."""
        return readable(self.objective, self.shapes, {*self.config.roles, *self.asked})

    @functools.cached_property
    def parts(self) -> Mapping[str, int | None]:
        """Splits that evaluators need besides the measured one, with the number of examples."""
        sizes: dict[str, int | None] = {}
        for evaluator in self.evaluators.values():
            for part, most in getattr(evaluator, "parts", {}).items():
                before = sizes.get(part, 0)
                sizes[part] = None if most is None or before is None else max(most, before)
        return sizes

    @functools.cached_property
    def controls(self) -> Mapping[str, Mapping[Role, tuple[str, ...]]]:
        """Outputs `{control: {role: names}}` that a control replaces on the test split.

        Roles that are not networks have no control. Inputs wider than `RAW_WIDTH` are not used as
        one.
        """
        wanted: dict[str, dict[Role, tuple[str, ...]]] = {}
        networks = self.shapes.roles.keys() - self.asked.keys()
        for evaluator in self.evaluators.values():
            for control in getattr(evaluator, "controls", ()):
                for role, names in evaluator.outputs.items():
                    if role in networks and (control != "raw" or self._raw_fits):
                        roles = wanted.setdefault(control, {})
                        roles[role] = tuple(dict.fromkeys((*roles.get(role, ()), *names)))
        return wanted

    @functools.cached_property
    def _raw_fits(self) -> bool:
        one = batch_shapes(self.dataset.train, 1)
        batch = jax.eval_shape(functools.partial(evaluation_transform, self), one)
        raw = functools.partial(raw_input, self.dataset)
        return jax.eval_shape(raw, batch["input"]).shape[1] <= RAW_WIDTH

    @property
    def eval_batch_size(self) -> int:
        """The configured size, at most that of the data, rounded up to split evenly; padding rows
        do not count."""
        parts = (self.dataset.train, self.dataset.held_out, self.dataset.test)
        size = min(self.config.eval.batch_size, max(map(len, parts)))
        shards = partition.batch_shards(self.mesh)
        return -(-size // shards) * shards

    @property
    def cached(self) -> tuple[Role, ...]:
        """Roles whose outputs are stored before training."""
        return tuple(self.cache.outputs) if self.cache is not None else ()

    def online(self, frozen: steps.Frozen, variant: str = "") -> steps.Frozen:
        """Returns those of the frozen networks that the steps apply, or those of a variant."""
        if variant:
            frozen = phases_lib.used(self.phases, variants_lib.read(variant)[0], frozen)
        return {role: network for role, network in frozen.items() if role not in self.cached}


def flops_of(experiment: Experiment, compiled: Mapping[str, Any]) -> float | None:
    """Returns the floating-point operations of a step over all its devices, averaged over training.

    None where XLA does not count them.

    Args:
      experiment: what is run.
      compiled: its compiled steps by name.
    """
    total = 0.0
    for variant in experiment.variants:
        step = compiled.get(variant)
        flops = (step.cost_analysis() or {}).get("flops") if step is not None else None
        if flops is None:
            return None
        total += experiment.share(variant) * flops
    return total * experiment.devices


def evaluation_transform(experiment: Experiment, batch: Batch, step: Any = 0) -> Batch:
    transform = experiment.transform(train=False)
    return transform(rng.stream(jax.random.key(0), "transform"), batch, jnp.int32(step))


def evaluation_batch(experiment: Experiment, batch: Batch, step: Any) -> Batch:
    """Transforms a batch `[b, ...]` of the host, which without constraint each device would
    compute whole."""
    split = jax.lax.with_sharding_constraint(batch, partition.over_batch(experiment.mesh))
    return evaluation_transform(experiment, split, step)


def raw_input(dataset: Dataset, inputs: Any) -> jax.Array:
    """Returns the input of a network as numbers `[b, d]`; categories become indicators."""
    if not isinstance(inputs, Mapping):
        return inputs.reshape(len(inputs), -1).astype(jnp.float32)
    parts = [
        jax.nn.one_hot(inputs["categorical"][:, j], count)
        for j, count in enumerate(dataset.cardinalities)
    ]
    parts += [x.reshape(len(x), -1) for name, x in inputs.items() if name != "categorical"]
    return jnp.concatenate([x.astype(jnp.float32) for x in parts], axis=1)


def readable(
    objective: Objective, shapes: state.Shapes, roles: Collection[Role]
) -> dict[str, Mapping[str, Any]]:
    """Shapes of network outputs, predictions of the method, and results of the weighting."""
    outputs: dict[str, Mapping[str, Any]] = {
        r: s.outputs for r, s in shapes.roles.items() if r in roles
    }
    return outputs | dict(shapes.predictions) | _example_weight_shapes(objective, shapes)


def _example_weight_shapes(objective: Objective, shapes: state.Shapes) -> dict[str, Any]:
    if not isinstance(objective, WeightedObjective) or objective.weighting.by_gradient:
        return {}
    rows = shapes.terms.values[objective.loss_terms[0]].shape
    weights = jax.ShapeDtypeStruct((*rows, len(objective.loss_terms)), jnp.float32)
    logits = {r: x for r, x in shapes.terms.logits.items() if x.shape[:-1] == rows}
    return {"example_weights": {"weights": weights, **logits}}
