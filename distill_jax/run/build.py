"""The composition root: from a config to everything a run needs. Alone in knowing all packages."""

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from distill_jax.core import optim, partition, rng, state, steps
from distill_jax.core.api import Batch, Dataset, Evaluator, Model, Objective, PyTree, Role
from distill_jax.core.errors import ConfigError, nearest
from distill_jax.data import loader, transforms
from distill_jax.models.adapters import as_model
from distill_jax.run import checkpoint
from distill_jax.run import config as config_lib
from distill_jax.run.config import ConfigDict
from distill_jax.run.resolve import bind, resolve

RESIDENT_BYTES = 2**30
"""Training sets up to this size live on the device where `data.resident` is "auto"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A config turned into pure functions, shapes and data; the same for every seed."""

    config: ConfigDict
    mesh: Mesh
    dataset: Dataset
    objective: Objective
    models: Mapping[Role, Model]
    evaluators: Mapping[str, Evaluator]
    shapes: state.Shapes
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    trainable: tuple[Role, ...]
    frozen: tuple[Role, ...]
    ema: Mapping[Role, tuple[Role, float]]
    total_steps: int
    steps_per_epoch: float
    resident: bool
    _compiled: dict[str, Any] = dataclasses.field(default_factory=dict)

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
        shardings = partition.infer(
            shapes,
            self.mesh,
            rules=dict(self.config.partition.rules),
            min_size=self.config.partition.min_size,
        )
        return jax.tree.map(_with_sharding, shapes, shardings)

    @functools.cached_property
    def abstract_frozen(self) -> Any:
        shapes = {r: (self.shapes.roles[r].params, self.shapes.roles[r].state) for r in self.frozen}
        shardings = partition.infer(
            shapes, self.mesh, rules={}, min_size=self.config.partition.min_size
        )
        return jax.tree.map(_with_sharding, shapes, shardings)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the step's metrics: total loss, its terms, and the gradient norm if asked."""
        norm = ("grad_norm",) if self.config.log.grad_norm else ()
        return ("loss", *self.shapes.terms.values, *norm)

    @functools.cached_property
    def step(self) -> Callable:
        """The jitted step `(state, frozen, fed, key) -> (state, metrics)`; donates the state.

        The metrics are one array `[m]` in the order of `metric_names`: each output of a step costs
        the host some microseconds, which shows where steps are short.
        """
        config = self.config
        update = steps.make_train_step(
            self.objective,
            self.models,
            self.tx,
            precision=config.precision,
            accum_steps=config.accum_steps,
            ema=self.ema,
            grad_norm=config.log.grad_norm,
        )
        transform = make_transform(config, self.dataset, train=True)
        over_batch = partition.over_batch(self.mesh)

        def step(state, frozen, fed, key):
            batch = fed
            if self.resident:
                data, window = fed
                batch = loader.fetch_resident(
                    data, window, state.step, batch_size=config.batch_size
                )
            batch = jax.lax.with_sharding_constraint(batch, over_batch)
            batch = transform(rng.stream(key, "transform"), batch, state.step)
            state, metrics = update(state, frozen, batch, key)
            return state, jnp.stack([metrics[name] for name in self.metric_names])

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

    def compile_step(self, fed: PyTree) -> Callable:
        """Compiles the step once for all seeds; any other shapes or shardings then raise."""
        if "step" not in self._compiled:
            key = jax.ShapeDtypeStruct(
                (), jax.random.key(0).dtype, sharding=partition.replicated(self.mesh)
            )
            lowered = self.step.lower(self.abstract_state, self.abstract_frozen, fed, key)
            self._compiled["step"] = lowered.compile()
        return self._compiled["step"]

    @property
    def flops_per_step(self) -> float | None:
        """Floating-point operations of one compiled step on one device, where XLA counts them."""
        if "step" not in self._compiled:
            return None
        return (self._compiled["step"].cost_analysis() or {}).get("flops")

    @functools.cached_property
    def predict(self) -> Callable:
        """The jitted `(state, frozen, batch) -> {role: {name: [b, ...]}}` of the evaluators."""
        wanted: dict[Role, tuple[str, ...]] = {}
        for evaluator in self.evaluators.values():
            for role, names in evaluator.outputs.items():
                wanted[role] = tuple(dict.fromkeys((*wanted.get(role, ()), *names)))
        predict = steps.make_predict(self.models, wanted, precision=self.config.precision)
        transform = make_transform(self.config, self.dataset, train=False)

        def run(state, frozen, batch):
            batch = transform(rng.stream(jax.random.key(0), "transform"), batch, state.step)
            return predict(state, frozen, batch)

        return jax.jit(run, out_shardings=partition.replicated(self.mesh))

    @property
    def eval_batch_size(self) -> int:
        """The configured size, rounded up to split evenly; padding rows do not count."""
        return -(-self.config.eval.batch_size // self.mesh.size) * self.mesh.size

    def initial_state(self, key, config: ConfigDict) -> Any:
        """Creates the state straight into its shardings, then loads warm starts.

        On CPU the initialisers are compiled without optimisation: they run once, and compiling
        them well takes longer than running them.
        """
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        lowered = jax.jit(self.init, out_shardings=shardings).lower(key)
        fast: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
        options = fast if jax.default_backend() == "cpu" else None
        new = lowered.compile(compiler_options=options)(key)
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

    def frozen_networks(self, config: ConfigDict) -> steps.Frozen:
        """Reads the networks that never learn from the checkpoints that `config` names."""
        return {role: self._read(config, role, *self.abstract_frozen[role]) for role in self.frozen}

    def _read(self, config, role: Role, params: PyTree, model_state: PyTree):
        path, _, source = config.roles[role].init.partition("#")
        like = (params, model_state)
        values = checkpoint.read_network(
            pathlib.Path(path),
            role=source or "student",
            like=like,
            where=f"roles.{role}.init",
        )
        return jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), values, like)


def _with_sharding(x, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def make_transform(config: ConfigDict, dataset: Dataset, *, train: bool):
    """Builds the transforms of training or evaluation batches, in the order of the config."""
    key = "train_transforms" if train else "eval_transforms"
    made = {}
    for name in config.data[key]:
        where = f"data.transform_kwargs.{name}"
        by_path = ":" in name
        make = (
            resolve("data", name, where=f"data.{key}")
            if by_path
            else transforms.resolve(name, where=f"data.{key}")
        )
        kwargs = config.data.transform_kwargs.get(name, {})
        made[name] = bind(
            make, dict(kwargs), where=where, provided={"num_classes": len(dataset.classes)}
        )()
    return transforms.compose(made)


def load_dataset(config: ConfigDict, *, shapes_only: bool = False) -> Dataset:
    """Reads the data set of a config, or only its shapes where it can tell them without reading."""
    make = resolve("data", config.data.name, where="data.name")
    if shapes_only:
        make = getattr(sys.modules[make.__module__], "spec", make)
    return bind(
        make,
        config.data.kwargs.to_dict(),
        where="data.kwargs",
        provided={"held_out": config.data.held_out},
    )()


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
    path, _, source = spec.init.partition("#")
    step = checkpoint.find_step(pathlib.Path(path), where=f"roles.{role}.init")
    stored = json.loads((step / "meta" / "metadata").read_text())["config"]
    origin = stored["roles"][source or "student"]
    return origin["model"], origin["kwargs"]


def _make_models(config: ConfigDict, provided: Mapping[str, Any]) -> dict[Role, Model]:
    models = {}
    for role in config.roles:
        name, kwargs = _role_spec(config, role)
        make = resolve("models", name, where=f"roles.{role}.model")
        where = f"roles.{role}.kwargs"
        models[role] = as_model(bind(make, kwargs, where=where, provided=provided)())
    return models


def _split_roles(config: ConfigDict):
    ema = {role: (spec.ema_of, spec.decay) for role, spec in config.roles.items() if spec.ema_of}
    frozen = tuple(role for role, spec in config.roles.items() if spec.frozen)
    for role in frozen:
        if not config.roles[role].init:
            raise ConfigError(
                "a frozen network without weights",
                where=f"roles.{role}.init",
                hint="give the folder of the run that trained it",
            )
    trainable = tuple(r for r in config.roles if r not in frozen and r not in ema)
    return trainable, frozen, ema


def _make_evaluators(config: ConfigDict, shapes: state.Shapes) -> dict[str, Evaluator]:
    evaluators = {}
    for name, kwargs in config.evaluators.items():
        make = resolve("evaluators", name, where="evaluators")
        evaluator = bind(make, dict(kwargs or {}), where=f"evaluators.{name}")()
        for role, names in evaluator.outputs.items():
            if role not in shapes.roles:
                raise ConfigError(
                    f"evaluator {name!r} reads a network {role!r} that the run does not have",
                    where=f"evaluators.{name}",
                    hint=nearest(role, shapes.roles),
                )
            for output in names:
                if output not in shapes.roles[role].outputs:
                    raise ConfigError(
                        f"evaluator {name!r} reads {output!r}, which {role} does not return",
                        where=f"evaluators.{name}",
                        hint=nearest(output, shapes.roles[role].outputs),
                    )
        evaluators[name] = evaluator
    return evaluators


def build(config: ConfigDict, *, shapes_only: bool = False) -> Experiment:
    """Turns a config into an experiment; nothing is computed, and data is read unless told not to.

    Args:
      config: the config; it is validated first.
      shapes_only: whether the data set is asked for its shapes instead of its examples.

    Raises:
      ConfigError: anything in the config does not fit anything else in it.
      DataUnavailable: the data is not on this machine.
      CheckpointError: a network to start from is absent, damaged, or of other shapes.
    """
    config_lib.validate(config)
    where = "objective"
    make_objective = resolve("objectives", config.objective.name, where=f"{where}.name")
    objective = bind(make_objective, config.objective.kwargs.to_dict(), where=f"{where}.kwargs")()
    trainable, frozen, ema = _split_roles(config)
    mesh = partition.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    partition.check_batch(
        config.batch_size, mesh, accum_steps=config.accum_steps, where="batch_size"
    )
    dataset = load_dataset(config, shapes_only=shapes_only)
    steps_per_epoch = len(dataset.train) / config.batch_size
    total_steps = config_lib.total_steps(config, len(dataset.train))
    schedule_args = _schedule_args(config, steps_per_epoch, total_steps)
    tx, schedule = optim.make_optimizer(total_steps=total_steps, **schedule_args)

    example = dataset.train.read(np.zeros(config.batch_size, np.int64))
    raw = jax.eval_shape(lambda: _as_batch(example, config.batch_size))
    transform = make_transform(config, dataset, train=True)
    make_transform(config, dataset, train=False)
    batch = jax.eval_shape(transform, jax.eval_shape(jax.random.key, 0), raw, jnp.int32(0))
    image_shape = jax.tree.leaves(batch["input"])[0].shape
    provided = {"num_classes": len(dataset.classes), "image_size": image_shape[1]}
    models = _make_models(config, provided)
    shapes = state.infer_shapes(objective, models, batch)
    _check_classes(shapes, dataset)
    return Experiment(
        config=config,
        mesh=mesh,
        dataset=dataset,
        objective=objective,
        models=models,
        evaluators=_make_evaluators(config, shapes),
        shapes=shapes,
        tx=tx,
        schedule=schedule,
        trainable=trainable,
        frozen=frozen,
        ema=ema,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        resident=_is_resident(config, dataset),
    )


def _as_batch(example: Mapping[str, Any], b: int) -> Batch:
    zeros = np.zeros(b, np.int32)
    return {**example, "mask": np.ones(b, np.float32), "index": zeros, "epoch": zeros}


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


def _check_classes(shapes: state.Shapes, dataset: Dataset) -> None:
    for role, found in shapes.roles.items():
        logits = found.outputs.get("logits")
        if logits is not None and dataset.classes and logits.shape[-1] != len(dataset.classes):
            raise ConfigError(
                f"{role} has {logits.shape[-1]} classes, the data {len(dataset.classes)}",
                where=f"roles.{role}.kwargs.num_classes",
                hint="leave num_classes out: it is taken from the data",
            )


def check_metric(experiment: Experiment, metric: str, *, where: str) -> None:
    """Checks that an evaluator will measure `"<split>/<name>"`, by asking each on random outputs.

    Raises:
      ConfigError: no evaluator does, or the split is empty.
    """
    split, _, name = metric.partition("/")
    if len(getattr(experiment.dataset, split, ())) == 0:
        hint = "set data.held_out above 0" if split == "held_out" else "held_out or test"
        raise ConfigError(f"measures on the {split} split, which is empty", where=where, hint=hint)
    n, random = 4 * max(len(experiment.dataset.classes), 2), np.random.default_rng(0)
    names: list[str] = []
    for evaluator in experiment.evaluators.values():
        outputs = {
            role: {
                output: random.normal(
                    size=(n, *experiment.shapes.roles[role].outputs[output].shape[1:])
                )
                for output in wanted
            }
            for role, wanted in evaluator.outputs.items()
        }
        rows = np.arange(n)
        facts = {"label": rows % max(len(experiment.dataset.classes), 2), "index": rows}
        found = evaluator(outputs, facts)
        names += [f"{split}/{key}" for key, value in found.items() if np.ndim(value) == 0]
    if metric not in names:
        raise ConfigError(
            f"no evaluator measures {name!r}", where=where, hint=nearest(metric, names)
        )


def feed_shapes(experiment: Experiment) -> PyTree:
    """Returns what a `Feed` gives the step, as shapes with shardings."""
    b, source = experiment.config.batch_size, experiment.dataset.train
    example = _as_batch(source.read(np.zeros(b, np.int64)), b)
    if not experiment.resident:
        sharding = partition.over_batch(experiment.mesh)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), example
        )
    sharding = partition.replicated(experiment.mesh)
    return loader.resident_shapes(source, sharding=sharding)


class Feed:
    """Batches of one run as arguments of the step: resident arrays with a window, or a stream."""

    def __init__(self, experiment: Experiment, *, seed: int, start: int):
        source, mesh = experiment.dataset.train, experiment.mesh
        arguments: dict[str, Any] = {"batch_size": experiment.config.batch_size, "seed": seed}
        if experiment.resident:
            self._loader = loader.ResidentLoader(
                source, sharding=partition.replicated(mesh), **arguments
            )
        else:
            self._loader = loader.StreamLoader(
                source,
                start=start,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                sharding=partition.over_batch(mesh),
                **arguments,
            )
        self._resident = experiment.resident

    def __call__(self, step: int) -> PyTree:
        """Returns what the step takes at `step`."""
        window = self._loader.window(step)
        return (self._loader.data, window) if self._resident else window

    def close(self) -> None:
        """Ends the threads of a stream."""
        if isinstance(self._loader, loader.StreamLoader):
            self._loader.close()
