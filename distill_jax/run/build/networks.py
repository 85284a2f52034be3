"""The networks of a config, and their shapes on a batch."""

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distill_jax.analysis import dependence
from distill_jax.core import (
    partition,
    phases,
    state,
    steps,
    weighted_objective,
)
from distill_jax.core.api import (
    Dataset,
    Model,
    Role,
)
from distill_jax.core.errors import ConfigError, explained, nearest
from distill_jax.core.precision import cast
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.models import _class_groups, adapters
from distill_jax.run import class_map, foreign, paths, teacher_cache
from distill_jax.run.build.data import Batches, Data
from distill_jax.run.build.method import Method
from distill_jax.run.config import ConfigDict
from distill_jax.run.resolve import bind, resolve
from distill_jax.trainer.io.paths import NetworkRef
from distill_jax.trainer.io.step_folder import read_config, read_meta
from distill_jax.trainer.io.step_index import find_step
from distill_jax.trainer.io.teacher_cache import Plan, teacher_fn_model
from distill_jax.weights.onnx_teacher import is_onnx


@dataclasses.dataclass(frozen=True, kw_only=True)
class Networks:
    """The networks of a run.

    Attributes:
      models: by role.
      shapes: of the networks, losses and memories on a batch.
      teacher: what replaces a network as the teacher, see `teacher_cache.find_teacher`.
      notes: warnings about their first weights, one line each.
    """

    models: Mapping[Role, Model]
    shapes: state.Shapes
    teacher: Any
    notes: tuple[str, ...]


def make_networks(
    config: ConfigDict,
    data: Data,
    batches: Batches,
    method: Method,
    *,
    trainable: tuple[Role, ...],
    trusted: Collection[str],
    shapes_only: bool = False,
) -> Networks:
    """Builds the networks and runs the method on shapes."""
    dataset, objective = data.dataset, method.objective
    provided = provided_to_models(
        dataset.classes, dataset.cardinalities, batches.image_size, dataset.vocabulary
    )
    models = _make_models(config, provided, trusted)
    for role in config.roles:
        if groups := class_map.groups(config, role, dataset.classes):
            where, k = f"{role}.classes", len(dataset.classes)
            if len(groups) != k:
                raise ConfigError(
                    f"names {len(groups)} classes, the data have {k}",
                    where=f"roles.{where}",
                    hint="one entry for each class of the data, in their order",
                )
            models[role] = _class_groups.grouped(models[role], groups, where=where)
    teacher = None
    if config.cache.teacher:
        k = len(dataset.classes)
        teacher = teacher_cache.find_teacher(
            config, trusted, shapes_only=shapes_only, num_classes=k
        )
        view, (role,) = steps.teacher_view(batches.batch), config.cache.roles
        models[role] = teacher_fn_model(teacher, view, where="cache.teacher")
        see = functools.partial(models[role].apply, {}, {}, train=False, rngs={})
        _check_role_classes(config, role, jax.eval_shape(see, view)[0], dataset)
    if config.cache.dir:
        models = teacher_cache.select_outputs(config, models)
    with explained(f"{config.objective.name} fails on these networks", where="objective"):
        given = (objective, method.phases, models, batches.batch)
        shapes = phases.infer_shapes(*given, trainable=trainable)
    _check_classes(config, shapes, dataset, objective.auxiliary)
    _check_vocabulary(config, shapes, dataset)
    notes = _check_starts(config, models, shapes, trainable)
    if isinstance(objective, WeightedObjective):
        for role, path in weighted_objective.dead_parameters(objective, models, shapes):
            raise ConfigError(
                f"{path} of the weighting reaches no weight, so it could never learn",
                where=f"roles.{role}",
                hint="every parameter must enter the output that the weighting reads",
            )
    return Networks(models=models, shapes=shapes, teacher=teacher, notes=tuple(notes))


def plan_cache(
    config: ConfigDict,
    data: Data,
    batches: Batches,
    method: Method,
    networks: Networks,
    *,
    mesh: Mesh,
) -> Plan | None:
    """Returns which teacher outputs are stored, or None if none are."""
    if not config.cache.dir:
        return None
    _check_cache(config, method)
    if config.cache.top_k and data.dataset.task != "classification":
        raise ConfigError(
            f"the most likely classes are kept, and the task of the data is {data.dataset.task}",
            where="cache.top_k",
            hint="0, which stores all outputs",
        )
    shapes = networks.shapes
    return teacher_cache.make_plan(
        config,
        teacher=networks.teacher,
        transform=batches.transform,
        raw=batches.raw,
        outputs={role: shapes.roles[role].outputs for role in config.cache.roles},
        networks={
            r: asked(config, r, data.dataset.classes)
            for r in config.cache.roles
            if r in config.roles
        },
        epochs=math.ceil(data.total_steps / data.steps_per_epoch),
        devices=partition.batch_shards(mesh),
    )


def asked(config: ConfigDict, role: Role, classes: tuple[str, ...] = ()) -> tuple[str, dict]:
    """Returns what the stored outputs of a role depend on in addition to its weights.

    `classes` are those of the data, which a file of classes names.
    """
    name, kwargs = role_spec(config, role)
    groups = _class_groups.indices_of(class_map.groups(config, role, classes))
    return name, {**kwargs, **({"classes": groups} if groups else {})}


def role_spec(config: ConfigDict, role: Role) -> tuple[str, dict]:
    """Returns the network's name and arguments; a frozen role may take them from its run."""
    spec = config.roles[role]
    if spec.model:
        return spec.model, spec.kwargs.to_dict()
    source = role
    if spec.ema_of:
        source = spec.ema_of
        return role_spec(config, source)
    if not spec.init:
        raise ConfigError("no model is named", where=f"roles.{role}.model")
    where = f"roles.{role}.init"
    if paths.is_foreign(spec.init):
        kwargs = spec.kwargs.to_dict()
        return foreign.spec(spec.init, kwargs, frozen=spec.frozen, where=where)
    origin = NetworkRef.parse(spec.init, where=where)
    if origin.part:
        raise ConfigError(
            f"{origin.role}/{origin.part} is a part of a network; the model of this part must "
            "be named",
            where=f"roles.{role}.model",
            hint="linear_head for the last layer of a classifier",
        )
    return stored_spec(origin, where=where)


def stored_spec(origin: NetworkRef, *, where: str) -> tuple[str, dict]:
    """Returns name and arguments of a network of another run.

    Args:
      origin: the run and the role.
      where: the config path that names it.

    Raises:
      ConfigError: the run has no such network.
    """
    step = find_step(origin.path, where=where)
    roles = read_config(step)["roles"]
    try:
        found = roles[origin.role]
        if not found["model"]:  # it took the network from where it started
            found = read_meta(step)["signature"]["networks"][origin.role]
        return found["model"], dict(found["kwargs"])
    except (KeyError, TypeError, ValueError):
        known = [
            n for n, one_role in roles.items() if isinstance(one_role, dict) and "model" in one_role
        ]
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
        name, kwargs = role_spec(config, role)
        source = config.roles[role].ema_of
        if source and (name, kwargs) != role_spec(config, source):
            differs = "model" if name != role_spec(config, source)[0] else "kwargs"
            raise ConfigError(
                f"a moving average of {source!r} is a network like it",
                where=f"roles.{role}.{differs}",
                hint="leave model and kwargs out",
            )
        model = make_model(name, kwargs, role=role, provided=provided, trusted=trusted)
        models[role] = _wide(model) if config.precision == "float64" else model
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
    classes: Collection[str],
    cardinalities: Collection[int],
    image_size: int | None,
    vocabulary: int = 0,
) -> dict[str, Any]:
    """Returns arguments of networks that come from the data where the config has none."""
    text = {"vocabulary": vocabulary} if vocabulary else {}
    return {
        **text,
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

    return model._replace(init=init)


def _check_classes(
    config: ConfigDict, shapes: state.Shapes, dataset: Dataset, others: tuple[Role, ...]
) -> None:
    for role, shape in shapes.roles.items():
        if role not in others:
            _check_role_classes(config, role, shape.outputs, dataset)


def _check_vocabulary(config: ConfigDict, shapes: state.Shapes, dataset: Dataset) -> None:
    """Refuses logits of fewer tokens than the text has: ids beyond them would be NaN."""
    for role, shape in shapes.roles.items():
        logits = shape.outputs.get("logits")
        if logits is not None and logits.ndim == 3 and logits.shape[-1] < dataset.vocabulary:
            key = "kwargs.vocabulary" if "vocabulary" in config.roles[role].kwargs else "model"
            raise ConfigError(
                f"{role} has {logits.shape[-1]} tokens, the data {dataset.vocabulary}",
                where=f"roles.{role}.{key}",
                hint="leave vocabulary out: it is taken from the data",
            )


def _check_role_classes(
    config: ConfigDict, role: Role, outputs: Mapping[str, Any], dataset: Dataset
) -> None:
    logits = outputs.get("logits")
    if logits is None:
        return
    alone = dataset.task == "classification" and len(dataset.classes) == 1
    if alone and logits.shape[-1] == 1:
        raise ConfigError(
            f"all labels are {dataset.classes[0]!r}: with one class there is nothing to learn",
            where="data",
            hint="labels of two classes or more; methods without labels need no logits",
        )
    if dataset.classes and logits.shape[-1] != len(dataset.classes):
        where, hint = _source_of_classes(config, role)
        what = {"multilabel": "labels", "regression": "targets"}.get(dataset.task, "classes")
        raise ConfigError(
            f"{role} has {logits.shape[-1]} {what}, the data {len(dataset.classes)}",
            where=where,
            hint=hint,
        )


def _source_of_classes(config: ConfigDict, role: Role) -> tuple[str, str]:
    """Returns the key that sets the number of logits of a network, and a hint to correct it."""
    if role not in config.roles:
        hint = "logits of the classes of the data"
        if is_onnx(config.cache.teacher):
            hint = (
                "cache.teacher_kwargs.classes gives the teacher's class for each class of the data"
            )
        return "cache.teacher", hint
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
    """Finds weights of outside networks that start with the same values for every seed.

    A network that starts from a checkpoint takes its weights from it. Weights that are constant
    within each array, such as zeros, are allowed.

    Returns:
      Warnings about networks in which some weights start with the same values for every seed.

    Raises:
      ConfigError: no weight of a network depends on the seed.
    """
    messages = []
    for role in trainable:
        name = config.roles[role].model or ""
        if ":" not in name or config.roles[role].init:
            continue
        alike, some_differ = _alike(models[role], shapes.roles[role].inputs)
        if alike and not some_differ:
            raise ConfigError(
                f"{name} starts from the same weights for every seed",
                where=f"roles.{role}.model",
                hint="build the network from an argument rngs (nnx.Rngs), which comes from the "
                f"seed; roles.{role}.init names the run that a network starts from",
            )
        if alike:
            more = f" and {len(alike) - 3} more" if len(alike) > 3 else ""
            listed = ", ".join(alike[:3]) + more
            messages.append(
                f"roles.{role}.model: {listed} start with the same values for every seed"
            )
    return messages


def _alike(model: Model, inputs: tuple[Any, ...]) -> tuple[list[str], bool]:
    """Returns parameters that start neither constant nor by the key, and whether any does by it."""

    def start(key, *inputs):
        return partition.named_leaves(model.init(key, *inputs)[0])

    key = jax.eval_shape(lambda: jax.random.key(0))
    leaves = dependence.of(start, key, *inputs)
    fixed = [name for name, leaf in leaves.items() if "0" not in leaf.on]
    ran = jax.jit(lambda: {n: start(jax.random.key(0), *state.zeros(inputs))[n] for n in fixed})
    values = jax.device_get(ran()) if fixed else {}
    alike = [name for name in fixed if np.ptp(np.asarray(values[name], np.float64))]
    return alike, len(fixed) < len(leaves)


def _check_cache(config: ConfigDict, method: Method) -> None:
    if method.outer_optimizer is not None:
        raise ConfigError(
            "a weighting that learns needs teacher outputs of held-out examples too",
            where="cache.dir",
            hint="leave cache.dir empty, or use a weighting without networks",
        )
    if config.cache.teacher and (method.objective.needs_dataset_pass or config.weighting.name):
        raise ConfigError(
            "teacher outputs are stored only for training examples, in the views of training",
            where="cache.teacher",
            hint="a method that needs other outputs needs a network in this role",
        )
