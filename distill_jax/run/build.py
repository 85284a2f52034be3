"""The composition root: from a config to everything a run needs. Alone in knowing all packages."""

import dataclasses
import functools
import math
import sys
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from distill_jax.core import (
    bilevel,
    collapse,
    lookahead,
    optim,
    partition,
    rng,
    state,
    steps,
    structure,
    weighing,
)
from distill_jax.core.api import (
    Batch,
    Dataset,
    Evaluator,
    Key,
    Model,
    Objective,
    Params,
    PyTree,
    Role,
    Source,
    State,
    Transform,
)
from distill_jax.core.errors import ConfigError, explained, nearest
from distill_jax.core.lanes import LANE
from distill_jax.core.precision import cast
from distill_jax.core.weighing import Weighed
from distill_jax.data import checks, corruption, loader, transforms
from distill_jax.data.source import Subset, example_ids
from distill_jax.evaluators._features import spread
from distill_jax.models import adapters
from distill_jax.run import checkpoint, crash, paths, processes, teacher_cache, watch
from distill_jax.run import config as config_lib
from distill_jax.run.config import ConfigDict
from distill_jax.run.resolve import bind, names_in, resolve
from distill_jax.trainer.options import LookAhead, Options
from distill_jax.trainer.passes import dataset_pass
from distill_jax.trainer.update import make_update

RAW_WIDTH = 4096
"""Inputs of more numbers than this are no control of embeddings."""

STATISTICS_BATCHES, STATISTICS_SIZE = 32, 256
"""So many batches, of so many examples, at most give the batch statistics of untrained networks."""

IMAGE_FILES = ("image_folder", "imagefolder", "images", "folder", "imagenet")
"""Names that other libraries have for folders of image files."""

RESIDENT_BYTES = 2**30
"""Training sets up to this size live on the device where `data.resident` is "auto"."""


@dataclasses.dataclass
class Caches:
    """What is found out about an experiment once.

    Attributes:
      init: the compiled `key -> TrainState`.
      steps: the compiled steps by name.
      measured: names of the scalars that evaluators measure, by split.
      warned: whether its warnings were printed.
    """

    init: Callable | None = None
    steps: dict[str, Any] = dataclasses.field(default_factory=dict)
    measured: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    warned: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A config turned into pure functions, shapes and data; the same for every seed.

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
    outer: "Outer | None"
    trainable: tuple[Role, ...]
    frozen: tuple[Role, ...]
    ema: Mapping[Role, tuple[Role, steps.Decay]]
    total_steps: int
    steps_per_epoch: float
    resident: bool
    image_size: int
    trusted: Collection[str]
    cache: teacher_cache.Plan | None = None
    notes: tuple[str, ...] = ()
    caches: Caches = dataclasses.field(init=False, repr=False, default_factory=Caches)

    def variant(self, step: int) -> str:
        """Returns which of the compiled steps is due: "outer" where the weigher learns too."""
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
            name, kwargs = _role_spec(self.config, role)
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
            rules=_rules(self.config, name),
            min_size=self.config.partition.min_size,
            where=f"partition.{name}",
        )
        return jax.tree.map(_with_sharding, shapes, shardings)

    def metric_names(self, variant: str = "inner") -> tuple[str, ...]:
        """Names of a step's metrics: total loss, terms, weights, and what was asked for."""
        terms = self.shapes.terms
        outer = ("outer_loss", "outer_grad_norm") if variant == "outer" else ()
        norm = ("grad_norm",) if self.config.log.grad_norm else ()
        told = {"skip": ("skipped",), "stop": ("nonfinite",)}[self.config.watch.nonfinite]
        weights = (f"weight/{name}" for name in terms.weights)
        found = ("loss", *terms.values, *weights, *terms.facts, *outer, *norm, *told)
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
            nonfinite="skip" if config.watch.nonfinite == "skip" else "tell",
            watch_every=config.log.every_steps if self.watches else 0,
            lookahead=LookAhead(ahead.steps, ahead.kind, ahead.restore) if ahead.steps else None,
            mesh=self.mesh,
        )

    @property
    def watches(self) -> bool:
        """Whether steps look at the spread of embeddings."""
        return not isinstance(self.tx, bilevel.Optimizers) and not self.config.lookahead.steps

    def step(self, variant: str = "inner") -> Callable:
        """Returns the jitted step `(state, frozen, fed, key) -> (state, metrics)`.

        It donates the state. The metrics are one array `[m]` in the order of `metric_names`: each
        output of a step costs the host some microseconds, which shows where steps are short.
        """
        config, outer = self.config, self.outer
        update = make_update(
            self.objective,
            self.gathered_models,
            self.tx,
            self.options,
            averages=self.ema,
            two_level=outer.options if outer else None,
            outer=variant == "outer",
        )
        ahead = config.lookahead
        wide = ahead.steps if ahead.kind == "wide" else 0
        names = self.metric_names(variant)
        train, evaluation = self.transform(train=True), self.transform(train=False)
        over_batch = partition.over_batch(self.mesh)

        def batch_of(fed, step, batch_size, transform, key):
            if self.resident:
                data, window = fed
                fed = loader.fetch_resident(data, window, step, batch_size=batch_size)
            batch = jax.lax.with_sharding_constraint(fed, over_batch)
            answers = batch.pop("answers", None)
            batch = transform(key, batch, step)
            if answers is not None:
                assert self.cache is not None
                batch = {**batch, "answers": self.cache.decode(answers)}
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

        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        return jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(shardings, partition.replicated(self.mesh)),
        )

    @functools.cached_property
    def is_finite(self) -> Callable:
        """The jitted `params -> bool`: whether no parameter is NaN or infinite."""
        leaves_finite = lambda params: [jnp.isfinite(x).all() for x in jax.tree.leaves(params)]  # noqa: E731
        replicated = partition.replicated(self.mesh)
        return jax.jit(lambda p: jnp.stack(leaves_finite(p)).all(), out_shardings=replicated)

    def compile_step(self, fed: PyTree, variant: str = "inner") -> Callable:
        """Compiles a step once for all seeds; any other shapes or shardings then raise."""
        if variant not in self.caches.steps:
            key = jax.ShapeDtypeStruct(
                (), jax.random.key(0).dtype, sharding=partition.replicated(self.mesh)
            )
            step = self.step(variant)
            frozen = self.online(self.abstract_frozen)
            # Losses that work device by device find their mesh in the context of the trace.
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                lowered = step.lower(self.abstract_state, frozen, fed, key)
            self.caches.steps[variant] = lowered.compile()
        return self.caches.steps[variant]

    @property
    def devices(self) -> int:
        """Devices among which the work of a step of one run is divided."""
        return self.mesh.size // self.mesh.shape.get(LANE, 1)

    @property
    def flops_per_step(self) -> float | None:
        """See `flops_of`; of the steps that `compile_step` has compiled."""
        return flops_of(self, self.caches.steps)

    @functools.cached_property
    def outputs(self) -> Mapping[str, Mapping[str, Any]]:
        """Shapes of what evaluators may read: see `_readable`."""
        return _readable(self.objective, self.shapes, self.config)

    @functools.cached_property
    def predict(self) -> Callable:
        """The jitted `(state, frozen, batch) -> {role: {name: [b, ...]}}` of the evaluators."""
        wanted: dict[Role, tuple[str, ...]] = {}
        for evaluator in self.evaluators.values():
            for role, names in evaluator.outputs.items():
                wanted[role] = tuple(dict.fromkeys((*wanted.get(role, ()), *names)))
        objective = self.objective
        derived: dict[str, Callable] = {
            name: lambda *args, name=name: objective.predictions(*args)[name]
            for name in self.shapes.predictions
        }
        if isinstance(objective, Weighed):
            derived["trust"] = objective.trust
        predict = steps.make_predict(
            self.gathered_models, wanted, precision=self.config.precision, derived=derived
        )

        def run(state, frozen, batch):
            return predict(state, frozen, self._evaluation_batch(batch, state.step))

        return jax.jit(run, out_shardings=partition.replicated(self.mesh))

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
        batch = jax.eval_shape(self._evaluation_transform, one)
        return jax.eval_shape(self._raw, batch["input"]).shape[1] <= RAW_WIDTH

    def _evaluation_transform(self, batch: Batch, step: Any = 0) -> Batch:
        transform = self.transform(train=False)
        return transform(rng.stream(jax.random.key(0), "transform"), batch, jnp.int32(step))

    def _evaluation_batch(self, batch: Batch, step: Any) -> Batch:
        """Transforms a batch `[b, ...]` of the host, which without constraint each device would
        compute whole."""
        split = jax.lax.with_sharding_constraint(batch, partition.over_batch(self.mesh))
        return self._evaluation_transform(split, step)

    def _raw(self, inputs: Any) -> jax.Array:
        """Returns the input of a network as numbers `[b, d]`; categories become indicators."""
        if not isinstance(inputs, Mapping):
            return inputs.reshape(len(inputs), -1).astype(jnp.float32)
        parts = [
            jax.nn.one_hot(inputs["categorical"][:, j], count)
            for j, count in enumerate(self.dataset.cardinalities)
        ]
        parts += [x.reshape(len(x), -1) for name, x in inputs.items() if name != "categorical"]
        return jnp.concatenate([x.astype(jnp.float32) for x in parts], axis=1)

    def untrained(self, key: Key) -> Mapping[Role, tuple[Params, State]]:
        """Returns `{role: (params, state)}` of networks before training, warm start or checkpoint,
        where they are a control.

        Batch statistics are those of training batches as evaluators see them: those that they
        start from, 0 and 1, are of no data, and make a weaker control. Like `predict_controls` it
        runs on one device of each process.

        Args:
          key: the root key of the run.
        """
        networks = self._initial_networks(key)
        params, first = ({role: n[i] for role, n in networks.items()} for i in (0, 1))
        if not jax.tree.leaves(first):
            return networks
        source = self.dataset.train
        # Not of the size of evaluation batches, which is to change no result.
        size = min(self.config.batch_size, STATISTICS_SIZE, len(source))
        count = min(len(source) // size, STATISTICS_BATCHES)
        # No padding, which would count; every batch is from all over the data, which may be sorted.
        rows = spread(len(source), count * size).reshape(size, count).T.reshape(-1)
        last, other = first, state.shifted_averages(first)
        for batch in loader.eval_batches(Subset(source, rows, "some of it"), batch_size=size):
            watch.alive()
            last, other = self._pass_batch(params, (last, other), batch)
        found = jax.tree.map(state.settled_average, first, last, other)
        return {role: (params[role], found[role]) for role in networks}

    @functools.cached_property
    def _initial_networks(self) -> Callable:
        """The jitted `key -> {role: (params, state)}`."""
        roles = self.controls.get("initial", {})

        def init(key):
            found = {}
            for role in roles:
                source = self.ema[role][0] if role in self.ema else role
                inputs = state.zeros(self.shapes.roles[source].inputs)
                found[role] = self.models[role].init(rng.stream(key, "init", source), *inputs)
            return found

        return jax.jit(init)

    def _bound(self, params: Mapping[Role, Params], model_state: Mapping[Role, State]):
        """Networks at these parameters and states, whose randomness no result depends on."""
        key, precision = jax.random.key(0), self.config.precision
        return steps.BoundNets(self.models, params, model_state, key=key, precision=precision)

    @functools.cached_property
    def _pass_batch(self) -> Callable:
        """The jitted `(params, states, batch) -> states` of `untrained`, in training mode.

        Outputs do not depend on the states, so that XLA computes them once for all of these.
        """

        def run(params, states, batch):
            batch = self._evaluation_transform(batch)
            networks = [self._bound(params, model_state) for model_state in states]
            return tuple(
                {r: nets(r, batch["input"], train=True)[1] for r in params} for nets in networks
            )

        return jax.jit(run)

    @functools.cached_property
    def predict_controls(self) -> Callable:
        """The jitted `(networks, batch) -> {control: {role: {name: [b, ...]}}}`.

        It takes what `untrained` gives, and runs on one device.
        """

        def run(networks, batch):
            batch = self._evaluation_transform(batch)
            params, model_state = ({r: n[i] for r, n in networks.items()} for i in (0, 1))
            nets = self._bound(params, model_state)
            found: dict[str, dict[Role, dict[str, Any]]] = {}
            for control, roles in self.controls.items():
                for role, names in roles.items():
                    if control == "raw":
                        outputs = dict.fromkeys(names, self._raw(batch["input"]))
                    else:
                        outputs = nets(role, batch["input"])[0]
                    roles = found.setdefault(control, {})
                    roles[role] = {name: outputs[name] for name in names}
            return found

        return jax.jit(run)

    @property
    def eval_batch_size(self) -> int:
        """The configured size, at most that of the data, rounded up to split evenly; padding rows
        do not count."""
        parts = (self.dataset.train, self.dataset.held_out, self.dataset.test)
        size = min(self.config.eval.batch_size, max(map(len, parts)))
        shards = partition.batch_shards(self.mesh)
        return -(-size // shards) * shards

    def initial_state(self, key, config: ConfigDict) -> Any:
        """Creates the state straight into its shardings, then loads warm starts.

        On CPU the initialisers are compiled without optimisation: they run once, and compiling
        them well takes longer than running them.

        Args:
          key: the root key of the run.
          config: the config of the run, which names the networks to start from.
        """
        if self.caches.init is None:
            shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state)
            lowered = jax.jit(self.init, out_shardings=shardings).lower(key)
            fast: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
            options = fast if jax.default_backend() == "cpu" else None
            self.caches.init = lowered.compile(compiler_options=options)
        new = self.caches.init(key)
        for role in self.trainable:
            if config.roles[role].init:
                params, model_state = self._read(
                    config, role, new.params[role], new.model_state[role]
                )
                new = new.replace(
                    params={**new.params, role: params},
                    model_state={**new.model_state, role: model_state},
                )
                for target, (source, _) in self.ema.items():
                    if source == role:
                        copies = jax.tree.map(jnp.copy, (params, model_state))
                        new = new.replace(
                            targets={**new.targets, target: copies[0]},
                            model_state={**new.model_state, target: copies[1]},
                        )
        return new

    def with_class_means(self, state: Any, frozen: steps.Frozen) -> Any:
        """Fills the class-mean table, where the weigher needs one, from the training part alone."""
        if not isinstance(self.objective, Weighed) or "class_means" not in state.memory:
            return state
        objective, frozen = self.objective, self.on_device(frozen)

        def sums(state, frozen, batch):
            batch = self._evaluation_batch(batch, state.step)
            nets = steps.bind_networks(
                self.models, state, frozen, key=jax.random.key(0), precision=self.config.precision
            )
            return objective.class_sums(nets, batch, state.memory)

        run = jax.jit(sums, out_shardings=partition.replicated(self.mesh))
        batches = loader.eval_batches(self.dataset.train, batch_size=self.eval_batch_size)
        parts = []
        for batch in batches:
            watch.alive()
            processes.stop_if_asked("before the class means were known")
            parts.append(jax.device_get(run(state, frozen, batch)))
        total = jax.tree.map(lambda *x: np.sum(np.stack(x, dtype=np.float64), axis=0), *parts)
        old = state.memory["class_means"]
        means = weighing.class_means(*jax.tree.map(jnp.asarray, jax.tree.map(np.float32, total)))
        table = jax.device_put(np.asarray(means, old.dtype), old.sharding)
        return state.replace(memory={**state.memory, "class_means": table})

    def with_survey(self, state: Any, frozen: steps.Frozen, seed: int) -> Any:
        """Lets an objective that surveys the training part do so, and stores what it learned."""
        objective = self.objective
        if not objective.surveys:
            return state
        frozen = self.on_device(frozen)

        def ask(state, frozen, batch):
            batch = self._evaluation_batch(batch, state.step)
            nets = steps.bind_networks(
                self.models, state, frozen, key=jax.random.key(0), precision=self.config.precision
            )
            return dict(objective.survey(nets, batch, state.memory, state.step))

        run = jax.jit(ask, out_shardings=partition.replicated(self.mesh))

        def alive() -> None:
            watch.alive()
            processes.stop_if_asked("before the survey was done")

        batches = loader.eval_batches(self.dataset.train, batch_size=self.eval_batch_size)
        rows, _ = dataset_pass(functools.partial(run, state, frozen), batches, on_batch=alive)
        generator = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(b"survey")]))
        ids = example_ids(self.dataset.train)
        memory = objective.digest(rows, ids, jax.device_get(state.memory), generator)
        put = lambda new, old: jax.device_put(np.asarray(new, old.dtype), old.sharding)  # noqa: E731
        return state.replace(memory=jax.tree.map(put, memory, state.memory))

    def frozen_networks(self, config: ConfigDict) -> steps.Frozen:
        """Reads the networks that never learn from the checkpoints that `config` names.

        Those whose answers are stored stay on the host: training does not need them.
        """
        return {role: self._read(config, role, *self.abstract_frozen[role]) for role in self.frozen}

    @property
    def cached(self) -> tuple[Role, ...]:
        """Roles whose answers are stored before training."""
        return tuple(self.cache.outputs) if self.cache is not None else ()

    def online(self, frozen: steps.Frozen) -> steps.Frozen:
        """Returns those of the frozen networks that a step applies."""
        return {role: network for role, network in frozen.items() if role not in self.cached}

    def on_device(self, frozen: steps.Frozen) -> steps.Frozen:
        """Returns the frozen networks with those from the host put on the devices."""
        put = lambda x, to: jax.device_put(x, to.sharding)  # noqa: E731
        moved = {
            role: jax.tree.map(put, frozen[role], self.abstract_frozen[role])
            for role in self.cached
            if role in frozen
        }
        return {**frozen, **moved}

    def for_evaluation(self, frozen: steps.Frozen) -> steps.Frozen:
        """Returns the frozen networks that evaluators may read, on the devices."""
        read = {role for evaluator in self.evaluators.values() for role in evaluator.outputs}
        if read <= set(self.shapes.roles):
            frozen = {role: network for role, network in frozen.items() if role in read}
        return self.on_device(frozen)

    def stored_answers(
        self, config: ConfigDict, frozen: steps.Frozen, say: Callable[[str], None]
    ) -> teacher_cache.Answers | None:
        """Opens the answers that a run reads instead of asking, and fills in what is missing.

        Args:
          config: of the run, with its seed.
          frozen: from `frozen_networks`.
          say: prints a line.

        Raises:
          ConfigError: the folder holds answers to other questions.
        """
        if self.cache is None:
            return None
        return teacher_cache.prepare(
            config,
            self.cache,
            source=self.dataset.train,
            models=self.models,
            frozen=frozen,
            transform=self.transform(train=True),
            say=say,
        )

    def _read(self, config, role: Role, params: PyTree, model_state: PyTree):
        like, where = (params, model_state), f"roles.{role}.init"
        path, source, part = paths.parse_origin(config.roles[role].init, where=where)
        values = checkpoint.read_network(path, role=source, part=part, like=like, where=where)
        if role in self.cached:
            return values
        put = lambda x, to: jax.device_put(np.asarray(x, to.dtype), to.sharding)  # noqa: E731
        return jax.tree.map(put, values, like)


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    """When the weigher learns, and from how much.

    Attributes:
      options: how its gradient is taken.
      every: student steps between two of the weigher.
      warmup: student steps before the first.
      batch_size: held-out examples a step.
    """

    options: bilevel.Bilevel
    every: int
    warmup: int
    batch_size: int

    def due(self, step: int) -> bool:
        return step >= self.warmup and (step - self.warmup) % self.every == 0

    def count(self, step: Any) -> Any:
        """Returns how many outer steps came before `step`; also under `jit`."""
        return (step - self.warmup) // self.every

    def share(self, total: int) -> float:
        """Returns the share of `total` steps in which the weigher learns."""
        return max(0, -(-(total - self.warmup) // self.every)) / total


def _readable(
    objective: Objective, shapes: state.Shapes, config: ConfigDict
) -> dict[str, Mapping[str, Any]]:
    """Shapes of outputs of networks, predictions of the method, and what the weigher did."""
    found: dict[str, Mapping[str, Any]] = {
        r: s.outputs for r, s in shapes.roles.items() if r in config.roles
    }
    return found | dict(shapes.predictions) | _trust_shapes(objective, shapes)


def _trust_shapes(objective: Objective, shapes: state.Shapes) -> dict[str, Any]:
    if not isinstance(objective, Weighed) or objective.weigher.by_gradient:
        return {}
    b = shapes.batch["mask"].shape[0]
    weights = jax.ShapeDtypeStruct((b, len(objective.signals)), jnp.float32)
    return {"trust": {"weights": weights, **shapes.terms.logits}}


def _rules(config: ConfigDict, name: str) -> partition.Rules:
    return partition.read_rules(config.partition[name], where=f"partition.{name}")


def _with_sharding(x, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def make_transform(
    config: ConfigDict,
    dataset: Dataset,
    *,
    train: bool,
    trusted: Collection[str] = (),
    statistics: Callable[[], tuple[Any, Any]] | None = None,
) -> Transform:
    """Builds the transforms of training or evaluation batches, in the order of the config.

    Args:
      config: a config.
      dataset: gives the number of classes and, unless given, the statistics.
      train: whether the batches are those of training.
      trusted: as in `resolve`.
      statistics: returns mean and deviation, for `normalize` without numbers; by default those of
        the training part.
    """
    key = "train_transforms" if train else "eval_transforms"
    made = {}
    for name in config.data[key]:
        where = f"data.transform_kwargs.{name}"
        by_path = ":" in name
        make = (
            resolve("data", name, where=f"data.{key}", trusted=trusted)
            if by_path
            else transforms.resolve(name, where=f"data.{key}")
        )
        kwargs = config.data.transform_kwargs.get(name, {})
        made[name] = bind(
            make,
            dict(kwargs),
            where=where,
            provided={
                "num_classes": len(dataset.classes),
                "statistics": statistics or functools.partial(checks.statistics, dataset.train),
            },
        )()
    if not train:
        return transforms.compose(made)
    data = config.data
    for name in data.teacher_shares:
        if name not in made or data.teacher_view == "same":
            raise ConfigError(
                f"the teacher's view cannot share {name!r}",
                where="data.teacher_shares",
                hint=nearest(name, made) + "; a view of its own needs data.teacher_view",
            )
    transform = transforms.compose(made)
    if data.teacher_view != "same":
        clean = make_transform(config, dataset, train=False, trusted=trusted)
        transform = transforms.two_views(
            made, clean if data.teacher_view == "clean" else None, shared=data.teacher_shares
        )
    return transforms.in_turn(transform, data.views) if data.views else transform


def load_dataset(
    config: ConfigDict, *, shapes_only: bool = False, trusted: Collection[str] = ()
) -> Dataset:
    """Reads the data set of a config, or only its shapes where it can tell them without reading.

    `trusted` as in `resolve`.
    """
    return open_dataset(config, shapes_only=shapes_only, trusted=trusted)[0]


def open_dataset(
    config: ConfigDict, *, shapes_only: bool = False, trusted: Collection[str] = ()
) -> tuple[Dataset, checks.Report]:
    """Reads the data set of a config, as `load_dataset`, and checks it: see `data.checks`."""
    if config.data.name in IMAGE_FILES:
        raise ConfigError(
            f"there is no {config.data.name!r}: folders of image files are not read",
            where="data.name",
            hint="write the images into one .npz file once, as x_train, y_train, x_test, y_test, "
            "and set data.name=npz_file; or name a function of your own, package.module:function",
        )
    make = resolve("data", config.data.name, where="data.name", trusted=trusted)
    if shapes_only:
        make = getattr(sys.modules.get(make.__module__), "spec", make)
    dataset = bind(
        make,
        config.data.kwargs.to_dict(),
        where="data.kwargs",
        provided={"held_out": config.data.held_out},
    )()
    dataset, report = checks.open_dataset(dataset, where="data.name")
    corrupt = functools.partial(corruption.corrupt, dataset)
    corrupted = bind(corrupt, config.data.corrupt.to_dict(), where="data.corrupt")()
    mixing = [name for name in config.data.train_transforms if name in ("mixup", "cutmix")]
    if corrupted is not dataset and mixing:
        raise ConfigError(
            f"{mixing[0]} mixes examples whose faults are known one by one",
            where="data.train_transforms",
            hint=f"leave out {mixing[0]}, or data.corrupt",
        )
    return corrupted, report


def _check_values(config: ConfigDict, report: checks.Report, batch: Batch) -> tuple[str, ...]:
    """Follows the units of images to the networks; returns warnings, one line each.

    Raises:
      ConfigError: a transform gets values that it does not take, or images reach a network of this
        package in grey levels.
    """
    values, kwargs, warnings = report.values, config.data.transform_kwargs.to_dict(), []
    kind = ""
    if values is not None:
        for part in ("train_transforms", "eval_transforms"):
            where = f"data.{part}"
            kind = transforms.check_values(config.data[part], kwargs, values, where=where)
        normalize = kwargs.get("normalize", {})
        numbers = [normalize.get("mean"), normalize.get("std")]
        given = "normalize" in config.data.train_transforms and None not in numbers
        if given and (odd := checks.odd_statistics(values, *numbers)):
            hint = "without mean and std, normalize takes those of the training part"
            warnings.append(f"data.transform_kwargs.normalize: {odd}; {hint}")
    seen = batch.get("views", batch["input"])  # methods that compare views leave the input alone
    unscaled = not isinstance(seen, Mapping) and seen.dtype.kind in "iu" and seen.ndim >= 4
    later = values is not None and values.is_image and kind in ("bytes", "grey")
    if not unscaled and not later:
        return tuple(warnings)
    what = "images reach the networks " + (
        f"unscaled, with values from {values.interval}"
        if values is not None
        else "as integers, unscaled"
    )
    where = "data.train_transforms" if unscaled or kind == "grey" else "data.eval_transforms"
    hint = (
        "add 'normalize', which without mean and std takes those of the training part, or 'scale', "
        "to data.train_transforms and data.eval_transforms"
    )
    if all(":" in (spec.model or ":") for spec in config.roles.values()):  # may scale themselves
        return (*warnings, f"{where}: {what}; {hint}")
    raise ConfigError(what, where=where, hint=hint)


def _measurements(config: ConfigDict, total_steps: int, steps_per_epoch: float) -> int:
    """Returns how many states are measured in training, the last one included."""
    facts = {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
    every = config_lib.duration(config, "eval.every", default=total_steps, **facts)
    return -(-total_steps // max(every, 1))


def _role_spec(config: ConfigDict, role: Role) -> tuple[str, dict]:
    """Returns the network's name and arguments; a frozen role may take them from its run."""
    spec = config.roles[role]
    if spec.model:
        return spec.model, spec.kwargs.to_dict()
    source = role
    if spec.ema_of:
        source = spec.ema_of
        return _role_spec(config, source)
    if not spec.init:
        raise ConfigError("no model is named", where=f"roles.{role}.model")
    where = f"roles.{role}.init"
    origin = paths.parse_origin(spec.init, where=where)
    if origin.part:
        raise ConfigError(
            f"{origin.role}/{origin.part} is a part of a network, whose model must be named",
            where=f"roles.{role}.model",
            hint="linear_head for the last layer of a classifier",
        )
    step = checkpoint.find_step(origin.path, where=where)
    roles = checkpoint.read_config(step)["roles"]
    try:
        return roles[origin.role]["model"], dict(roles[origin.role]["kwargs"])
    except (KeyError, TypeError, ValueError):
        known = [n for n, found in roles.items() if isinstance(found, dict) and "model" in found]
        raise ConfigError(
            f"the run that wrote {step} has no network {origin.role!r}",
            where=where,
            hint=nearest(origin.role, known),
        ) from None


def _make_models(
    config: ConfigDict, provided: Mapping[str, Any], trusted: Collection[str]
) -> dict[Role, Model]:
    models = {}
    for role in config.roles:
        name, kwargs = _role_spec(config, role)
        source = config.roles[role].ema_of
        if source and (name, kwargs) != _role_spec(config, source):
            differs = "model" if name != _role_spec(config, source)[0] else "kwargs"
            raise ConfigError(
                f"a moving average of {source!r} is a network like it",
                where=f"roles.{role}.{differs}",
                hint="leave model and kwargs out",
            )
        made = make_model(name, kwargs, role=role, provided=provided, trusted=trusted)
        models[role] = _wide(made) if config.precision == "float64" else made
    return models


def make_model(
    name: str,
    kwargs: Mapping[str, Any],
    *,
    role: Role,
    provided: Mapping[str, Any],
    trusted: Collection[str],
) -> Model:
    """Builds a network.

    Args:
      name: of a module in `distill_jax.models`, or `package.module:Symbol`.
      kwargs: its arguments.
      role: its role, for errors.
      provided: from `provided_to_models`.
      trusted: as in `resolve`.

    Raises:
      ConfigError: there is no such network, or it does not take these arguments.
    """
    make = resolve("models", name, where=f"roles.{role}.model", trusted=trusted)
    where = f"roles.{role}.kwargs"
    bound = bind(make, kwargs, where=where, provided={**provided, **adapters.LATER})
    with explained("fails with these arguments", where=where):
        try:
            return adapters.build(bound)
        except ConfigError as e:
            where = e.where or f"roles.{role}.model"
            raise ConfigError(e.what, where=where, hint=e.hint) from e


def provided_to_models(
    classes: Collection[str], cardinalities: Collection[int], image_size: int | None
) -> dict[str, Any]:
    """Returns arguments of networks that come from the data where the config has none."""
    return {
        "num_classes": len(classes),
        "image_size": image_size,
        "cardinalities": tuple(cardinalities),
    }


def _wide(model: Model) -> Model:
    """Returns a network whose parameters are float64; its state keeps its type."""
    if jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise ConfigError(
            "JAX computes in 32 bits here", where="precision", hint="set JAX_ENABLE_X64=1"
        )

    def init(key, *inputs):
        params, model_state = model.init(key, *inputs)
        return cast(params, jnp.float64), model_state

    return Model(init, model.apply)


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


def _moving_average(spec: ConfigDict, total_steps: int) -> tuple[Role, steps.Decay]:
    return spec.ema_of, steps.rising_decay(spec.decay, spec.decay_schedule, total_steps)


def _make_evaluators(
    config: ConfigDict, outputs: Mapping[str, Any], dataset: Dataset, trusted: Collection[str]
) -> dict[str, Evaluator]:
    evaluators = {}
    for name, kwargs in config.evaluators.items():
        make = resolve("evaluators", name, where="evaluators", trusted=trusted)
        at = f"evaluators.{name}"
        evaluator = bind(make, dict(kwargs or {}), where=at)()
        _check_made(evaluator, name, "Evaluator", ("outputs", "__call__"), where=at)
        for role, names in evaluator.outputs.items():
            if role not in outputs:
                by_key = dict(kwargs or {}).get("role") == role
                raise ConfigError(
                    f"evaluator {name!r} reads {role!r}, which the run does not have",
                    where=f"evaluators.{name}" + ".role" * by_key,
                    hint=nearest(role, outputs),
                )
            for output in names:
                if output not in outputs[role]:
                    raise ConfigError(
                        f"evaluator {name!r} reads {output!r}, which {role} does not return",
                        where=f"evaluators.{name}",
                        hint=nearest(output, outputs[role]),
                    )
        for part in getattr(evaluator, "parts", {}):
            if len(getattr(dataset, part)) == 0:
                raise ConfigError(
                    f"evaluator {name!r} needs the {part} part, which is empty",
                    where=f"evaluators.{name}",
                    hint="set data.held_out above 0" if part == "held_out" else "",
                )
        evaluators[name] = evaluator
    return evaluators


def build(
    config: ConfigDict, *, shapes_only: bool = False, trusted: Collection[str] | None = None
) -> Experiment:
    """Turns a config into an experiment; nothing is computed, and data is read unless told not to.

    Args:
      config: the config; it is validated first.
      shapes_only: whether the data set is asked for its shapes instead of its examples.
      trusted: names and modules outside this package that may be imported, see `resolve`. By
        default those that the config names, which must then be the caller's own: of a config that
        was read from a file, as by `config.from_json`, give what is trusted, or `()`.

    Raises:
      ConfigError: anything in the config does not fit anything else in it.
      DataUnavailable: the data is not on this machine.
      CheckpointError: a network to start from is absent, damaged, or of other shapes.
    """
    config_lib.validate(config)
    trusted = names_in(config) if trusted is None else trusted
    trainable, frozen, averages = _split_roles(config)
    make_objective = resolve(
        "objectives", config.objective.name, where="objective.name", trusted=trusted
    )
    mesh = partition.make_mesh(**{axis: config.mesh[axis] for axis in partition.AXES})
    rules = (_rules(config, name) for name in ("rules", "frozen_rules"))
    partition.check_model_axis(mesh, *rules)
    partition.check_batch(
        config.batch_size, mesh, accum_steps=config.accum_steps, where="batch_size"
    )
    with crash.during("reading data"):
        dataset, data = open_dataset(config, shapes_only=shapes_only, trusted=trusted)
    steps_per_epoch = len(dataset.train) / config.batch_size
    total_steps = config_lib.total_steps(config, len(dataset.train))
    schedule_args = _schedule_args(config, steps_per_epoch, total_steps)
    tx, schedule = optim.make_optimizer(total_steps=total_steps, **schedule_args)
    ema = {role: _moving_average(config.roles[role], total_steps) for role in averages}
    facts = {
        "num_classes": len(dataset.classes),
        "num_examples": int(example_ids(dataset.train).max(initial=-1)) + 1,
        "total_steps": total_steps,
        "steps_per_epoch": steps_per_epoch,
    }
    kwargs = config.objective.kwargs.to_dict()
    objective = bind(make_objective, kwargs, where="objective.kwargs", provided=facts)()
    _check_made(
        objective, config.objective.name, "Objective", ("roles", "loss"), where="objective.name"
    )
    objective = _weighed(config, objective, dataset, total_steps, trusted)
    resident = _is_resident(config, dataset)
    _check_lookahead(config, dataset, ema, resident=resident)
    duration = {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
    tx, outer = _two_levels(config, objective, tx, trainable, duration)
    if outer is not None:
        _check_outer(config, outer, dataset, mesh, resident=resident)

    raw = batch_shapes(dataset.train, config.batch_size)
    transform = make_transform(config, dataset, train=True, trusted=trusted)
    make_transform(config, dataset, train=False, trusted=trusted)
    with explained("fails on these inputs", where="data.train_transforms"):
        batch = jax.eval_shape(transform, jax.eval_shape(jax.random.key, 0), raw, jnp.int32(0))
    _check_labels(config, batch, dataset)
    warnings = list(_check_values(config, data, batch))
    small = checks.small_part(
        len(dataset.held_out) if config.eval.metric.startswith("held_out/") else 0,
        config.eval.metric,
        measurements=_measurements(config, total_steps, steps_per_epoch),
    )
    warnings += [f"data.held_out: {small}"] if small else []
    first = jax.tree.leaves(batch["input"])[0].shape
    image_size = first[1] if len(first) > 1 else 1
    provided = provided_to_models(dataset.classes, dataset.cardinalities, image_size)
    models = _make_models(config, provided, trusted)
    teacher = teacher_cache.find_teacher(config, trusted) if config.cache.teacher else None
    if teacher is not None:
        models |= teacher_cache.stand_in(config, teacher, steps.teacher_view(batch))
    if config.cache.dir:
        models = teacher_cache.limit(config, models)
    with explained(f"{config.objective.name} fails on these networks", where="objective"):
        shapes = state.infer_shapes(objective, models, batch)
    _check_classes(config, shapes, dataset, objective.auxiliary)
    notes = _check_starts(config, models, shapes, trainable)
    if isinstance(objective, Weighed):
        for role, path in weighing.dead_parameters(objective, models, shapes):
            raise ConfigError(
                f"{path} of the weigher reaches no weight, so it could never learn",
                where=f"roles.{role}",
                hint="every parameter must enter the output that the weigher reads",
            )
    cache = None
    if config.cache.dir:
        _check_cache(config, objective, tx)
        cache = teacher_cache.make_plan(
            config,
            teacher=teacher,
            transform=transform,
            raw=raw,
            outputs={role: shapes.roles[role].outputs for role in config.cache.roles},
            networks={r: _role_spec(config, r) for r in config.cache.roles if r in config.roles},
            epochs=math.ceil(total_steps / steps_per_epoch),
            devices=partition.batch_shards(mesh),
        )
    return Experiment(
        config=config,
        mesh=mesh,
        dataset=dataset,
        data=dataclasses.replace(data, warnings=(*data.warnings, *warnings)),
        objective=objective,
        models=models,
        evaluators=_make_evaluators(config, _readable(objective, shapes, config), dataset, trusted),
        shapes=shapes,
        tx=tx,
        schedule=schedule,
        outer=outer,
        trainable=trainable,
        frozen=frozen,
        ema=ema,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        resident=resident,
        image_size=image_size,
        trusted=trusted,
        cache=cache,
        notes=tuple(notes),
    )


def _check_cache(config: ConfigDict, objective: Objective, tx: Any) -> None:
    if isinstance(tx, bilevel.Optimizers):
        raise ConfigError(
            "a weigher that learns asks the teacher about held-out examples too",
            where="cache.dir",
            hint="set cache.dir to nothing, or take a weigher without networks",
        )
    if config.cache.teacher and (objective.surveys or config.weigher.name):
        raise ConfigError(
            "only training examples are asked about, in the views of training",
            where="cache.teacher",
            hint="a method that asks about others needs a network in this role",
        )


def _check_made(made: Any, name: str, kind: str, has: Sequence[str], *, where: str) -> None:
    """Raises `ConfigError` for what is no objective, weigher or evaluator."""
    with explained(f"{name} returned a {type(made).__name__}, which cannot be read", where=where):
        whole = all(hasattr(made, attribute) for attribute in has)
    if isinstance(made, type) or not whole:
        raise ConfigError(
            f"{name} returned a {type(made).__name__}",
            where=where,
            hint=f"a distill_jax.core.api.{kind}, with {', '.join(has)}",
        )


def _weighed(
    config: ConfigDict,
    objective: Objective,
    dataset: Dataset,
    total: int,
    trusted: Collection[str],
) -> Objective:
    """Returns the objective, weighed where the config names a weigher."""
    spec = config.weigher
    if not spec.name:
        return objective
    make = resolve("weighers", spec.name, where="weigher.name", trusted=trusted)
    provided = {"total_steps": total}
    weigher = bind(make, spec.kwargs.to_dict(), where="weigher.kwargs", provided=provided)()
    _check_made(weigher, spec.name, "Weigher", ("roles", "needs", "__call__"), where="weigher.name")
    return Weighed(
        objective=objective,
        weigher=weigher,
        signals=tuple(spec.signals),
        num_classes=len(dataset.classes),
        control=spec.control,
        stop_features=spec.stop_features,
    )


def _two_levels(config, objective, tx, trainable, duration) -> tuple[Any, Outer | None]:
    """Returns the optimizers, and when the weigher learns; None where it does not."""
    if not isinstance(objective, Weighed):
        return tx, None
    roles = tuple(role for role in weighing.networks(objective) if role in trainable)
    by_gradient = objective.weigher.by_gradient
    if not by_gradient and (not roles or objective.control == "joint"):
        return tx, None
    spec = config.bilevel
    if config.accum_steps > 1:
        raise ConfigError(
            "a learned weigher does not go with gradient accumulation",
            where="accum_steps",
            hint="set accum_steps to 1, and bilevel.low_memory=true to save memory",
        )
    try:
        outer_tx, _ = optim.make_optimizer(
            name=spec.optim.name,
            total_steps=duration["total_steps"],
            lr=spec.optim.lr,
            schedule="constant",
            schedule_kwargs={},
            warmup_steps=0,
            weight_decay=spec.optim.weight_decay if roles else 0.0,
            decay_mask=((r"kernel$", True), (r".", False)),
            clip_norm=None,
            kwargs=spec.optim.kwargs.to_dict(),
        )
    except ConfigError as e:
        where = f"bilevel.{e.where}" if e.where.startswith("optim") else e.where
        raise ConfigError(e.what, where=where, hint=e.hint) from e
    optimizers = bilevel.Optimizers(tx, outer_tx, roles)
    if objective.control == "frozen":
        return optimizers, None
    outer = Outer(
        options=bilevel.Bilevel(
            method=spec.method,
            order=spec.order,
            unroll=spec.unroll,
            part=spec.part,
            low_memory=spec.low_memory,
            outer_terms=tuple(spec.outer_loss),
        ),
        every=spec.every,
        warmup=config_lib.duration(config, "bilevel.warmup", default=0, **duration),
        batch_size=max(1, round(spec.outer_batch * config.batch_size)),
    )
    if by_gradient and (outer.every, outer.warmup) != (1, 0):
        raise ConfigError(
            f"{config.weigher.name} takes its weights from a gradient in every step",
            where="bilevel.every" if outer.every != 1 else "bilevel.warmup",
            hint="set bilevel.every to 1 and no warmup",
        )
    return optimizers, outer


def _check_outer(config, outer: Outer, dataset: Dataset, mesh: Mesh, *, resident: bool) -> None:
    n = len(dataset.held_out)
    if outer.batch_size > n:
        raise ConfigError(
            f"a held-out batch of {outer.batch_size} from {n} held-out examples",
            where="bilevel.outer_batch" if n else "data.held_out",
            hint="the weigher learns from the held-out part: enlarge it, or lower outer_batch",
        )
    partition.check_batch(outer.batch_size, mesh, where="bilevel.outer_batch")
    unroll = outer.options.unroll
    if unroll > 1 and (not resident or unroll * config.batch_size > len(dataset.train)):
        raise ConfigError(
            f"{unroll} steps look {unroll} batches ahead",
            where="bilevel.unroll",
            hint="data.resident=yes, and no more batches than an epoch has",
        )


def _check_lookahead(config, dataset: Dataset, ema, *, resident: bool) -> None:
    spec = config.lookahead
    if not spec.steps:
        return
    if config.weigher.name:
        raise ConfigError(
            "looking ahead does not go with a weigher",
            where="lookahead.steps",
            hint="set lookahead.steps=0, or weigher.name=''",
        )
    if config.watch.nonfinite == "skip":
        raise ConfigError(
            "looking ahead moves averages before a step is known to be finite",
            where="watch.nonfinite",
            hint="set watch.nonfinite=stop, or lookahead.steps=0",
        )
    lookahead.make_lookahead_step(lambda *_: _, steps=spec.steps, ema=ema)  # its own checks
    if spec.kind == "wide" and (
        not resident or spec.steps * config.batch_size > len(dataset.train)
    ):
        raise ConfigError(
            f"{spec.steps} wide steps look {spec.steps} batches ahead",
            where="lookahead.steps",
            hint="data.resident=yes, and no more batches than an epoch has",
        )


def batch_shapes(source: Source, b: int) -> Batch:
    """Returns the shapes of a batch, from the first example."""
    zeros = np.zeros(1, np.int32)
    first = source.read(np.zeros(1, np.int64))
    one = {**first, "mask": np.ones(1, np.float32), "index": zeros, "epoch": zeros}
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype), jax.eval_shape(lambda: one)
    )


def _is_resident(config: ConfigDict, dataset: Dataset) -> bool:
    if config.data.resident != "auto":
        return config.data.resident == "yes"
    one = dataset.train.read(np.zeros(1, np.int64))
    return (
        sum(np.asarray(x).nbytes for x in jax.tree.leaves(one)) * len(dataset.train)
        <= RESIDENT_BYTES
    )


def _schedule_args(config: ConfigDict, steps_per_epoch: float, total_steps: int) -> dict:
    o = config.optim
    warmup = config_lib.duration(
        config,
        "optim.warmup",
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        default=0,
    )
    return {
        "name": o.name,
        "lr": o.lr,
        "schedule": o.schedule,
        "schedule_kwargs": o.schedule_kwargs.to_dict(),
        "warmup_steps": warmup,
        "weight_decay": o.weight_decay,
        "decay_mask": o.decay_mask,
        "clip_norm": o.clip_norm,
        "kwargs": o.kwargs.to_dict(),
    }


def _check_labels(config: ConfigDict, batch: Batch, dataset: Dataset) -> None:
    """Refuses transforms that make shares of other classes than the data have."""
    shares, k = batch.get("label_probs"), len(dataset.classes)
    if shares is None or not k or shares.shape[-1] == k:
        return
    kwargs = config.data.transform_kwargs
    given = [n for n in config.data.train_transforms if "num_classes" in kwargs.get(n, {})]
    where = f"data.transform_kwargs.{given[0]}.num_classes" if given else "data.train_transforms"
    raise ConfigError(
        f"labels become shares of {shares.shape[-1]} classes, the data have {k}",
        where=where,
        hint="leave num_classes out: it is taken from the data" if given else "",
    )


def _check_classes(
    config: ConfigDict, shapes: state.Shapes, dataset: Dataset, others: tuple[Role, ...]
) -> None:
    for role, found in shapes.roles.items():
        logits = found.outputs.get("logits") if role not in others else None
        if logits is not None and len(dataset.classes) == 1 and logits.shape[-1] == 1:
            raise ConfigError(
                f"all labels are {dataset.classes[0]!r}: with one class there is nothing to tell "
                "apart",
                where="data",
                hint="labels of two classes or more; methods without labels need no logits",
            )
        if logits is not None and dataset.classes and logits.shape[-1] != len(dataset.classes):
            where, hint = _source_of_classes(config, role)
            raise ConfigError(
                f"{role} has {logits.shape[-1]} classes, the data {len(dataset.classes)}",
                where=where,
                hint=hint,
            )


def _source_of_classes(config: ConfigDict, role: Role) -> tuple[str, str]:
    """Returns the key that says how many logits a network has, and what would be right."""
    if role not in config.roles:
        return "cache.teacher", "logits of the classes of the data"
    spec = config.roles[role]
    if "num_classes" in spec.kwargs:
        hint = "leave num_classes out: it is taken from the data"
        return f"roles.{role}.kwargs.num_classes", hint
    if not spec.model and spec.init:
        return f"roles.{role}.init", "a network that was trained on the classes of the data"
    hint = "as many logits as classes: an argument num_classes is taken from the data"
    return f"roles.{role}.{'kwargs' if spec.kwargs else 'model'}", hint


def _check_starts(
    config: ConfigDict,
    models: Mapping[Role, Model],
    shapes: state.Shapes,
    trainable: tuple[Role, ...],
) -> list[str]:
    """Looks for weights that start alike whatever the seed, in networks from outside the package.

    A network that starts from a checkpoint has its weights from there. Weights that are constant
    within each array, such as zeros, are nobody's choice of a seed.

    Returns:
      Warnings about networks of which a part starts alike.

    Raises:
      ConfigError: no weight of a network depends on the seed.
    """
    found = []
    for role in trainable:
        name = config.roles[role].model or ""
        if ":" not in name or config.roles[role].init:
            continue
        alike, some_differ = _alike(models[role], shapes.roles[role].inputs)
        if alike and not some_differ:
            raise ConfigError(
                f"{name} starts from the same weights whatever the seed",
                where=f"roles.{role}.model",
                hint="build the network from an argument rngs (nnx.Rngs), which comes from the "
                f"seed; roles.{role}.init names the run that a network starts from",
            )
        if alike:
            more = f" and {len(alike) - 3} more" if len(alike) > 3 else ""
            listed = ", ".join(alike[:3]) + more
            found.append(f"roles.{role}.model: {listed} start alike whatever the seed")
    return found


def _alike(model: Model, inputs: tuple[Any, ...]) -> tuple[list[str], bool]:
    """Returns parameters that start neither constant nor by the key, and whether any does by it."""

    def start(key, *inputs):
        return partition.named_leaves(model.init(key, *inputs)[0])

    key = jax.eval_shape(lambda: jax.random.key(0))
    facts = structure.facts_of(start, key, *inputs)
    fixed = [name for name, fact in facts.items() if not fact.inputs & 1]
    ran = jax.jit(lambda: {n: start(jax.random.key(0), *state.zeros(inputs))[n] for n in fixed})
    values = jax.device_get(ran()) if fixed else {}
    alike = [name for name in fixed if np.ptp(np.asarray(values[name], np.float64))]
    return alike, len(fixed) < len(facts)


def check_metric(experiment: Experiment, metric: str, *, where: str) -> None:
    """Checks that an evaluator will measure `"<split>/<name>"`, by asking each on random outputs.

    Metrics with a control behind their name are of the test split.

    Raises:
      ConfigError: no evaluator does, or the split is empty.
    """
    split, _, name = metric.partition("/")
    if len(getattr(experiment.dataset, split, ())) == 0:
        hint = "set data.held_out above 0" if split == "held_out" else "held_out or test"
        raise ConfigError(f"measures on the {split} split, which is empty", where=where, hint=hint)
    names = [f"{split}/{name}" for name in _measured(experiment, split)]
    if metric not in names:
        raise ConfigError(
            f"no evaluator measures {name!r}", where=where, hint=nearest(metric, names)
        )


def _measured(experiment: Experiment, split: str) -> list[str]:
    """Names of the scalars that evaluators find in random outputs of a split."""
    if split in experiment.caches.measured:
        return experiment.caches.measured[split]
    k, random = max(len(experiment.dataset.classes), 2), np.random.default_rng(0)
    rows = np.arange(4 * k)
    facts = {"label": rows % k, "index": rows}
    names: list[str] = []
    for evaluator in experiment.evaluators.values():
        outputs = {
            role: {
                output: random.normal(size=(len(rows), *experiment.outputs[role][output].shape[1:]))
                for output in wanted
            }
            for role, wanted in evaluator.outputs.items()
        }
        parts = dict.fromkeys(experiment.parts, (outputs, facts))
        found = ask(evaluator, outputs, facts, split=split, parts=parts)
        own = [name for name, value in found.items() if np.ndim(value) == 0]
        names += own
        for control in getattr(evaluator, "controls", ()) if split == "test" else ():
            if set(evaluator.outputs) & set(experiment.controls.get(control, {})):
                names += [f"{name}_{control}" for name in own]
    experiment.caches.measured[split] = names
    return names


def ask(
    evaluator: Evaluator,
    outputs: Mapping[Role, Mapping[str, np.ndarray]],
    facts: Mapping[str, np.ndarray],
    *,
    split: str,
    parts: Mapping[str, Any],
) -> Mapping[str, Any]:
    """Calls an evaluator with what it takes: see `api.Evaluator`."""
    if not hasattr(evaluator, "parts"):
        return evaluator(outputs, facts)
    call: Any = evaluator
    wanted = {name: parts[name] for name in call.parts}
    return call(outputs, facts, parts=wanted, split=split)


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
        return {**train, "answers": shapes}
    table = cache.shapes(len(experiment.dataset.train), partition.replicated(mesh))
    data, window = train
    tables = {name: table for name in ("now", "next")[: cache.views]}
    return data, {**window, "answers": tables}


class Feed:
    """Batches of one run as arguments of a step: resident arrays with a window, or streams.

    Args:
      experiment: what is run.
      seed: of the order of the examples.
      start: the first step.
      answers: what the batches carry of stored answers, from `Experiment.stored_answers`.
    """

    def __init__(
        self,
        experiment: Experiment,
        *,
        seed: int,
        start: int,
        answers: teacher_cache.Answers | None = None,
    ):
        self._outer, self._resident = experiment.outer, experiment.resident
        mesh, dataset = experiment.mesh, experiment.dataset

        def make(source, batch_size, start, answers=None):
            if self._resident:
                return loader.ResidentLoader(
                    source,
                    batch_size=batch_size,
                    seed=seed,
                    sharding=partition.replicated(mesh),
                    answers=answers,
                )
            return loader.StreamLoader(
                source,
                batch_size=batch_size,
                seed=seed,
                start=start,
                sharding=partition.over_batch(mesh),
                answers=answers,
            )

        self._train = make(dataset.train, experiment.config.batch_size, start, answers)
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
