"""Checks of the arguments of a trainer, made before compilation."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.core.api import Batch, Model, Objective, Role
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.core.phases import Phase
from distill_jax.core.weighted_objective import WeightedObjective


def check_levels(
    objective: Objective, outer_optimizer: Any, bilevel: Any, accum_steps: int
) -> None:
    """Raises `ArgumentError` for incompatible arguments of a bilevel problem."""
    if outer_optimizer is None:
        if bilevel is not None:
            raise ArgumentError("bilevel needs an outer_optimizer")
        return
    if not isinstance(objective, WeightedObjective):
        raise ArgumentError("outer_optimizer needs a WeightedObjective")
    if accum_steps > 1:
        raise ArgumentError("a learned weighting needs accum_steps of 1")


def check_phases(phases: Sequence[Phase], bilevel: Any) -> None:
    """Raises `ArgumentError` where a gradient through several steps would cross two phases."""
    if len(phases) > 1 and bilevel is not None and bilevel.batches > 1:
        raise ArgumentError(
            f"the outer gradient looks over {bilevel.batches} steps, which may be of two phases of "
            "the objective",
            where="bilevel",
            hint="method exact with unroll 1, neumann, cg or two_speed",
        )


def all_models(
    networks: Mapping[Role, Model], frozen: Mapping[Role, Any], averages: Mapping[Role, Any]
) -> dict[Role, Model]:
    """Returns every network by role.

    Args:
      networks: trained networks.
      frozen: networks that are not trained, alone or as (network, params, state).
      averages: `{role: (source, decay)}`.

    Raises:
      ArgumentError: a role is given twice or is not a `Model`, or the source of an average is not
        trained.
    """
    for role, (source, _) in averages.items():
        if source not in networks:
            raise ArgumentError(
                f"averages[{role!r}] follows {source!r}, which is not a trained network",
                hint=nearest(source, networks),
            )
    groups: dict[str, Mapping[Role, Any]] = {
        "trained": networks,
        "frozen": {r: x if isinstance(x, Model) else x[0] for r, x in frozen.items()},
        "averages": {role: networks[source] for role, (source, _) in averages.items()},
    }
    models: dict[Role, Model] = {}
    for name, group in groups.items():
        for role, model in group.items():
            if role in models:
                raise ArgumentError(f"the network {role!r} is given twice", where=name)
            if not isinstance(model, Model):
                raise ArgumentError(
                    f"the network {role!r} is a {type(model).__name__}",
                    where=name,
                    hint="wrap it: from_nnx(module) or from_linen(module)",
                )
            models[role] = model
    return models


def check_kinds(objective: Any, **optimizers: Any) -> None:
    """Raises `ArgumentError` for a class of objectives, or an optimizer that is not of optax."""
    if isinstance(objective, type) or not hasattr(objective, "roles"):
        is_class = isinstance(objective, type)
        kind = "the class " * is_class + (objective if is_class else type(objective)).__name__
        hint = "an instance, such as objectives.KD(temperature=4.0)"
        raise ArgumentError(f"objective is {kind}", where="objective", hint=hint)
    for name, tx in optimizers.items():
        if tx is not None and not (callable(getattr(tx, "init", None)) and hasattr(tx, "update")):
            hint = "an optax optimizer, such as optax.adamw(1e-3)"
            raise ArgumentError(f"{name} is {tx!r}", where=name, hint=hint)


def check_key(key: Any) -> None:
    """Raises `ArgumentError` unless the key is a scalar typed key."""
    typed = hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed or key.shape:
        what = f"key is {key!r}" if isinstance(key, int) else "key is not one typed key"
        raise ArgumentError(what, where="key", hint="jax.random.key(0)")


def check_roles(objective: Objective, models: Collection[Role]) -> None:
    """Raises `ArgumentError` if a network that the objective calls is missing."""
    for role in objective.roles:
        if role not in models:
            raise ArgumentError(
                f"{type(objective).__name__} needs a network {role!r}",
                hint=f"it needs {', '.join(objective.roles)}; given: {', '.join(models)}",
            )


def check_batch(objective: Objective, batch: Batch, name: str) -> int:
    """Returns the number of examples of a batch.

    Raises:
      ArgumentError: the batch has no input, its arrays differ in length, or it has no `index` and
        the method keeps a value for each training example.
    """
    if not isinstance(batch, Mapping) or "input" not in batch:
        given = ", ".join(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ArgumentError(f"{name} has no 'input', but {given or 'nothing'}")
    sizes = {len(x) for x in jax.tree.leaves(dict(batch))}
    if len(sizes) != 1:
        shapes = {k: jax.tree.map(lambda x: x.shape, v) for k, v in batch.items()}
        raise ArgumentError(f"the arrays of {name} differ in length: {shapes}")
    inner: Any = objective
    while isinstance(inner, WeightedObjective):
        inner = inner.objective
    if "index" not in batch and hasattr(inner, "num_examples"):
        raise ArgumentError(
            f"{name} has no 'index'",
            hint=f"{type(objective).__name__} keeps a value of each training example: "
            "give its position in the training set, int32 [b]",
        )
    return sizes.pop()
