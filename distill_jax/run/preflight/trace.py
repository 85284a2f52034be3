"""One trace of the loss and its gradient on shapes, and its findings."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.analysis import dependence, softmax, walk
from distill_jax.core.api import Objective, Outputs, PyTree, Role, State
from distill_jax.core.means import mean_loss
from distill_jax.core.partition import named_leaves
from distill_jax.core.state import ShapeNets
from distill_jax.core.steps import BoundNets
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.run.build import Experiment
from distill_jax.run.preflight.unread import noting

LABELS = frozenset({"label", "label_probs"})
"""Parts of a batch that contain label information."""


class Inputs(NamedTuple):
    """What a step is given; `learned` and `fixed` are parameters by role."""

    learned: Any
    fixed: Any
    state: Any
    memory: Any
    batch: Any
    key: Any
    step: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traced:
    """The findings of one trace of the loss and its gradient.

    Attributes:
      dead: paths of trainable parameters, by role, whose gradient is zero by structure.
      moves: "role/path" of all trainable parameters that the loss depends on, including through
        paths without a gradient.
      roles: networks that the loss, the memory or the dataset pass depends on.
      batch: names of parts of the batch that they depend on.
      leaks: those of `LABELS` that gradient, memory or dataset pass depend on although every label
        is hidden.
      coef: for each term, the dependencies of its coefficient.
      repeated: whether a softmax is taken of a softmax.
      calls: (role, train) of all calls.
      state: roles whose state the objective returns.
      read: fields of the objective and of the weighting that were read.
    """

    dead: Mapping[Role, list[str]]
    moves: frozenset[str]
    roles: frozenset[Role]
    batch: frozenset[str]
    leaks: frozenset[str]
    coef: Mapping[str, dependence.Dependence]
    repeated: bool
    calls: frozenset[tuple[Role, bool]]
    state: frozenset[Role]
    read: Mapping[str, set[str]]


def trace(experiment: Experiment) -> Traced:
    """Traces loss and gradient of an experiment on shapes."""
    inputs, read = inputs_of(experiment), {"objective": set(), "weighting": set()}
    objective = _watched(experiment.objective, read)
    objective.phases()  # which may read arguments too
    calls: set[tuple[Role, bool]] = set()
    returned: set[Role] = set()
    terms_of = objective.loss
    if isinstance(objective, WeightedObjective) and objective.weighting.by_gradient:
        terms_of = objective.loss_terms_of  # weights that start as constants

    def run(given: Inputs) -> dict[str, PyTree]:
        batch, memory, step = given.batch, given.memory, given.step

        def nets_of(learned):
            params = {**given.fixed, **learned}
            nets = _Watched(experiment.models, params, given.state, key=given.key, batch=batch)
            nets.calls = calls
            return nets

        def loss(learned):
            terms = terms_of(nets_of(learned), batch, memory, step)
            returned.update(terms.state)
            value, _ = mean_loss(terms, batch["mask"])
            coef = {name: jnp.asarray(c, jnp.float32) for name, c in terms.coef.items()}
            return value, (coef, terms.memory)

        (value, (coef, new)), grads = jax.value_and_grad(loss, has_aux=True)(given.learned)
        dataset_pass = ()
        if objective.needs_dataset_pass:
            dataset_pass = objective.dataset_pass(nets_of(given.learned), batch, memory, step)
        objective.predictions(ShapeNets(experiment.models, batch), batch, memory, step)
        return {
            "loss": value,
            "coef": coef,
            "grads": grads,
            "memory": new,
            "dataset_pass": dataset_pass,
        }

    traced = walk.trace(run, inputs)
    result = dependence.of_trace(traced)
    used = dependence.union([result["loss"], result["memory"], result["dataset_pass"]])
    dead: dict[Role, list[str]] = {role: [] for role in inputs.learned}
    for name, gradient in named_leaves(result["grads"]).items():
        role, _, path = name.partition("/")
        dead[role] += [path] if gradient.dead else []
    return Traced(
        dead=dead,
        moves=below(used, "learned"),
        roles=first_of(used, "learned") | first_of(used, "fixed"),
        batch=first_of(used, "batch"),
        leaks=_leaks(run, inputs),
        coef=result["coef"],
        repeated=softmax.repeated(traced),
        calls=frozenset(calls),
        state=frozenset(returned),
        read=read,
    )


def inputs_of(experiment: Experiment) -> Inputs:
    """Returns the shapes of the inputs of a step."""
    shapes, learned = experiment.shapes, experiment.trainable
    params = {role: network.params for role, network in shapes.roles.items()}
    return Inputs(
        learned={role: params[role] for role in learned},
        fixed={role: params[role] for role in params if role not in learned},
        state={role: network.state for role, network in shapes.roles.items()},
        memory=shapes.memory,
        batch=dict(shapes.batch),
        key=jax.eval_shape(jax.random.key, 0),
        step=jax.ShapeDtypeStruct((), jnp.int32),
    )


def below(used: frozenset[str], field: str) -> frozenset[str]:
    """Returns the used paths within one field of `Inputs`, the single argument."""
    start = f"0/{field}/"
    return frozenset(name.removeprefix(start) for name in used if name.startswith(start))


def first_of(used: frozenset[str], field: str) -> frozenset[str]:
    """Returns the roles, or the parts of the batch, of those paths."""
    return frozenset(path.split("/")[0] for path in below(used, field))


def label(objective: Objective) -> str:
    """Returns the name of a method, with or without a weighting."""
    return type(method_of(objective)).__name__


def method_of(objective: Objective) -> Objective:
    """Returns the method itself, without its weighting."""
    return objective.objective if isinstance(objective, WeightedObjective) else objective


def _leaks(run: Callable[[Inputs], Mapping[str, PyTree]], inputs: Inputs) -> frozenset[str]:
    """Returns which of `LABELS` affect learning although `labelled` is 0 for every example."""
    if "labelled" not in inputs.batch:
        return frozenset()

    def hidden(given: Inputs) -> list[PyTree]:
        labelled = jnp.zeros_like(given.batch["labelled"])
        result = run(given._replace(batch={**given.batch, "labelled": labelled}))
        return [result["grads"], result["memory"], result["dataset_pass"]]

    leaves = jax.tree.leaves(dependence.of(hidden, inputs))
    used = dependence.union([leaf for leaf in leaves if not leaf.zero])
    return LABELS & first_of(used, "batch")


class _Watched(BoundNets):
    """Networks that record which roles were called, and whether in training mode."""

    calls: set[tuple[Role, bool]]

    def __call__(
        self, role: Role, *inputs: Any, train: bool = False, stop_gradient_params: bool = False
    ) -> tuple[Outputs, State]:
        self.calls.add((role, train))
        return super().__call__(
            role, *inputs, train=train, stop_gradient_params=stop_gradient_params
        )


def _watched(objective: Objective, read: dict[str, set[str]]) -> Objective:
    """Returns the objective, recording reads of its fields and of those of its weighting."""
    if not isinstance(objective, WeightedObjective):
        return noting(objective, read["objective"])
    return dataclasses.replace(
        objective,
        objective=noting(objective.objective, read["objective"]),
        weighting=noting(objective.weighting, read["weighting"]),
    )
