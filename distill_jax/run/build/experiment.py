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

from distill_jax.core import (
    bilevel,
    collapse,
    partition,
    rng,
    state,
    steps,
)
from distill_jax.core.api import (
    Batch,
    Dataset,
    Evaluator,
    Model,
    Objective,
    PyTree,
    Role,
    Transform,
)
from distill_jax.core.replicas import REPLICA
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.data import checks
from distill_jax.run.build.data import batch_shapes, make_transform
from distill_jax.run.build.method import Outer
from distill_jax.run.build.networks import role_spec
from distill_jax.run.config import ConfigDict
from distill_jax.trainer.io.teacher_cache import Plan
from distill_jax.trainer.options import LookAhead, Options

RAW_WIDTH = 4096
"""Inputs of more numbers than this are no control of embeddings."""


@dataclasses.dataclass
class Caches:
    """What is found out about an experiment once.

    Attributes:
      init: the compiled `key -> TrainState`.
      steps: the compiled steps by name.
      predict: see `programs.predict`.
      controls: the programs of controls, see `controls.Programs`.
      measured: names of the scalars that evaluators measure, by split.
      warned: whether its warnings were printed.
    """

    init: Callable | None = None
    steps: dict[str, Any] = dataclasses.field(default_factory=dict)
    predict: Callable | None = None
    controls: Any = None
    measured: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    warned: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A config as data, pure functions and shapes; the same for every seed.

    What is compiled of it and done with it are functions over it, see the modules beside this one.

    A copy by `dataclasses.replace` has empty caches.
    """

    config: ConfigDict
    mesh: Mesh
    dataset: Dataset
    data: checks.Report = dataclasses.field(default_factory=checks.Report)
    objective: Objective
    models: Mapping[Role, Model]
    evaluators: Mapping[str, Evaluator]
    shapes: state.Shapes
    tx: Any
    schedule: optax.Schedule
    outer: Outer | None
    trainable: tuple[Role, ...]
    frozen: tuple[Role, ...]
    ema: Mapping[Role, tuple[Role, steps.Decay]]
    total_steps: int
    steps_per_epoch: float
    resident: bool
    image_size: int
    trusted: Collection[str]
    cache: Plan | None = None
    notes: tuple[str, ...] = ()
    caches: Caches = dataclasses.field(init=False, repr=False, default_factory=Caches)

    def variant(self, step: int) -> str:
        """Returns which of the compiled steps is due: "outer" where the weighting learns too."""
        return "outer" if self.outer is not None and self.outer.due(step) else "inner"

    def transform(self, *, train: bool) -> Transform:
        """Returns the transforms of training or evaluation batches."""
        return make_transform(self.config, self.dataset, train=train, trusted=self.trusted)

    @property
    def variants(self) -> tuple[str, ...]:
        """The steps that training uses."""
        if self.outer is None:
            return ("inner",)
        return ("outer",) if (self.outer.every, self.outer.warmup) == (1, 0) else ("inner", "outer")

    @functools.cached_property
    def overlaps(self) -> Mapping[str, checks.Overlap]:
        """What of the other parts is in the training part, see `checks.overlaps`."""
        return checks.overlaps(self.dataset)

    @functools.cached_property
    def signature(self) -> dict[str, Any]:
        """What it takes to apply the trained networks elsewhere; JSON-like.

        `input` is the shape and type of one raw example, `networks` the model and arguments of each
        network that a checkpoint holds, `statistics` the mean and deviation of the training part
        where evaluation normalizes by them.
        """
        data = self.config.data
        one = self.dataset.train.read(np.zeros(1, np.int64))["input"]
        own = data.transform_kwargs.get("normalize", {}).get("mean") is None
        statistics = None
        if "normalize" in data.eval_transforms and own:
            statistics = [np.asarray(x).tolist() for x in checks.statistics(self.dataset.train)]
        networks = {}
        for role in (*self.trainable, *self.ema):
            name, kwargs = role_spec(self.config, role)
            networks[role] = {"model": name, "kwargs": kwargs}
        return {
            "input": jax.tree.map(lambda x: {"shape": x.shape[1:], "dtype": str(x.dtype)}, one),
            "classes": self.dataset.classes,
            "cardinalities": self.dataset.cardinalities,
            "image_size": self.image_size,
            "statistics": statistics,
            "networks": networks,
        }

    @functools.cached_property
    def init(self) -> Callable:
        """`key -> TrainState`, pure."""
        sources = {role: source for role, (source, _) in self.ema.items()}
        return state.make_init(
            self.objective,
            self.models,
            self.tx,
            self.shapes,
            trainable=self.trainable,
            ema=sources,
        )

    @functools.cached_property
    def abstract_state(self) -> Any:
        """The training state as shapes with shardings."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        return self._with_shardings(shapes, "rules")

    @functools.cached_property
    def abstract_frozen(self) -> Any:
        shapes = {r: (self.shapes.roles[r].params, self.shapes.roles[r].state) for r in self.frozen}
        return self._with_shardings(shapes, "frozen_rules")

    def _with_shardings(self, shapes: PyTree, name: str) -> PyTree:
        shardings = partition.infer(
            shapes,
            self.mesh,
            rules=rules_of(self.config, name),
            min_size=self.config.partition.min_size,
            where=f"partition.{name}",
        )
        return jax.tree.map(_with_sharding, shapes, shardings)

    def metric_names(self, variant: str = "inner") -> tuple[str, ...]:
        """Names of a step's metrics: total loss, terms, weights, and what was asked for."""
        terms = self.shapes.terms
        outer = ("outer_loss", "outer_grad_norm") if variant == "outer" else ()
        norm = ("grad_norm",) if self.config.log.grad_norm else ()
        reported = {"skip": ("skipped",), "stop": ("nonfinite",)}[self.config.watch.nonfinite]
        weights = (f"weight/{name}" for name in terms.weights)
        found = ("loss", *terms.values, *weights, *terms.metrics, *outer, *norm, *reported)
        return (*found, *collapse.names(terms.embeddings)) if self.watches else found

    @functools.cached_property
    def gathered_models(self) -> Mapping[Role, Model]:
        """The networks as steps apply them, see `partition.gathered`."""
        if self.mesh.shape["fsdp"] == 1:
            return self.models
        state, frozen = self.abstract_state, self.abstract_frozen
        held = {**state.params, **state.targets, **{r: p for r, (p, _) in frozen.items()}}
        where = jax.tree.map(lambda x: x.sharding, held)
        return {
            role: partition.gathered(model, where[role]) if role in where else model
            for role, model in self.models.items()
        }

    @functools.cached_property
    def options(self) -> Options:
        """Options of the step."""
        config, ahead = self.config, self.config.lookahead
        return Options(
            precision=config.precision,
            accum_steps=config.accum_steps,
            grad_norm=config.log.grad_norm,
            nonfinite="skip" if config.watch.nonfinite == "skip" else "report",
            watch_every=config.log.every_steps if self.watches else 0,
            lookahead=LookAhead(ahead.steps, ahead.kind, ahead.restore) if ahead.steps else None,
            mesh=self.mesh,
        )

    @property
    def watches(self) -> bool:
        """Whether steps look at the spread of embeddings."""
        return not isinstance(self.tx, bilevel.Optimizers) and not self.config.lookahead.steps

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
        return readable(self.objective, self.shapes, self.config)

    @functools.cached_property
    def parts(self) -> Mapping[str, int | None]:
        """Splits that evaluators need beside the measured one, and how many examples of each."""
        found: dict[str, int | None] = {}
        for evaluator in self.evaluators.values():
            for part, most in getattr(evaluator, "parts", {}).items():
                before = found.get(part, 0)
                found[part] = None if most is None or before is None else max(most, before)
        return found

    @functools.cached_property
    def controls(self) -> Mapping[str, Mapping[Role, tuple[str, ...]]]:
        """Outputs `{control: {role: names}}` that something else stands in for on the test split.

        Roles that are no network have no control, and inputs wider than `RAW_WIDTH` are none.
        """
        found: dict[str, dict[Role, tuple[str, ...]]] = {}
        for evaluator in self.evaluators.values():
            for control in getattr(evaluator, "controls", ()):
                for role, names in evaluator.outputs.items():
                    if role in self.shapes.roles and (control != "raw" or self._raw_fits):
                        roles = found.setdefault(control, {})
                        roles[role] = tuple(dict.fromkeys((*roles.get(role, ()), *names)))
        return found

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
        """Roles whose answers are stored before training."""
        return tuple(self.cache.outputs) if self.cache is not None else ()

    def online(self, frozen: steps.Frozen) -> steps.Frozen:
        """Returns those of the frozen networks that a step applies."""
        return {role: network for role, network in frozen.items() if role not in self.cached}


def flops_of(experiment: Experiment, compiled: Mapping[str, Any]) -> float | None:
    """Returns the floating-point operations of a step over all its devices, averaged over training.

    None where XLA does not count them.

    Args:
      experiment: what is run.
      compiled: its compiled steps by name.
    """
    outer = experiment.outer.share(experiment.total_steps) if experiment.outer else 0.0
    shares = {"outer": outer, "inner": 1 - outer}
    total = 0.0
    for variant in experiment.variants:
        step = compiled.get(variant)
        flops = (step.cost_analysis() or {}).get("flops") if step is not None else None
        if flops is None:
            return None
        total += shares[variant] * flops
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
    objective: Objective, shapes: state.Shapes, config: ConfigDict
) -> dict[str, Mapping[str, Any]]:
    """Shapes of outputs of networks, predictions of the method, and what the weighting did."""
    found: dict[str, Mapping[str, Any]] = {
        r: s.outputs for r, s in shapes.roles.items() if r in config.roles
    }
    return found | dict(shapes.predictions) | _example_weight_shapes(objective, shapes)


def _example_weight_shapes(objective: Objective, shapes: state.Shapes) -> dict[str, Any]:
    if not isinstance(objective, WeightedObjective) or objective.weighting.by_gradient:
        return {}
    b = shapes.batch["mask"].shape[0]
    weights = jax.ShapeDtypeStruct((b, len(objective.loss_terms)), jnp.float32)
    return {"example_weights": {"weights": weights, **shapes.terms.logits}}


def rules_of(config: ConfigDict, name: str) -> partition.Rules:
    """Returns the partition rules of that name."""
    return partition.read_rules(config.partition[name], where=f"partition.{name}")


def _with_sharding(x, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
