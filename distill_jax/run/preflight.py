"""What would train, and quietly do nothing of what its config says, found before any compilation.

A mistake ends the run; a doubt is a line that begins "warning:"; what a study may compare on
purpose (a teacher of weight zero, an average that never moves) is a mistake in a run by itself and
a doubt in an arm. The step is traced once on shapes, see `core/structure.py`; nothing is compiled,
and of the data only what lies in memory is looked at.
"""

import dataclasses
import functools
import inspect
import itertools
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core import structure, weighted_objective
from distill_jax.core.api import (
    Array,
    Batch,
    Dataset,
    Model,
    Objective,
    Outputs,
    PyTree,
    Role,
    State,
    Transform,
)
from distill_jax.core.errors import CheckpointError, ConfigError, UserError, explained
from distill_jax.core.partition import path_name
from distill_jax.core.state import RoleShapes, ShapeNets, zeros
from distill_jax.core.steps import BoundNets, check_accumulation, mean_loss
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.data import checks
from distill_jax.data.source import example_ids
from distill_jax.run import config as config_lib
from distill_jax.run import hyperparameters
from distill_jax.run.build import Experiment, batch_shapes
from distill_jax.run.config import ConfigDict
from distill_jax.run.findings import Finding
from distill_jax.trainer.io.files import NUMBERS, DamagedFile, read_json
from distill_jax.trainer.io.paths import NetworkRef
from distill_jax.trainer.io.step_folder import read_config
from distill_jax.trainer.io.step_index import find_step

_VALUES = ("normalize", "scale", "downscale")
"""Transforms that change what the numbers of an input mean."""

PROBED_ROWS = 32
"""Examples in the batch of random outputs that shows which terms are constant."""

LARGEST_PROBED = 2**28
"""Numbers in an output, above which no such batch is drawn."""

LABELS = frozenset({"label", "label_probs"})
"""Parts of a batch that say what a label is."""


def warn(
    experiment: Experiment,
    log_line: Callable[[str], None],
    *,
    alone: bool,
    planned: bool = False,
) -> None:
    """Refuses what would do nothing of what the config says, and warns of what may not, once.

    Args:
      experiment: what will be run.
      log_line: prints a line.
      alone: whether it is a run by itself, not an arm of a study.
      planned: whether nothing is run, so that it may need more memory than there is here.

    Raises:
      ConfigError: something certainly does nothing.
    """
    if experiment.caches.warned:
        return
    raw = batch_shapes(experiment.dataset.train, experiment.config.batch_size)
    evaluate = experiment.transform(train=False)
    found = check(experiment, raw=raw, evaluate=evaluate, alone=alone, planned=planned)
    experiment.caches.warned = True
    for warning in (*experiment.notes, *experiment.data.warnings, *found):
        log_line(f"warning: {warning}")


def check(
    experiment: Experiment,
    *,
    raw: Batch,
    evaluate: Transform,
    alone: bool,
    planned: bool = False,
) -> list[str]:
    """Returns doubts about an experiment, one line each.

    Args:
      experiment: what will be run.
      raw: shapes of a batch as the source gives it.
      evaluate: the transform of evaluation batches.
      alone: whether it is a run by itself, not an arm of a study.
      planned: whether nothing is run here.

    Raises:
      ConfigError: the first mistake.
    """
    warnings = []
    for finding in findings(experiment, raw=raw, evaluate=evaluate):
        refused = {"error": True, "warning": False, "memory": not planned}
        if refused.get(finding.kind, alone):
            raise ConfigError(finding.what, where=finding.where, hint=finding.hint)
        if finding.kind != "unused":
            warnings.append(f"{finding.where}: {finding.what}")
    return list(dict.fromkeys(warnings))


def findings(experiment: Experiment, *, raw: Batch, evaluate: Transform) -> Iterator[Finding]:
    """Yields what is found, the cheap before the dear; arguments as of `check`."""
    yield from of_lengths(experiment)
    yield from hyperparameters.findings(experiment)
    yield from of_transforms(experiment.config, raw, evaluate)
    yield from of_data(experiment.dataset, experiment.overlaps)
    yield from of_teachers(experiment.config, experiment.frozen, experiment.dataset)
    yield from of_step(experiment)


# Lengths.


def of_lengths(experiment: Experiment) -> Iterator[Finding]:
    """What the length of training and the size of batches make pointless."""
    config, total = experiment.config, experiment.total_steps
    outer = experiment.outer
    if outer is not None and outer.warmup >= total:
        yield Finding(
            "error",
            f"the weighting waits for {outer.warmup} of {total} steps, so it would never learn",
            "bilevel.warmup",
            "shorten it, or lengthen training",
        )
    if outer is not None and not config.bilevel.optim.lr:
        yield Finding(
            "comparison",
            "the weighting would never learn",
            "bilevel.optim.lr",
            "a positive number, or weighting.control=frozen",
        )
    run_info = {"steps_per_epoch": experiment.steps_per_epoch, "total_steps": total}
    every = config_lib.duration(config, "eval.every", default=total, **run_info)
    if every > total and len(experiment.dataset.held_out):
        yield Finding(
            "warning",
            f"due after {every} steps of {total}: only the last state is measured, and is the best",
            "eval.every",
        )
    for role, (_, decay) in experiment.ema.items():
        where = f"roles.{role}.decay"
        if callable(decay):  # it rises, and is 1 at the start only where it always is
            decay = 1 if config.roles[role].decay == 1 else None
        if decay is None:
            continue
        if decay == 1:
            hint = "below 1; what is to stay as it is, is a frozen role"
            yield Finding("comparison", "the average would never move", where, hint)
        elif decay == 0:
            yield Finding(
                "comparison", "the average would be its source", where, "above 0, or one network"
            )
        elif (left := decay**total) > 0.5:
            yield Finding(
                "warning",
                f"after {total} steps the average is still {left:.0%} of what it started from",
                where,
            )
    check_accumulation(experiment.objective, config.accum_steps)
    micro = config.batch_size // config.accum_steps
    if micro == 1:
        for role in experiment.trainable:
            if "batch_stats" in experiment.shapes.roles[role].state:
                yield Finding(
                    "error",
                    f"{role} normalizes by the statistics of one example",
                    "batch_size" if config.accum_steps == 1 else "accum_steps",
                    "at least two examples a micro-batch, or a network without batch norm",
                )
        if experiment.objective.couples_batch and "views" not in experiment.shapes.batch:
            yield Finding(
                "error",
                f"{_label(experiment.objective)} compares the examples of a batch, of which there "
                "is one",
                "batch_size",
                "two or more",
            )


def _label(objective: Objective) -> str:
    inner = objective.objective if isinstance(objective, WeightedObjective) else objective
    return type(inner).__name__


# Transforms.


def of_transforms(config: ConfigDict, raw: Batch, evaluate: Transform) -> Iterator[Finding]:
    """What the transforms make of a batch: randomness in evaluation, wrong units."""
    key = jax.eval_shape(jax.random.key, 0)
    with explained("fails on these inputs", where="data.eval_transforms"):
        found = structure.dependencies(
            lambda key, raw: evaluate(key, raw, jnp.int32(0))["input"], key, dict(raw)
        )
    if any(0 in leaf for leaf in jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, set))):
        yield Finding(
            "error",
            "evaluation draws random numbers: its transforms augment",
            "data.eval_transforms",
            "those without randomness, such as normalize",
        )
    both = {path: config.data[path] for path in ("train_transforms", "eval_transforms")}
    for path, names in both.items():
        for name in names:
            if names.count(name) > 1:
                yield Finding(
                    "error", f"{name!r} is listed twice and applied once", f"data.{path}", "once"
                )
    nested = json.dumps(config.data.transform_kwargs.to_dict(), default=str)
    for name in _VALUES:
        lists = [path for path, names in both.items() if name in names]
        if len(lists) == 1 and not re.search(rf'"{name}"(?!:)', nested):
            other = next(path for path in both if path not in lists)
            yield Finding(
                "error",
                f"{name!r} is in data.{lists[0]} alone, so that networks are evaluated on other "
                "inputs than they learn from",
                f"data.{other}",
                f"add {name!r}",
            )
    images = raw["input"]
    if isinstance(images, Mapping) or images.dtype != jnp.uint8:
        return
    for name, kwargs in config.data.transform_kwargs.items():
        if name != "normalize":
            continue
        for part in ("mean", "std"):
            values = np.atleast_1d(np.asarray(kwargs.get(part, 0.5), np.float64))
            if values.max() > 1:
                yield Finding(
                    "error",
                    f"{part} {tuple(values.tolist())} is in grey levels, and pixels are scaled to "
                    "[0, 1] before",
                    f"data.transform_kwargs.normalize.{part}",
                    "divide by 255",
                )


# Data.


def of_data(
    dataset: Dataset, found: Mapping[str, checks.Overlap] | None = None
) -> Iterator[Finding]:
    """Examples that are in two parts; `found` is `checks.overlaps` where it is known."""
    parts = {name: getattr(dataset, name) for name in checks.PARTS}
    parts = {name: part for name, part in parts.items() if len(part)}
    for first, second in itertools.combinations(parts, 2):
        if checks.root(parts[first]) is checks.root(parts[second]):
            both = np.intersect1d(example_ids(parts[first]), example_ids(parts[second]))
            if len(both):
                yield Finding(
                    "error",
                    f"{len(both)} examples are in the {first} and in the {second} part",
                    "data",
                    "parts that share nothing; data.held_out carves one off",
                )
    for name, overlap in (checks.overlaps(dataset) if found is None else found).items():
        if overlap.repeated == overlap.of >= 8 and overlap.whole:
            yield Finding(
                "error",
                f"all {overlap.of} examples of the {name} part are in the training part too",
                "data",
                "data that training does not see",
            )
        elif overlap.repeated:
            yield Finding("warning", overlap.spell(name), "data")


# Teachers.


def of_teachers(config: ConfigDict, frozen: Sequence[Role], dataset: Dataset) -> Iterator[Finding]:
    """What the folder of a frozen network tells of how it was trained."""
    for role in frozen:
        where = f"roles.{role}.init"
        origin = NetworkRef.parse(config.roles[role].init or "", where=where)
        try:
            step = find_step(origin.path, where=where)
            stored = read_config(step)
        except CheckpointError:
            continue  # said when it is read
        try:
            yield from teacher_saw(stored, config, where=where)
        except (KeyError, TypeError, AttributeError):  # written by another version
            what = f"cannot be compared with the data here: {step} describes its own differently"
            yield Finding("warning", what, where)
        result = _result(step)
        if not result:
            continue
        theirs, ours = tuple(result.get("classes", ())), dataset.classes
        if theirs and ours and not origin.part and theirs != ours:
            if sorted(theirs) == sorted(ours):
                what = "the same classes in another order"
            elif len(theirs) == len(ours):
                what = f"other classes ({theirs[0]!r}, ... for {ours[0]!r}, ...)"
            else:
                continue
            yield Finding(
                "error", f"was trained on {what}", where, "a network of the classes of the data"
            )
        accuracy = result.get("best", {}).get("held_out/accuracy")
        if accuracy is not None and ours and accuracy < 1.5 / len(ours):
            yield Finding(
                "warning",
                f"its held-out accuracy is {accuracy:.3f}, chance is {1 / len(ours):.3f}",
                where,
            )


def _result(step: pathlib.Path) -> dict[str, Any]:
    for folder in step.parents[:2]:
        try:
            result = read_json(folder / "result.json", shape={"classes": list, "best": NUMBERS})
        except DamagedFile:
            continue
        if all(isinstance(name, str) for name in result["classes"]):
            return result
    return {}


def teacher_saw(stored: Mapping[str, Any], config: ConfigDict, *, where: str) -> Iterator[Finding]:
    """Compares what a network was trained on with what it is asked about.

    Args:
      stored: the config of the run that trained it.
      config: of the run that asks it.
      where: the config path of its checkpoint.
    """
    theirs, ours = stored["data"], config.data.to_dict()
    if _inputs(theirs) != _inputs(ours):
        kinds = "error" if theirs["name"] == ours["name"] else "warning"
        yield Finding(
            kinds,
            f"was evaluated on inputs after {_spell(theirs)}, and is asked after {_spell(ours)}",
            where,
            "the same data.eval_transforms and transform_kwargs",
        )
    same = theirs["name"] == ours["name"] and theirs["kwargs"] == ours["kwargs"]
    if same and theirs["held_out"] < ours["held_out"]:
        yield Finding(
            "warning",
            f"held out {theirs['held_out']:g} of the data and saw examples that are held out here "
            f"({ours['held_out']:g})",
            where,
        )


def _inputs(data: Mapping[str, Any]) -> list[Any]:
    """What happens to the numbers of an input in evaluation, comparable."""
    return json.loads(
        json.dumps([[n, data["transform_kwargs"].get(n, {})] for n in data["eval_transforms"]])
    )


def _spell(data: Mapping[str, Any]) -> str:
    parts = [
        f"{name}({', '.join(f'{k}={v}' for k, v in kwargs.items())})"
        for name, kwargs in _inputs(data)
    ]
    return ", ".join(parts) or "no transforms"


# The step.


class _Watched(BoundNets):
    """Networks that remember who was called in training mode, and who at all."""

    calls: set[tuple[Role, bool]]

    def __call__(
        self, role: Role, *inputs: Any, train: bool = False, stop_gradient_params: bool = False
    ) -> tuple[Outputs, State]:
        self.calls.add((role, train))
        return super().__call__(
            role, *inputs, train=train, stop_gradient_params=stop_gradient_params
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traced:
    """What one trace of the loss and its gradient shows.

    Attributes:
      dead: (role, path) of trainable parameters whose gradient is zero by structure.
      moves: those of them that the loss depends on, through what has no gradient.
      roles: networks that the loss, the memory or the survey depends on.
      batch: names of parts of the batch that the loss depends on.
      leaks: those that say what a label is, and that gradient, memory or survey depend on where
        every label is hidden.
      weightless: terms whose coefficient is the constant zero.
      never: terms whose coefficient depends on the step, and is zero at each.
      repeated: whether a softmax is taken of a softmax.
      calls: (role, train) of all calls.
      state: roles whose state the objective returns.
      read: fields of the objective and of the weighting that were read.
    """

    dead: tuple[tuple[Role, str], ...]
    moves: frozenset[tuple[Role, str]]
    roles: frozenset[Role]
    batch: frozenset[str]
    leaks: frozenset[str]
    weightless: tuple[str, ...]
    never: tuple[str, ...]
    repeated: bool
    calls: frozenset[tuple[Role, bool]]
    state: frozenset[Role]
    read: Mapping[str, frozenset[str]]


def trace(experiment: Experiment) -> Traced:
    """Traces loss and gradient of an experiment on shapes."""
    shapes = experiment.shapes
    read: dict[str, set[str]] = {"objective": set(), "weighting": set()}
    objective = _watched(experiment.objective, read)
    calls: set[tuple[Role, bool]] = set()
    returned: set[Role] = set()
    learned = {r: shapes.roles[r].params for r in experiment.trainable}
    fixed = {r: s.params for r, s in shapes.roles.items() if r not in learned}
    state = {r: s.state for r, s in shapes.roles.items()}

    terms_of = objective.loss
    if isinstance(objective, WeightedObjective) and objective.weighting.by_gradient:
        terms_of = objective.loss_terms_of  # weights that start as constants

    def run(learned, fixed, state, memory, batch, key, step):
        def nets_of(params):
            nets = _Watched(experiment.models, {**fixed, **params}, state, key=key)
            nets.calls = calls
            return nets

        def loss(params):
            terms = terms_of(nets_of(params), batch, memory, step)
            returned.update(terms.state)
            value, _ = mean_loss(terms, batch["mask"], jnp.maximum(batch["mask"].sum(), 1))
            coef = {name: jnp.asarray(c, jnp.float32) for name, c in terms.coef.items()}
            return value, (coef, terms.memory)

        (value, (coef, new)), grads = jax.value_and_grad(loss, has_aux=True)(learned)
        dataset_pass = ()
        if objective.needs_dataset_pass:
            dataset_pass = objective.dataset_pass(nets_of(learned), batch, memory, step)
        objective.predictions(ShapeNets(experiment.models), batch, memory, step)
        return {
            "loss": value,
            "coef": coef,
            "memory": new,
            "dataset_pass": dataset_pass,
            "grads": grads,
        }

    key = jax.eval_shape(jax.random.key, 0)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    args = (learned, fixed, state, shapes.memory, dict(shapes.batch), key, step)
    found = structure.analyse(run, *args)
    dependences, names = found.dependences, _names(args)
    leaves = lambda part: jax.tree.leaves(dependences[part], is_leaf=structure.is_dependence)  # noqa: E731
    used = 0
    for dependence in (*leaves("loss"), *leaves("memory"), *leaves("dataset_pass")):
        used |= dependence.inputs
    on = [names[i].split("/") for i in structure.positions(used)]
    trainable = [name.partition("/")[::2] for name in _names(learned)]
    dead = tuple(
        (role, path)
        for (role, path), dependence in zip(trainable, leaves("grads"), strict=True)
        if dependence.zero or not dependence.inputs
    )
    moved = {(parts[1], "/".join(parts[2:])) for parts in on if parts[0] == "0"}
    return Traced(
        dead=dead,
        moves=frozenset(moved),
        roles=frozenset(parts[1] for parts in on if parts[0] in ("0", "1")),
        batch=frozenset(parts[1] for parts in on if parts[0] == "4"),
        leaks=_leaks(run, args) if "labelled" in shapes.batch else frozenset(),
        weightless=tuple(
            name for name, dependence in dependences["coef"].items() if dependence.zero
        ),
        never=_never(dependences["coef"], names, experiment),
        repeated=bool(found.repeated),
        calls=frozenset(calls),
        state=frozenset(returned),
        read={name: frozenset(found) for name, found in read.items()},
    )


def _leaks(run: Callable[..., Mapping[str, PyTree]], args: tuple[Any, ...]) -> frozenset[str]:
    """Returns which of `LABELS` what is learned depends on where `labelled` is 0 throughout."""

    def hidden(learned, fixed, state, memory, batch, *rest):
        batch = {**batch, "labelled": jnp.zeros_like(batch["labelled"])}
        found = run(learned, fixed, state, memory, batch, *rest)
        return found["grads"], found["memory"], found["dataset_pass"]

    dependences = jax.tree.leaves(
        structure.dependence_of(hidden, *args), is_leaf=structure.is_dependence
    )
    used = set().union(
        *(
            structure.positions(dependence.inputs)
            for dependence in dependences
            if not dependence.zero
        )
    )
    names = _names(args)
    return LABELS & {names[i].split("/")[1] for i in used if names[i].startswith("4/")}


def _names(tree: Any) -> list[str]:
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _never(
    coef: Mapping[str, structure.Dependence], names: Sequence[str], experiment: Experiment
) -> tuple[str, ...]:
    """Returns the terms whose coefficient is zero throughout: those of the step are computed."""
    on_step = 1 << (len(names) - 1)
    scheduled = [name for name, dependence in coef.items() if dependence.inputs == on_step]
    if not scheduled:
        return ()
    shapes = experiment.shapes

    def at(step):
        nets = ShapeNets(experiment.models)
        batch, memory = zeros(shapes.batch), zeros(shapes.memory)
        terms = experiment.objective.loss(nets, batch, memory, step)
        return {name: terms.coef[name] for name in scheduled}

    total = experiment.total_steps
    steps = np.unique(np.linspace(0, total - 1, 65).astype(np.int32))
    values = jax.device_get(jax.jit(jax.vmap(at))(steps))
    return tuple(name for name, value in values.items() if not np.any(value))


class _RandomNets:
    """Networks that answer every call with random numbers of the shapes that they have in a run."""

    def __init__(self, experiment: Experiment, draw: Callable[[Any], Array]):
        self._models, self._shapes, self._draw = experiment.models, experiment.shapes.roles, draw

    def __call__(
        self, role: Role, *inputs: Any, train: bool = False, stop_gradient_params: bool = False
    ) -> tuple[Outputs, State]:
        del stop_gradient_params
        seen = self._shapes[role]
        now, before = jax.tree.leaves(inputs), jax.tree.leaves(seen.inputs)
        rows = {x.shape[0] / y.shape[0] for x, y in zip(now, before, strict=False) if x.ndim}
        alike = [x.shape[1:] for x in now] == [x.shape[1:] for x in before]
        if alike and len(rows) == 1 and all(x.ndim for x in seen.outputs.values()):
            [ratio], b = rows, before[0].shape[0]
            outputs, state = dict(seen.outputs), seen.state
            for name, x in outputs.items():
                if x.shape[0] % b == 0:  # per example, unlike a learned vector
                    shape = (round(x.shape[0] * ratio), *x.shape[1:])
                    outputs[name] = jax.ShapeDtypeStruct(shape, x.dtype)
        else:
            found, state = ShapeNets(self._models)(role, *inputs, train=train)
            outputs = {name: found[name] for name in seen.outputs if name in found}
        return {name: self._draw(x.shape) for name, x in outputs.items()}, zeros(state)

    def after_sgd_step(
        self, role: Role, loss: Callable[[Any], Array], *, lr: float
    ) -> "_RandomNets":
        del role, lr
        loss(self)
        return self


def constant_terms(experiment: Experiment) -> dict[str, float]:
    """Returns the terms that are one number whatever the networks return, with that number.

    The objective is computed on random outputs in place of those of its networks, of several sizes,
    for a small batch, at several steps, and twice in a row, since a memory may be empty at first. A
    method that cannot be computed like this has no finding.
    """
    shapes, total = experiment.shapes, experiment.total_steps
    objective = experiment.objective
    inner = objective.objective if isinstance(objective, WeightedObjective) else objective
    small = min(shapes.batch["mask"].shape[0], PROBED_ROWS)
    classes = max(len(experiment.dataset.classes), 2)

    def once(pool: Array, step: Any) -> tuple[Any, Any]:
        random = np.random.default_rng(0)

        def normal(shape: Sequence[int]) -> Array:
            if math.prod(shape) > LARGEST_PROBED:
                raise ValueError(f"outputs of shape {shape}")
            few = min(math.prod(shape), len(pool) // 2)
            start = int(random.integers(len(pool) - few))
            return jnp.resize(pool[start : start + few], shape)

        def part(x: Any, name: str) -> Any:
            shape = (small, *x.shape[1:])
            if name in ("mask", "labelled"):
                return np.ones(shape, x.dtype)
            if name == "index":
                return np.arange(small, dtype=x.dtype)
            if name == "label_probs":
                return random.dirichlet(np.ones(shape[-1]), shape[:-1]).astype(x.dtype)
            if not jnp.issubdtype(x.dtype, jnp.floating):
                return random.integers(classes if name == "label" else 2, size=shape).astype(
                    x.dtype
                )
            return normal(shape).astype(x.dtype)

        batches = [
            {
                name: jax.tree.map(functools.partial(part, name=name), leaves)
                for name, leaves in shapes.batch.items()
            }
            for _ in range(2)
        ]
        memory = inner.memory(jax.random.key(0), batches[0])
        for batch in batches:
            batch = jax.tree.map(jnp.asarray, batch)
            terms = inner.loss(_RandomNets(experiment, normal), batch, memory, step)
            memory = memory if terms.memory is None else terms.memory
        values = dict(terms.values)
        return jax.tree.map(jnp.min, values), jax.tree.map(jnp.max, values)

    try:
        random, found = np.random.default_rng(1), []
        pool = jax.ShapeDtypeStruct((2**15,), jnp.float32)
        lowered = jax.jit(once).lower(pool, jax.ShapeDtypeStruct((), jnp.int32))
        options: Any = {"xla_backend_optimization_level": "0"}
        compiled = lowered.compile(options if jax.default_backend() == "cpu" else None)
        for i, scale in enumerate((0.3, 1.0, 3.0, 10.0, 30.0)):
            drawn = scale * random.standard_normal(pool.shape).astype(np.float32)
            step = np.int32(i * (total - 1) // 4)
            found.append(jax.device_get(compiled(drawn, step)))
    except UserError:
        raise
    except Exception:
        return {}
    constant = {}
    for name in found[0][0]:
        low, high = min(x[name] for x, _ in found), max(x[name] for _, x in found)
        if high - low <= 1e-6 * max(1.0, abs(low)):  # false for what is not finite
            constant[name] = float(low)
    return constant


def _watched(objective: Objective, read: dict[str, set[str]]) -> Objective:
    """Returns the objective, with its fields and those of its weighting noted as they are read."""
    if not isinstance(objective, WeightedObjective):
        return _noting(objective, read["objective"])
    return dataclasses.replace(
        objective,
        objective=_noting(objective.objective, read["objective"]),
        weighting=_noting(objective.weighting, read["weighting"]),
    )


def _noting(thing: Any, read: set[str]) -> Any:
    cls = type(thing)

    def __getattribute__(self: Any, name: str) -> Any:
        read.add(name)
        return object.__getattribute__(self, name)

    noting = type(cls.__name__, (cls,), {"__getattribute__": __getattribute__})
    copy = object.__new__(noting)
    copy.__dict__.update(vars(thing))
    for name in ("roles", "auxiliary", "couples_batch", "surveys"):  # of the framework
        getattr(copy, name, None)
    return copy


def _named_in_class(cls: type) -> set[str]:
    """Returns every name in the code of a class, some of which runs on the host alone."""
    functions = (x for base in cls.__mro__ for x in vars(base).values() if inspect.isfunction(x))
    names, left = set(), [function.__code__ for function in functions]
    while left:
        code = left.pop()
        names |= set(code.co_names) if code.co_name != "__post_init__" else set()
        left += [c for c in code.co_consts if inspect.iscode(c)]
    return names


def of_step(experiment: Experiment) -> Iterator[Finding]:
    """What a trace of the step shows."""
    traced = trace(experiment)
    yield from _of_calls(experiment, traced)
    if traced.repeated:
        networks = experiment.shapes.roles.items()
        guilty = [r for r, s in networks if _gives_probabilities(experiment.models[r], s)]
        role = guilty[0] if guilty else None
        if role is None:
            what = f"{_label(experiment.objective)} takes a softmax of what is a softmax already"
            yield Finding("error", what, "objective", "give the loss logits")
        else:
            yield Finding(
                "error",
                f"the logits of {role} are probabilities already, and the loss takes a softmax of "
                "them",
                f"roles.{role}.model",
                "return the numbers before the softmax",
            )
    yield from _of_batch(experiment, traced)
    yield from _of_class_means(experiment)
    used = traced.roles | {
        *weighted_objective.networks(experiment.objective),
        *_predicting(experiment),
    }
    roles = (*experiment.trainable, *experiment.frozen, *experiment.ema)
    unreached = [role for role in roles if role not in used]
    for term in traced.never:
        yield Finding(
            "error",
            f"the weight of the term {term!r} is 0 at each of the {experiment.total_steps} steps",
            "objective.kwargs",
            "a schedule that fits the length of training",
        )
    yield from _of_constants(experiment, traced)
    if unreached and traced.weightless:
        yield Finding(
            "comparison",
            f"{', '.join(unreached)} would run in every step for "
            f"{', '.join(map(repr, traced.weightless))}, which weighs nothing",
            "objective.kwargs",
            "another weight, or an objective without the term",
        )
    elif traced.weightless and _set_to_an_end(experiment):
        yield Finding(
            "warning",
            f"{', '.join(map(repr, traced.weightless))} weighs nothing at any step",
            "objective.kwargs",
        )
    read = {role for evaluator in experiment.evaluators.values() for role in evaluator.outputs}
    for role in unreached if not traced.weightless else ():
        if role in experiment.frozen or (role in experiment.ema and role not in read):
            yield Finding(
                "error",
                f"nothing that is learned depends on {role}",
                f"roles.{role}",
                "an objective that uses what it says, or no such role",
            )
    yield from _of_dead(experiment, traced)
    yield from _of_unread(experiment, traced)


def _of_constants(experiment: Experiment, traced: Traced) -> Iterator[Finding]:
    idle = {*traced.weightless, *traced.never}
    constant = {n: v for n, v in constant_terms(experiment).items() if n not in idle}
    if constant.keys() == experiment.shapes.terms.values.keys() - idle:
        spelt = ", ".join(f"{name!r} is {value:.4g}" for name, value in constant.items())
        yield Finding(
            "error",
            f"the loss is constant whatever the networks return: {spelt}, and no other term has a "
            "weight",
            "objective",
            "another objective, other weights, or data that it is made for",
        )
        return
    for name, value in constant.items():
        yield Finding(
            "comparison",
            f"the term {name!r} is {value:.4g} whatever the networks return, so that it teaches "
            "nothing",
            "objective",
            "a weight of 0 for it, another objective, or data that it is made for",
        )


def _predicting(experiment: Experiment) -> set[Role]:
    """Returns the networks of the method's predictions, where evaluators read those."""
    read = {role for evaluator in experiment.evaluators.values() for role in evaluator.outputs}
    if not read & set(experiment.shapes.predictions):
        return set()
    shapes = experiment.shapes
    params = {role: found.params for role, found in shapes.roles.items()}
    state = {role: found.state for role, found in shapes.roles.items()}

    def predict(params, state, batch, memory, key):
        nets = BoundNets(experiment.models, params, state, key=key)
        return experiment.objective.predictions(nets, batch, memory, jnp.int32(0))

    key = jax.eval_shape(jax.random.key, 0)
    found = structure.dependencies(predict, params, state, dict(shapes.batch), shapes.memory, key)
    on = set().union(*jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, set)))
    names = _names(params)
    return {names[i].partition("/")[0] for i in on if i < len(names)}


def _set_to_an_end(experiment: Experiment) -> bool:
    """Whether the config sets a share or a weight to an end that is not the method's default."""
    objective = experiment.objective
    inner = objective.objective if isinstance(objective, WeightedObjective) else objective
    defaults = _defaults(inner)
    kwargs = experiment.config.objective.kwargs.items()
    return any(
        isinstance(value, (int, float)) and value in (0, 1) and value != defaults.get(name)
        for name, value in kwargs
    )


def _defaults(thing: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass with their defaults, and nothing of anything else."""
    if not dataclasses.is_dataclass(thing):
        return {}
    return {field.name: field.default for field in dataclasses.fields(thing)}


def _of_calls(experiment: Experiment, traced: Traced) -> Iterator[Finding]:
    for role in experiment.frozen:
        if (role, True) in traced.calls and experiment.shapes.roles[role].state:
            yield Finding(
                "error",
                f"{role} is frozen and is called in training mode: its answers would depend on "
                "the other examples of the batch",
                f"roles.{role}",
                "nets(role, ..., train=False)",
            )
    for role in experiment.trainable:
        if not experiment.shapes.roles[role].state:
            continue
        if (role, True) not in traced.calls:
            what = "is never called in training mode, so that its batch statistics stay as they are"
        elif role not in traced.state:
            what = "gets new batch statistics that the objective does not return"
        else:
            continue
        yield Finding(
            "error", f"{role} {what}", f"roles.{role}", "Terms(..., state={role: new_state})"
        )


def _gives_probabilities(model: Model, shapes: RoleShapes) -> bool:
    def apply(params, state, key, *inputs):
        outputs, _ = model.apply(params, state, *inputs, train=False, rngs={"dropout": key})
        return outputs.get("logits", ())

    key = jax.eval_shape(jax.random.key, 0)
    found = structure.dependence_of(apply, shapes.params, shapes.state, key, *shapes.inputs)
    return any(
        dependence.tag == ("softmax", None)
        for dependence in jax.tree.leaves(found, is_leaf=structure.is_dependence)
    )


def _of_batch(experiment: Experiment, traced: Traced) -> Iterator[Finding]:
    batch, reads = experiment.shapes.batch, traced.batch
    if "label_probs" in batch and "label" in reads and "label_probs" not in reads:
        yield Finding(
            "error",
            f"inputs are mixed and {_label(experiment.objective)} reads the labels before mixing",
            "data.train_transforms",
            "leave out mixup and cutmix, or take an objective that reads label_probs",
        )
    if "teacher_input" in batch and "teacher_input" not in reads:
        yield Finding(
            "error",
            f"{_label(experiment.objective)} never looks at the teacher's own view",
            "data.teacher_view",
            "same, or an objective whose teacher sees teacher_input",
        )
    if traced.leaks:
        percent = experiment.config.data.corrupt.get("labels_percent")
        who = _label(experiment.objective)
        if isinstance(experiment.objective, WeightedObjective):
            who += f" weighed by {type(experiment.objective.weighting).__name__}"
        mixed = "label_probs" in traced.leaks
        yield Finding(
            "error",
            f"{who} reads labels that are hidden",
            f"data.corrupt.labels_{'percent' if percent else 'per_class'}",
            ("leave out mixup and cutmix, or " if mixed else "")
            + "set data.corrupt.drop_unlabelled, or take a method that uses a label only where "
            "labelled is above 0",
        )
    if not reads & {"input", "views", "local_views", "teacher_input"}:
        yield Finding(
            "error",
            f"the loss of {_label(experiment.objective)} does not depend on the data",
            "objective",
        )


def _of_class_means(experiment: Experiment) -> Iterator[Finding]:
    objective = experiment.objective
    if not isinstance(objective, WeightedObjective):
        return
    on = weighted_objective.roles_of_class_means(objective, experiment.models, experiment.shapes)
    for role in sorted(on - set(experiment.frozen)):
        yield Finding(
            "error",
            f"{type(objective.weighting).__name__} compares with class means of a teacher, which "
            f"are taken before the first step, and {role} moves",
            "weighting.name",
            f"freeze {role}, or take blocks or a granularity that need no class means",
        )


def _of_dead(experiment: Experiment, traced: Traced) -> Iterator[Finding]:
    weighting = weighted_objective.networks(experiment.objective)
    for role in experiment.trainable:
        dead = [path for r, path in traced.dead if r == role]
        if not dead or role in weighting:
            continue
        where = f"roles.{role}"
        still = [path for path in dead if (role, path) in traced.moves]
        if still:
            yield Finding(
                "comparison",
                f"{_some(still)} could never learn: the loss depends on it only through what has "
                "no gradient",
                where,
                "no stop_gradient, argmax or rounding between it and the loss, or freeze the role",
            )
        others = [path for path in dead if path not in still]
        if not others or (traced.weightless and role not in traced.roles):
            continue
        if role not in traced.roles:
            yield Finding(
                "error", f"the loss depends on nothing of {role}", where, "delete the role"
            )
            continue
        outputs = _outputs_of(experiment.models[role], experiment.shapes.roles[role])
        reached = {path: outputs[path] for path in others}
        nowhere = [path for path, names in reached.items() if not names]
        if nowhere:
            yield Finding(
                "error",
                f"{_some(nowhere)} could never learn: nothing that the network returns depends on "
                "it",
                where,
                "use it, or leave it out of the network",
            )
        for name, evaluator in experiment.evaluators.items():
            read = set(evaluator.outputs.get(role, ()))
            random = [path for path, names in reached.items() if names & read]
            if random:
                yield Finding(
                    "error",
                    f"reads {', '.join(sorted(read))} of {role}, and {_some(random)} gets no "
                    "gradient",
                    f"evaluators.{name}",
                    "an evaluator of what is trained",
                )
        idle = [path for path, names in reached.items() if names]
        if idle:
            names = sorted(set().union(*(reached[path] for path in idle)))
            what = f"{_some(idle)} is not trained: the loss reads no {', '.join(names)}"
            yield Finding("warning", what, where)


def _some(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 2} more" if len(paths) > 2 else ""
    return ", ".join(paths[:2]) + more


def _outputs_of(model: Model, shapes: RoleShapes) -> dict[str, set[str]]:
    """Returns the names of the outputs in which each parameter has a part."""

    def apply(params, state, key, *inputs):
        outputs, _ = model.apply(params, state, *inputs, train=True, rngs={"dropout": key})
        return dict(outputs)

    key = jax.eval_shape(jax.random.key, 0)
    found = structure.dependencies(apply, shapes.params, shapes.state, key, *shapes.inputs)
    names = _names(shapes.params)
    return {path: {name for name, on in found.items() if i in on} for i, path in enumerate(names)}


def _of_unread(experiment: Experiment, traced: Traced) -> Iterator[Finding]:
    config, objective = experiment.config, experiment.objective
    things: dict[str, Any] = {"objective": objective}
    if isinstance(objective, WeightedObjective):
        things = {"objective": objective.objective, "weighting": objective.weighting}
    for group, thing in things.items():
        if group == "weighting" and thing.by_gradient:
            continue
        fields = _defaults(thing)
        host = _named_in_class(type(thing)) if getattr(thing, "surveys", False) else set()
        for name, value in config[group].kwargs.items():
            if name in fields and name not in traced.read[group] | host and value != fields[name]:
                yield Finding(
                    "unused",
                    f"{type(thing).__name__} does not read it with the other arguments as they are",
                    f"{group}.kwargs.{name}",
                    "leave it out",
                )
    if (
        isinstance(objective, WeightedObjective)
        and experiment.outer is None
        and objective.control == "none"
    ):
        template = config_lib.flatten(config_lib.base().bilevel)
        for name, value in config_lib.flatten(config.bilevel).items():
            if value != template.get(name):
                yield Finding(
                    "unused",
                    f"{config.weighting.name} does not learn",
                    f"bilevel.{name}",
                    "leave it at its default",
                )
