"""Construction of a training state from an objective and its networks, by shapes first."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from distill_jax.core import rng, sampling
from distill_jax.core.api import (
    Array,
    Batch,
    Key,
    Model,
    Nets,
    Objective,
    Outputs,
    PyTree,
    Role,
    Samples,
    State,
    Terms,
    TrainState,
)
from distill_jax.core.errors import ArgumentError, explained, nearest
from distill_jax.core.precision import cast


class RoleShapes(NamedTuple):
    """Inputs, parameters and state of one network, as `jax.ShapeDtypeStruct`s."""

    inputs: tuple[PyTree, ...]
    params: PyTree
    state: PyTree
    outputs: Mapping[str, Any]


class Shapes(NamedTuple):
    """The shapes of one step, obtained without computation."""

    roles: Mapping[Role, RoleShapes]
    batch: Batch
    memory: PyTree
    terms: Terms
    predictions: Mapping[str, Mapping[str, Any]] = {}
    phases: tuple["Shapes", ...] = ()  # of each, if a method has several


def _spec(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


class _Outputs(dict):
    """Outputs by name; a missing name raises an error about the network."""

    def __init__(self, role: Role, outputs: Outputs):
        super().__init__(outputs)
        self.role = role

    def __missing__(self, name: str) -> Array:
        raise ArgumentError(
            f"the objective reads {name!r}, which {self.role} does not return",
            where=self.role,
            hint=nearest(name, self),
        )


jax.tree_util.register_pytree_node(
    _Outputs,
    lambda x: (list(x.values()), (x.role, tuple(x))),
    lambda aux, leaves: _Outputs(aux[0], dict(zip(aux[1], leaves, strict=True))),
)


@contextlib.contextmanager
def _blames(role: Role, inputs: tuple[Any, ...]) -> Iterator[None]:
    """Adds the name of a network to errors that it raises on its inputs.

    The network itself only names its own argument.
    """
    keys = ", ".join(key for x in inputs if isinstance(x, Mapping) for key in x)
    what = f"a dictionary with {keys}" if keys else "its inputs"
    try:
        with explained(f"the network fails on {what}", where=f"{role}.input"):
            yield
    except ArgumentError as error:
        if "." in error.where or ":" in error.where:
            raise
        where = f"{role}.{error.where or 'input'}"
        raise ArgumentError(error.what, where=where, hint=error.hint) from error


class ShapeNets:
    """Returns zeros of the right shapes to the calls of an objective, and records the calls.

    Args:
      models: networks by role.
      batch: the examples that the networks are called on; only sampling needs them.

    Attributes:
      seen: shapes of the first call of each role.
      sampled: the same for roles that were sampled from, with the prompt as input.
    """

    def __init__(self, models: Mapping[Role, Model], batch: Batch | None = None):
        self.models, self._batch = models, {} if batch is None else batch
        self.seen: dict[Role, RoleShapes] = {}
        self.sampled: dict[Role, RoleShapes] = {}

    def __call__(
        self, role: Role, *inputs: Any, train: bool = False, stop_gradient_params: bool = False
    ) -> tuple[Outputs, State]:
        del stop_gradient_params
        if role not in self.models:
            raise ArgumentError(
                f"the objective calls a network {role!r} that the config does not define",
                where="roles",
                hint=nearest(role, self.models),
            )
        model, specs = self.models[role], _spec(inputs)
        key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
        with _blames(role, specs):
            params, state = jax.eval_shape(model.init, key, *specs)

        def apply(params, state, key, *inputs):
            return model.apply(params, state, *inputs, train=train, rngs={"dropout": key})

        with _blames(role, specs):
            outputs, new_state = jax.eval_shape(apply, params, state, key, *specs)
        self.seen.setdefault(role, RoleShapes(specs, params, state, outputs))
        return _Outputs(role, cast(zeros(outputs), jnp.float32)), zeros(new_state)

    def sample(
        self, role: Role, prompt: Array, start: Array | None = None, **options: Any
    ) -> Samples:
        sampling.check_prompts(prompt, start, self._batch)
        reading = ShapeNets(self.models)
        reading(role, prompt)
        shapes = reading.seen[role]
        self.sampled.setdefault(role, shapes)

        def draw(params, state, key, prompt, start, batch):
            given = (role, self.models[role], params, state, prompt, start)
            return sampling.of_network(*given, batch=batch, key=key, **options)

        key = jax.eval_shape(jax.random.key, 0)
        batch = {name: x for name, x in self._batch.items() if name in ("epoch", "index")}
        specs = (shapes.params, shapes.state, key, *_spec((prompt, start, batch)))
        return zeros(jax.eval_shape(draw, *specs))

    def after_sgd_step(
        self, role: Role, loss: Callable[[Nets], Array], *, lr: float
    ) -> "ShapeNets":
        del role, lr
        loss(self)
        return self


def infer_shapes(objective: Objective, models: Mapping[Role, Model], batch: Batch) -> Shapes:
    """Runs the objective on shapes only, to obtain the inputs and outputs of each network.

    Args:
      objective: the training method.
      models: a network for each role.
      batch: `jax.ShapeDtypeStruct`s of a batch after transforms, as the objective receives it.

    Raises:
      ArgumentError: a role is missing or never called, or a term does not fit, see `check_terms`.
    """
    for role in objective.roles:
        if role not in models:
            weighting: Any = getattr(objective, "weighting", None)
            owner = weighting if role in getattr(weighting, "roles", ()) else objective
            raise ArgumentError(
                f"{type(owner).__name__} needs a network {role!r}",
                where="roles",
                hint=f"it needs {', '.join(objective.roles)}; {nearest(role, models)}",
            )
    nets = ShapeNets(models, batch)

    def run(batch):
        memory = objective.memory(jax.random.key(0), batch)
        if objective.needs_dataset_pass:
            objective.dataset_pass(nets, batch, memory, jnp.int32(0))
        return memory, objective.loss(nets, batch, memory, jnp.int32(0))

    memory, terms = jax.eval_shape(run, batch)
    check_terms(terms, batch["mask"].shape)
    seen = {**nets.sampled, **nets.seen}
    for role in models:
        if role not in seen:
            raise ArgumentError(
                f"objective {type(objective).__name__} never calls the network {role!r}",
                where=role,
                hint=f"it calls {', '.join(seen)}; delete the role",
            )

    predictions = prediction_shapes(objective, models, batch, memory)
    return Shapes(seen, batch, memory, terms, predictions)


def prediction_shapes(
    objective: Objective, models: Mapping[Role, Model], batch: Batch, memory: PyTree
) -> Mapping[str, Mapping[str, Any]]:
    """Returns the shapes of the method's predictions."""

    def predict(batch, memory):
        return objective.predictions(ShapeNets(models, batch), batch, memory, jnp.int32(0))

    return jax.eval_shape(predict, batch, memory)


def check_terms(terms: Terms, shape: tuple[int, ...]) -> None:
    """Raises `ArgumentError` unless the parts of each term have one shape and a value.

    The shape is `[b]`, or `[b, t]` where a term has counts.
    """
    for name, value in terms.values.items():
        of_tokens = value.ndim == 2 and value.shape[:1] == shape
        if value.shape != shape and not (of_tokens and name in terms.counts):
            hint = "objectives return per-example values; a [b, 1] array would broadcast"
            if of_tokens and value.shape[1] > 1:
                hint = f"values of tokens need counts[{name!r}] of the same shape, their mask"
            raise ArgumentError(
                f"loss term {name!r} has shape {value.shape}, not one value per example {shape}",
                where="objective",
                hint=hint,
            )
    for kind, arrays in (("weight", terms.weights), ("count", terms.counts)):
        for name, array in arrays.items():
            if name in terms.values and array.shape != terms.values[name].shape:
                raise ArgumentError(
                    f"{kind} {name!r} has shape {array.shape}, not that of its loss term "
                    f"{terms.values[name].shape}",
                    where="objective",
                    hint="the values, weights and counts of a term have one shape",
                )
    for name, value in terms.metrics.items():
        if jnp.shape(value) != ():
            raise ArgumentError(
                f"metric {name!r} has shape {jnp.shape(value)}, not one value per batch",
                where="objective",
                hint="metrics are scalars; per-example values are terms",
            )
    owned = (("coefficient", terms.coef), ("weight", terms.weights), ("count", terms.counts))
    for kind, names in owned:
        for name in names:
            if name not in terms.values:
                raise ArgumentError(
                    f"{kind} {name!r} has no loss term",
                    where="objective",
                    hint=nearest(name, terms.values),
                )


def make_init(
    objective: Objective,
    models: Mapping[Role, Model],
    tx: optax.GradientTransformation,
    shapes: Shapes,
    *,
    trainable: tuple[Role, ...],
    ema: Mapping[Role, Role],
) -> Callable[[Key], TrainState]:
    """Returns a pure `key -> TrainState`, to be jitted with its output shardings.

    Args:
      objective: the training method.
      models: a network for each role.
      tx: the optimizer over `{role: params}` of the trainable roles.
      shapes: from `infer_shapes`.
      trainable: roles that learn by gradient.
      ema: `{role: source}`, roles that are moving averages of trainable roles.
    """

    def init(key: Key) -> TrainState:
        params, model_state, targets = {}, {}, {}
        for role in trainable:
            inputs = zeros(shapes.roles[role].inputs)
            params[role], model_state[role] = models[role].init(
                rng.stream(key, "init", role), *inputs
            )
        for role, source in ema.items():
            targets[role] = jax.tree.map(jnp.copy, params[source])
            model_state[role] = jax.tree.map(jnp.copy, model_state[source])
        return TrainState(
            step=jnp.int32(0),
            params=params,
            targets=targets,
            model_state=model_state,
            opt_state=tx.init(params),
            memory=objective.memory(rng.stream(key, "memory"), zeros(shapes.batch)),
        )

    return init


def shifted_averages(model_state: PyTree) -> PyTree:
    """Returns a state whose moving averages are one larger, for `batch_stats_fixed_point`."""
    return jax.tree.map(lambda x: x + 1 if _is_average(x) else x, model_state)


def batch_stats_fixed_point(first: Array, last: Array, other: Array) -> Array:
    """Returns the limit of a moving average under repeated passes over the same batches.

    A pass keeps a fraction of the initial value and adds the statistics of the batches. Passes from
    two initial values that differ by 1 determine this fraction for any momentum. Leaves that are
    not averages keep their values from after the pass.

    Args:
      first: state before the pass.
      last: state after the pass.
      other: state after a pass from `first + 1`.
    """
    if not _is_average(first):
        return last
    share = other - last
    moving = (share >= 0) & (share < 0.999)
    start = jnp.where(moving, share, 0)
    return jnp.where(moving, (last - start * first) / (1 - start), last)


def _is_average(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)
