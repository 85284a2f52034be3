"""`Trainer`: combines an objective, networks and an optimizer into a state and a jitted step."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from distill_jax.core import bilevel as bilevel_lib
from distill_jax.core import partition, rng, state, steps, weighted_objective
from distill_jax.core import phases as phases_lib
from distill_jax.core.api import (
    Array,
    Batch,
    Evaluator,
    Key,
    Model,
    Nets,
    Objective,
    Outputs,
    Params,
    PyTree,
    Role,
    State,
    TrainState,
    Transform,
)
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.trainer import batches as batches_lib
from distill_jax.trainer import checks, passes
from distill_jax.trainer.options import Options
from distill_jax.trainer.passes import Measures, Wanted
from distill_jax.trainer.update import make_update

IN_FLIGHT = 8
"""Maximum number of pending steps before the host waits for the oldest. A larger number would not
increase utilization, and on CPU, collectives of many concurrent programs can block each other."""

Weights = tuple[Params, State]
"""Parameters and state of a network."""

Prepare = Callable[[Any, Array, Key], Any]
"""`(fed, step, key) -> batch`: turns the argument of a step into the batch of the update; pure."""


@struct.dataclass
class TrainerState:
    """The argument and result of `Trainer.step`.

    Attributes:
      train: the part that changes; a step donates it.
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


@dataclasses.dataclass(frozen=True, eq=False, init=False)
class Trainer:
    """Trains networks with an objective.

    Args:
      objective: the method, such as `objectives.KD()`, or a `WeightedObjective`.
      optimizer: an optax optimizer of the trained networks.
      student: network of the role "student".
      networks: other trained networks by role (projectors, predictors, a weighting network); as an
        attribute, all of them.
      frozen: networks that are not trained, by role: a `Model` with weights, such as
        `from_nnx(module)`, or `(Model, params, state)`.
      averages: `{role: (source, decay)}`, moving averages of trained networks; the decay is a
        number or a function of the step.
      transform: `(key, batch, step) -> batch`, applied to training batches inside the step.
      outer_optimizer: optimizer of the weighting networks; makes the problem bilevel.
      bilevel: computation of the outer gradient.
      options: see `Options`.

    Raises:
      ArgumentError: the networks are not those that the objective needs, arguments conflict, the
        objective is a class, or the optimizer is not an optax optimizer.

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

    objective: Objective
    optimizer: optax.GradientTransformation
    networks: Mapping[Role, Model]
    frozen: Mapping[Role, Model | tuple[Model, Params, State]]
    averages: Mapping[Role, tuple[Role, steps.Decay]]
    transform: Transform | None
    outer_optimizer: optax.GradientTransformation | None
    bilevel: bilevel_lib.Bilevel | None
    options: Options

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
        bilevel: bilevel_lib.Bilevel | None = None,
        options: Options | None = None,
    ):
        checks.check_kinds(objective, optimizer=optimizer, outer_optimizer=outer_optimizer)
        first = {} if student is None else {"student": student}
        vars(self).update(
            objective=objective,
            optimizer=optimizer,
            networks={**first, **(networks or {})},
            frozen=frozen or {},
            averages=averages or {},
            transform=transform,
            outer_optimizer=outer_optimizer,
            bilevel=bilevel,
            options=options or Options(),
        )
        checks.check_roles(objective, self.models)
        checks.check_levels(objective, outer_optimizer, bilevel, self.options.accum_steps)
        checks.check_phases(self.phases, bilevel)
        for phase in self.phases:
            steps.check_accumulation(phase.objective, self.options.accum_steps)

    # Derived from the arguments.

    @functools.cached_property
    def models(self) -> Mapping[Role, Model]:
        """All networks."""
        return checks.all_models(self.networks, self.frozen, self.averages)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.options.mesh or partition.make_mesh()

    @functools.cached_property
    def phases(self) -> tuple[phases_lib.Phase, ...]:
        """The parts of training, one for most methods."""
        length = {n: getattr(self.options, n) for n in ("total_steps", "steps_per_epoch")}
        return phases_lib.of(self.objective, **length)

    @property
    def two_levels(self) -> bool:
        """Whether the weighting has its own optimizer."""
        return self.outer_optimizer is not None

    @property
    def tx(self) -> Any:
        """The optimizer of the step: `optimizer`, or `bilevel.Optimizers`."""
        if self.outer_optimizer is None:
            return self.optimizer
        roles = tuple(r for r in weighted_objective.networks(self.objective) if r in self.networks)
        method = (self.bilevel or bilevel_lib.Bilevel()).method
        return bilevel_lib.Optimizers(self.optimizer, self.outer_optimizer, roles, method)

    # Batches.

    def _check_batch(self, batch: Batch, name: str = "batch") -> None:
        b = checks.check_batch(self.objective, batch, name)
        partition.check_batch(b, self.mesh, accum_steps=self.options.accum_steps, where=name)

    def _prepare(self, *, outer: bool = False) -> Prepare:
        """Returns the function that makes the batch of an update."""
        prepare = batches_lib.prepared_both if outer else batches_lib.prepared
        return functools.partial(prepare, mesh=self.mesh, transform=self.transform)

    # State.

    def shapes(self, batch: Batch) -> state.Shapes:
        """Returns the shapes of all networks, losses and memories on a batch; computes nothing.

        Args:
          batch: arrays or `jax.ShapeDtypeStruct`s with a leading axis b.

        Raises:
          ArgumentError: a network fails on these inputs, a loss has no value for each example, or
            phases do not fit each other.
        """
        self._check_batch(batch)
        spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), dict(batch))
        key = jax.eval_shape(jax.random.key, 0)
        prepared = jax.eval_shape(self._prepare(), spec, jnp.int32(0), key)
        called = (set(self.models) - set(self.averages)) | set(self.objective.roles)
        models = {role: model for role, model in self.models.items() if role in called}
        given = (self.objective, self.phases, models, prepared)
        return phases_lib.infer_shapes(*given, trainable=tuple(self.networks))

    def make_init(self, shapes: state.Shapes) -> Callable[[Key], TrainState]:
        """Returns the pure `key -> state before the first step`."""
        ema = {role: source for role, (source, _) in self.averages.items()}
        given = (self.objective, self.models, self.tx, shapes)
        return state.make_init(*given, trainable=tuple(self.networks), ema=ema)

    def abstract_state(self, shapes: state.Shapes) -> TrainState:
        """Returns the training state as shapes with shardings.

        Raises:
          ArgumentError: a partition rule matches nothing or does not divide its parameter.
        """
        return self._placed(jax.eval_shape(self.make_init(shapes), jax.random.key(0)))

    def abstract_frozen(self, shapes: state.Shapes) -> steps.Frozen:
        """Returns the frozen networks as shapes with shardings."""
        networks = {r: (shapes.roles[r].params, shapes.roles[r].state) for r in self.frozen}
        return self._placed(networks, "frozen_partition_rules")

    def _placed(self, tree: PyTree, rules: str = "partition_rules", *, strict: bool = True) -> Any:
        """Returns shapes with their shardings; not strict where `tree` is a part of the state."""
        shardings = partition.infer(
            tree,
            self.mesh,
            rules=dict(getattr(self.options, rules)),
            min_size=self.options.partition_min_size,
            where=rules,
            strict=strict,
        )
        return jax.tree.map(
            lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), tree, shardings
        )

    def compile_init(self, shapes: state.Shapes) -> Callable[[Key], TrainState]:
        """Compiles `key -> state before the first step`, which is created into its shardings.

        On CPU the initialisers are compiled without optimisation: they run once, and compiling
        them well takes longer than running them.
        """
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state(shapes))
        dtype, replicated = jax.random.key(0).dtype, partition.replicated(self.mesh)
        key = jax.ShapeDtypeStruct((), dtype, sharding=replicated)
        lowered = jax.jit(self.make_init(shapes), out_shardings=shardings).lower(key)
        fast: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
        return lowered.compile(compiler_options=fast if jax.default_backend() == "cpu" else None)

    def init(self, key: Key, batch: Batch) -> TrainerState:
        """Returns the state before the first step.

        Args:
          key: the root key. Parameters and all randomness of training are functions of it.
          batch: an example batch; only its shapes and types matter.

        Raises:
          ArgumentError: the key is not one typed key, or the batch does not fit, see `shapes`.
        """
        checks.check_key(key)
        shapes = self.shapes(batch)
        key = jax.device_put(key, partition.replicated(self.mesh))
        train = self.compile_init(shapes)(key)
        frozen = {}
        for role, given in self.frozen.items():
            if isinstance(given, Model):
                inputs = state.zeros(shapes.roles[role].inputs)
                weights = given.init(rng.stream(key, "init", role), *inputs)
            else:
                weights = given[1:]
            frozen[role] = jax.device_put(weights, partition.replicated(self.mesh))
        return TrainerState(train, frozen, key)

    # Steps.

    def pure_step(
        self,
        prepare: Prepare | None = None,
        *,
        outer: bool = False,
        phase: int = 0,
        names: Sequence[str] | None = None,
    ) -> Callable[[TrainState, steps.Frozen, Any, Key], tuple[TrainState, Any]]:
        """Returns the step as a pure function, for you to transform or compile.

        Args:
          prepare: `(fed, step, key) -> batch`; the default fills in missing entries of a batch and
            transforms it.
          outer: whether the weighting learns in this step. The step then takes
            `{"train": batch, "held_out": batch}`.
          phase: index in `phases`; the step needs only the frozen networks of that phase.
          names: metrics that the step returns as one array `[m]`. Each output of a compiled step
            costs the host some microseconds, which is measurable for short steps.

        Returns:
          `(train_state, frozen, fed, key) -> (train_state, metrics)`.

        Raises:
          ArgumentError: lookahead needs several batches per step, and `prepare` is not given.
        """
        ahead, objective = self.options.lookahead, self.phases[phase].objective
        if prepare is None and ahead is not None and ahead.kind == "wide":
            raise ArgumentError("a step takes one batch, and wide lookahead needs several")
        prepare = prepare or self._prepare(outer=outer)

        def step(train: TrainState, frozen: steps.Frozen, fed: Any, key: Key):
            update = make_update(
                objective,
                self.gathered(train, frozen),
                self.tx,
                self.options,
                averages=self.averages,
                two_level=self.bilevel,
                outer=outer,
            )
            train, metrics = update(train, frozen, prepare(fed, train.step, key), key)
            return train, metrics if names is None else jnp.stack([metrics[n] for n in names])

        return step

    def gathered(self, train: TrainState, frozen: steps.Frozen) -> Mapping[Role, Model]:
        """Returns the networks as they are applied under `jit`, see `partition.gathered`."""
        if self.mesh.shape["fsdp"] == 1:
            return self.models
        learned = self._placed(train, strict=False)
        still = self._placed(frozen, "frozen_partition_rules", strict=False)
        held = {**learned.params, **learned.targets, **{r: p for r, (p, _) in still.items()}}
        where = jax.tree.map(lambda x: x.sharding, held)
        return {
            role: partition.gathered(model, where[role]) if role in where else model
            for role, model in self.models.items()
        }

    @functools.cached_property
    def _in_flight(self) -> collections.deque[Array]:
        return collections.deque()

    @functools.cached_property
    def _jitted(self) -> Mapping[tuple[int, bool], Callable]:
        return {
            (phase, outer): jax.jit(self.pure_step(outer=outer, phase=phase), donate_argnums=0)
            for phase in range(len(self.phases))
            for outer in ((False, True) if self.two_levels else (False,))
        }

    @functools.cached_property
    def _clock(self) -> phases_lib.Clock:
        return phases_lib.Clock(self.phases)

    def step(
        self, state: TrainerState, batch: Batch, *, held_out: Batch | None = None
    ) -> tuple[TrainerState, Mapping[str, Array]]:
        """Takes one training step.

        Args:
          state: from `init` or the previous step; its arrays are donated, so do not use it again.
          batch: `input` `[b, ...]` and, if the objective reads it, `label` `[b]`. Missing
            `mask`, `index` and `epoch` are filled in.
          held_out: in bilevel training, a batch from which the weighting learns. Without it the
            step does not change the weighting.

        Returns:
          The new state, and scalar metrics: `loss`, the mean of each loss term of the phase, and
          the metrics that the options turn on.

        Raises:
          ArgumentError: the batch does not fit the networks, the mesh or the objective.
        """
        self._check_batch(batch)
        fed: Any = dict(batch)
        if held_out is not None:
            if not self.two_levels:
                raise ArgumentError("held_out needs an outer_optimizer")
            self._check_batch(held_out, "held_out")
            fed = {"train": fed, "held_out": dict(held_out)}
        phase = self._clock.phase(state.train.step)
        frozen = phases_lib.used(self.phases, phase, state.frozen)
        # Losses that work device by device find their mesh in the context of the trace.
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            train, metrics = self._jitted[phase, held_out is not None](
                state.train, frozen, fed, state.key
            )
        self._clock.advance(train.step)
        self._in_flight.append(metrics["loss"])
        if len(self._in_flight) > IN_FLIGHT:
            self._in_flight.popleft().block_until_ready()
        return TrainerState(train, state.frozen, state.key), metrics

    # What comes out.

    def network(self, state: TrainerState, role: Role) -> Weights:
        """Returns `(params, state)` of a network.

        Raises:
          ArgumentError: there is no such role.
        """
        if role in self.frozen:
            return state.frozen[role]
        params = {**state.train.params, **state.train.targets}
        if role not in params:
            raise ArgumentError(f"no network {role!r}", hint=nearest(role, self.models))
        return params[role], state.train.model_state[role]

    def student(self, state: TrainerState) -> Weights:
        """Returns `(params, state)` of the student."""
        return self.network(state, "student")

    def bind(
        self,
        train: TrainState,
        frozen: steps.Frozen,
        key: Key | None = None,
        batch: Batch | None = None,
    ) -> Nets:
        """Returns all networks at a state, under `jit`.

        A key is needed only for random numbers, the batch that they are called on for sampling.
        """
        key = jax.random.key(0) if key is None else key
        models, precision = self.gathered(train, frozen), self.options.precision
        return steps.bind_networks(models, train, frozen, key=key, precision=precision, batch=batch)

    def outputs(
        self,
        train: TrainState,
        frozen: steps.Frozen,
        batch: Batch,
        wanted: Wanted,
        measures: Measures = (),
    ) -> Mapping[str, Outputs]:
        """Returns `{name: {output: [b, ...]}}` in evaluation mode; pure.

        Frozen networks are called with `teacher_input` where the batch has it.

        Args:
          train: state of the training.
          frozen: the frozen networks.
          batch: after its transforms.
          wanted: names of outputs, by network or by name among the predictions of the objective.
            The weights of a weighting have the name "example_weights".
          measures: evaluators whose `measure` is called; its results get the evaluator's name.
        """
        nets, outputs_by_role = self.bind(train, frozen, batch=batch), {}
        for name, outputs in wanted:
            if name in self.models:
                view = steps.teacher_view(batch) if name in self.frozen else batch["input"]
                made, _ = nets(name, view)
            elif name == "example_weights" and isinstance(self.objective, WeightedObjective):
                made = self.objective.example_weights(nets, batch, train.memory, train.step)
            else:
                predict = self.objective.predictions
                made = predict(nets, batch, train.memory, train.step)[name]
            outputs_by_role[name] = {output: made[output] for output in outputs or made}
        taken = {*self.models, *outputs_by_role}
        return outputs_by_role | passes.measured(measures, nets, batch, train.step, taken=taken)

    @functools.cached_property
    def _predict(self) -> Callable:
        return jax.jit(self.outputs, static_argnames=("wanted", "measures"))

    def predict(
        self, state: TrainerState, inputs: PyTree, *, role: Role = "student"
    ) -> Mapping[str, Array]:
        """Returns the outputs of a network in evaluation mode, `{name: [b, ...]}`."""
        wanted = ((role, None),)
        return self._predict(state.train, state.frozen, {"input": inputs}, wanted=wanted)[role]

    def evaluate(
        self,
        state: TrainerState,
        batches: Iterable[Batch],
        evaluators: Mapping[str, Evaluator],
    ) -> dict[str, Any]:
        """Returns the metrics of evaluators over batches by name, scalars and arrays.

        Args:
          state: the state to evaluate.
          batches: `input` and the arrays that evaluators read (`label`), with a leading axis b.
          evaluators: evaluators by name; they may read only outputs of networks, and what they
            `measure`. Those that do are hashable, as frozen dataclasses are.
        """
        wanted, measures = passes.wanted_by(evaluators), passes.measuring(evaluators)
        whole = bool(measures) or any(name not in self.models for name, _ in wanted)

        def outputs(batch: Batch) -> Mapping[str, Outputs]:
            inputs = {name: batch[name] for name in ("input", "teacher_input") if name in batch}
            seen = batch if whole else inputs
            return self._predict(state.train, state.frozen, seen, wanted=wanted, measures=measures)

        collected, info = passes.dataset_pass(outputs, passes.filled(batches))
        return {k: x for e in evaluators.values() for k, x in e(collected, info).items()}
