"""`Trainer`: an objective, its networks and an optimizer as an initial state and a jitted step."""

import collections
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from distill_jax.core import bilevel, partition, rng, state, steps, weighted_objective
from distill_jax.core.api import (
    Array,
    Batch,
    Evaluator,
    Key,
    Model,
    Objective,
    Params,
    PyTree,
    Role,
    State,
    TrainState,
    Transform,
)
from distill_jax.core.errors import ConfigError, nearest
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.trainer.options import Options
from distill_jax.trainer.passes import dataset_pass
from distill_jax.trainer.update import make_update

IN_FLIGHT = 8
"""After this many steps the host waits for the first of them. More would not keep the device any
busier, and on CPU collectives of many programs at once can wait for each other."""

Weights = tuple[Params, State]
"""Parameters and state of a network."""


@struct.dataclass
class TrainerState:
    """What a step takes and returns.

    Attributes:
      train: everything that changes; a step donates it.
      frozen: `{role: (params, state)}` of the networks that are not trained.
      key: the root key; every key of a step is a function of it, a purpose and the step.
    """

    train: TrainState
    frozen: Mapping[Role, Weights]
    key: Key

    @property
    def step(self) -> Array:
        """Number of finished steps, an int32 scalar."""
        return self.train.step


class Trainer:
    """Trains networks by an objective.

    Args:
      objective: the method, such as `objectives.KD()`, or a `WeightedObjective`.
      optimizer: an optax optimizer of the trained networks.
      student: network of the role "student".
      networks: other trained networks by role (projectors, predictors, a weighting network).
      frozen: networks that are not trained, by role: a `Model` that brings its weights along, such
        as `from_nnx(module)`, or `(Model, params, state)`.
      averages: `{role: (source, decay)}`, moving averages of trained networks; the decay is a
        number or a function of the step.
      transform: `(key, batch, step) -> batch`, applied to training batches inside the step.
      outer_optimizer: optimizer of the weighting networks; makes the problem bilevel.
      bilevel: how the outer gradient is taken.
      options: see `Options`.

    Raises:
      ConfigError: the objective needs a network that is not given, or the other way round.

    The example below trains one step of knowledge distillation::

      trainer = Trainer(
          objectives.KD(temperature=4.0),
          student=from_nnx(net),
          frozen={"teacher": from_nnx(teacher)},
          optimizer=optax.adamw(1e-3),
      )
      state = trainer.init(jax.random.key(0), batch)
      state, metrics = trainer.step(state, batch)
    """

    def __init__(
        self,
        objective: Objective,
        *,
        optimizer: optax.GradientTransformation,
        student: Model | None = None,
        networks: Mapping[Role, Model] | None = None,
        frozen: Mapping[Role, Model | tuple[Model, Params, State]] | None = None,
        averages: Mapping[Role, tuple[Role, steps.Decay]] | None = None,
        transform: Transform | None = None,
        outer_optimizer: optax.GradientTransformation | None = None,
        bilevel: bilevel.Bilevel | None = None,
        options: Options | None = None,
    ):
        self.objective = objective
        self.options = options or Options()
        self.mesh = self.options.mesh or partition.make_mesh()
        self.averages = dict(averages or {})
        self.transform = transform
        trained = {**({"student": student} if student is not None else {}), **(networks or {})}
        self._weights: dict[Role, Weights] = {}
        still: dict[Role, Model] = {}
        for role, given in (frozen or {}).items():
            if isinstance(given, Model):
                still[role] = given
            else:
                still[role], *weights = given
                self._weights[role] = tuple(weights)  # pyright: ignore[reportArgumentType]
        for role, (source, _) in self.averages.items():
            if source not in trained:
                raise ConfigError(
                    f"averages[{role!r}] follows {source!r}, which is not a trained network",
                    hint=nearest(source, trained),
                )
        followers = {role: trained[source] for role, (source, _) in self.averages.items()}
        groups = {"trained": trained, "frozen": still, "averages": followers}
        self.models: dict[Role, Model] = {}
        for name, group in groups.items():
            for role, model in group.items():
                if role in self.models:
                    raise ConfigError(f"the network {role!r} is given twice", where=name)
                if not isinstance(model, Model):
                    raise ConfigError(
                        f"the network {role!r} is a {type(model).__name__}",
                        where=name,
                        hint="wrap it: from_nnx(module) or from_linen(module)",
                    )
                self.models[role] = model
        self.trained, self.frozen = tuple(trained), tuple(still)
        for role in objective.roles:
            if role not in self.models:
                raise ConfigError(
                    f"{type(objective).__name__} needs a network {role!r}",
                    hint=f"it needs {', '.join(objective.roles)}; given: {', '.join(self.models)}",
                )
        self.bilevel = bilevel
        self.optimizer: Any = optimizer
        if outer_optimizer is not None:
            self.optimizer = self._two_levels(optimizer, outer_optimizer)
        elif bilevel is not None:
            raise ConfigError("bilevel needs an outer_optimizer")
        if self.options.lookahead is not None and self.options.lookahead.kind == "wide":
            raise ConfigError("a step takes one batch, and wide look-ahead takes several")
        steps.check_accumulation(objective, self.options.accum_steps)
        self._in_flight: collections.deque[Array] = collections.deque()

    def _two_levels(self, inner: Any, outer: Any) -> Any:
        if not isinstance(self.objective, WeightedObjective):
            raise ConfigError("outer_optimizer needs a WeightedObjective")
        if self.options.accum_steps > 1:
            raise ConfigError("accum_steps is 1 where the weighting is learned")
        roles = tuple(r for r in weighted_objective.networks(self.objective) if r in self.trained)
        self.bilevel = self.bilevel or bilevel.Bilevel()
        return bilevel.Optimizers(inner, outer, roles)

    # Batches.

    @property
    def _reads_index(self) -> bool:
        """Whether the objective keeps a value of each training example."""
        objective: Any = self.objective
        while isinstance(objective, WeightedObjective):
            objective = objective.objective
        return hasattr(objective, "num_examples")

    def _check_batch(self, batch: Batch, name: str = "batch") -> int:
        if not isinstance(batch, Mapping) or "input" not in batch:
            given = ", ".join(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ConfigError(f"{name} has no 'input', but {given or 'nothing'}")
        sizes = {len(x) for x in jax.tree.leaves(dict(batch))}
        if len(sizes) != 1:
            shapes = {k: jax.tree.map(lambda x: x.shape, v) for k, v in batch.items()}
            raise ConfigError(f"the arrays of {name} differ in length: {shapes}")
        if "index" not in batch and self._reads_index:
            raise ConfigError(
                f"{name} has no 'index'",
                hint=f"{type(self.objective).__name__} keeps a value of each training example: "
                "give its position in the training set, int32 [b]",
            )
        b = sizes.pop()
        partition.check_batch(b, self.mesh, accum_steps=self.options.accum_steps, where=name)
        return b

    def _filled(self, batch: Batch, step: Array) -> Batch:
        """Adds `mask`, `index` and `epoch` where they are missing; every example is then new."""
        b = len(jax.tree.leaves(batch["input"])[0])
        return {
            "mask": jnp.ones(b, jnp.float32),
            "index": step * b + jnp.arange(b, dtype=jnp.int32),
            "epoch": jnp.zeros(b, jnp.int32),
            **batch,
        }

    def _prepared(self, batch: Batch, step: Array, key: Key) -> Batch:
        split = jax.lax.with_sharding_constraint(dict(batch), partition.over_batch(self.mesh))
        batch = self._filled(split, step)
        if self.transform is not None:
            batch = self.transform(rng.stream(key, "transform"), batch, step)
        return batch

    # State.

    def shapes(self, batch: Batch) -> state.Shapes:
        """Returns the shapes of all networks, losses and memories on a batch; computes nothing.

        Args:
          batch: arrays or `jax.ShapeDtypeStruct`s with a leading axis b.

        Raises:
          ConfigError: a network fails on these inputs, or a loss has no value for each example.
        """
        self._check_batch(batch)
        spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), dict(batch))
        key = jax.eval_shape(jax.random.key, 0)
        prepared = jax.eval_shape(self._prepared, spec, jnp.int32(0), key)
        called = (set(self.models) - set(self.averages)) | set(self.objective.roles)
        models = {role: model for role, model in self.models.items() if role in called}
        return state.infer_shapes(self.objective, models, prepared)

    def init(self, key: Key, batch: Batch) -> TrainerState:
        """Returns the state before the first step.

        Args:
          key: the root key. Parameters and all randomness of training are functions of it.
          batch: an example of a batch; its shapes and types alone matter.
        """
        shapes = self.shapes(batch)
        init = state.make_init(
            self.objective,
            self.models,
            self.optimizer,
            shapes,
            trainable=self.trained,
            ema={role: source for role, (source, _) in self.averages.items()},
        )
        shardings = self._shardings(jax.eval_shape(init, key))
        train = jax.jit(init, out_shardings=shardings)(key)
        frozen = {}
        for role in self.frozen:
            weights = self._weights.get(role)
            if weights is None:
                inputs = state.zeros(shapes.roles[role].inputs)
                weights = self.models[role].init(rng.stream(key, "init", role), *inputs)
            frozen[role] = jax.device_put(weights, partition.replicated(self.mesh))
        return TrainerState(train, frozen, jax.device_put(key, partition.replicated(self.mesh)))

    def _shardings(self, shapes: PyTree) -> PyTree:
        return partition.infer(
            shapes,
            self.mesh,
            rules=dict(self.options.partition_rules),
            min_size=self.options.partition_min_size,
            where="partition_rules",
        )

    # Steps.

    def pure_step(self, *, outer: bool = False) -> steps.StepFn:
        """Returns the step as a pure function, to be transformed or compiled by the caller.

        Args:
          outer: whether the weighting learns in this step, which then takes
            `{"train": batch, "held_out": batch}`.

        Returns:
          `(train_state, frozen, batch, key) -> (train_state, metrics)`.
        """
        update = make_update(
            self.objective,
            self.models,
            self.optimizer,
            self.options,
            averages=self.averages,
            two_level=self.bilevel,
            outer=outer,
        )

        def step(train: TrainState, frozen: steps.Frozen, batch: Batch, key: Key):
            if outer:
                held = jax.lax.with_sharding_constraint(
                    dict(batch["held_out"]), partition.over_batch(self.mesh)
                )
                prepared = {
                    "train": self._prepared(batch["train"], train.step, key),
                    "held_out": self._filled(held, train.step),
                }
            else:
                prepared = self._prepared(batch, train.step, key)
            return update(train, frozen, prepared, key)

        return step

    @functools.cached_property
    def _jitted(self) -> Mapping[bool, Callable]:
        return {
            outer: jax.jit(self.pure_step(outer=outer), donate_argnums=0)
            for outer in ((False, True) if self.bilevel else (False,))
        }

    def step(
        self, state: TrainerState, batch: Batch, *, held_out: Batch | None = None
    ) -> tuple[TrainerState, Mapping[str, Array]]:
        """Takes one training step.

        Args:
          state: from `init` or the step before; its arrays are donated and must not be used again.
          batch: `input` `[b, ...]` and, where the objective reads it, `label` `[b]`. Missing
            `mask`, `index` and `epoch` are filled in.
          held_out: a batch from which the weighting learns, in bilevel training; without it the
            step leaves the weighting as it is.

        Returns:
          The new state, and scalar metrics: `loss`, the mean of each loss term, and more where the
          options ask for it.

        Raises:
          ConfigError: the batch does not fit the networks, the mesh or the objective.
        """
        self._check_batch(batch)
        fed: Any = dict(batch)
        if held_out is not None:
            if not self.bilevel:
                raise ConfigError("held_out needs an outer_optimizer")
            self._check_batch(held_out, "held_out")
            fed = {"train": fed, "held_out": dict(held_out)}
        # Losses that work device by device find their mesh in the context of the trace.
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            train, metrics = self._jitted[held_out is not None](
                state.train, state.frozen, fed, state.key
            )
        self._in_flight.append(metrics["loss"])
        if len(self._in_flight) > IN_FLIGHT:
            self._in_flight.popleft().block_until_ready()
        return TrainerState(train, state.frozen, state.key), metrics

    # What comes out.

    def network(self, state: TrainerState, role: Role) -> Weights:
        """Returns `(params, state)` of a network.

        Raises:
          ConfigError: there is no such role.
        """
        if role in self.frozen:
            return state.frozen[role]
        params = {**state.train.params, **state.train.targets}
        if role not in params:
            raise ConfigError(f"no network {role!r}", hint=nearest(role, self.models))
        return params[role], state.train.model_state[role]

    def student(self, state: TrainerState) -> Weights:
        """Returns `(params, state)` of the student."""
        return self.network(state, "student")

    @functools.cached_property
    def _predict(self) -> Callable:
        def run(train, frozen, inputs, role, names):
            nets = steps.bind_networks(
                self.models,
                train,
                frozen,
                key=jax.random.key(0),
                precision=self.options.precision,
            )
            outputs, _ = nets(role, inputs)
            return {name: outputs[name] for name in names or outputs}

        return jax.jit(run, static_argnames=("role", "names"))

    def predict(
        self, state: TrainerState, inputs: PyTree, *, role: Role = "student"
    ) -> Mapping[str, Array]:
        """Returns the outputs of a network in evaluation mode, `{name: [b, ...]}`."""
        return self._predict(state.train, state.frozen, inputs, role=role, names=None)

    def evaluate(
        self,
        state: TrainerState,
        batches: Iterable[Batch],
        evaluators: Mapping[str, Evaluator],
    ) -> dict[str, Any]:
        """Returns the metrics of evaluators over batches.

        Args:
          state: the state to evaluate.
          batches: `input` and whatever the evaluators read (`label`), with a leading axis b.
          evaluators: by name; they read outputs of networks alone.

        Returns:
          `{metric: value}`, scalars and arrays.
        """
        wanted: dict[Role, tuple[str, ...]] = {}
        for evaluator in evaluators.values():
            for role, names in evaluator.outputs.items():
                wanted[role] = tuple(dict.fromkeys((*wanted.get(role, ()), *names)))

        def outputs(batch: Batch) -> Mapping[Role, Mapping[str, Array]]:
            return {
                role: self._predict(
                    state.train, state.frozen, batch["input"], role=role, names=names
                )
                for role, names in wanted.items()
            }

        start = 0

        def filled() -> Iterable[Batch]:
            nonlocal start
            for batch in batches:
                b = len(jax.tree.leaves(batch["input"])[0])
                index = np.arange(start, start + b, dtype=np.int32)
                start += b
                yield {"mask": np.ones(b, np.float32), "index": index, **batch}

        collected, info = dataset_pass(outputs, filled())
        metrics: dict[str, Any] = {}
        for evaluator in evaluators.values():
            metrics |= evaluator(collected, info)
        return metrics
