"""The step of a bilevel problem: a student learns from weighed signals, a weigher from the student.

    inner:  theta' = theta + update(grad_theta mean_i sum_s w_is(omega) L_is(theta))
    outer:  omega descends the loss of theta' on held-out examples

(Hu et al. 2024, eq. 4-5, arXiv:2312.15112, with one step in place of the inner optimum.)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from distill_jax.core import hypergradient, rng
from distill_jax.core.api import (
    Array,
    Batch,
    Key,
    Model,
    Nets,
    Params,
    PyTree,
    Role,
    State,
    Terms,
    TrainState,
)
from distill_jax.core.errors import ConfigError, nearest
from distill_jax.core.state import check_terms
from distill_jax.core.steps import BoundNets, Frozen, StepFn, mean_loss, move_targets
from distill_jax.core.weighing import Weighed

METHODS = ("exact", "finite_difference", "last_layer")
ORDERS = ("real", "virtual")


class Optimizers(NamedTuple):
    """The optimizers of both levels; `init` makes the `opt_state` of a `TrainState`.

    Attributes:
      inner: over `{role: params}` of everything that learns from the training loss.
      outer: over `{role: params}` of the weigher's networks.
      outer_roles: those networks.
    """

    inner: optax.GradientTransformation
    outer: optax.GradientTransformation
    outer_roles: tuple[Role, ...]

    def split(self, params: Mapping[Role, Params]) -> tuple[dict, dict]:
        """Returns the inner and the outer part of `{role: params}`."""
        inner = {role: p for role, p in params.items() if role not in self.outer_roles}
        return inner, {role: params[role] for role in self.outer_roles}

    def init(self, params: Mapping[Role, Params]) -> dict[str, PyTree]:
        inner, outer = self.split(params)
        return {"inner": self.inner.init(inner), "outer": self.outer.init(outer)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bilevel:
    """How the outer gradient is taken.

    Attributes:
      method: "exact"; "finite_difference", which is there to compare with; "last_layer", exact for
        a student whose other layers are held fixed in both levels, and cheap.
      order: "real": the inner step is the step of training, and the weigher learns after it;
        "virtual": the weigher learns from a step that is then made again with the new weights
        (Shu et al. 2019, algorithm 1).
      unroll: inner steps that the outer gradient goes through, on as many batches; more than one
        in virtual order only.
      part: share 1/m of the training batch over which the product is taken, every m-th example
        from a random one on. The estimate is unbiased where the examples of a batch do not depend
        on each other; under batch normalization it has the statistics of the part.
      low_memory: whether the forward-mode product makes its own forward pass, so that it need not
        wait for the inner gradient's activations: as much memory as a plain step, for one third of
        a step more.
      outer_terms: terms of the objective whose sum, over held-out examples, is the outer loss.
    """

    method: str = "exact"
    order: str = "real"
    unroll: int = 1
    part: float = 1.0
    low_memory: bool = False
    outer_terms: tuple[str, ...] = ("cross_entropy",)

    def __post_init__(self):
        for name, options in (("method", METHODS), ("order", ORDERS)):
            if (value := getattr(self, name)) not in options:
                hint = nearest(value, options)
                raise ConfigError(f"unknown {name} {value!r}", where=f"bilevel.{name}", hint=hint)
        if not 0 < self.part <= 1 or abs(1 / self.part - round(1 / self.part)) > 1e-6:
            raise ConfigError(
                f"part is {self.part}", where="bilevel.part", hint="1 divided by a whole number"
            )
        if self.unroll < 1:
            raise ConfigError(f"unroll is {self.unroll}", where="bilevel.unroll", hint="at least 1")
        if self.unroll > 1 and (self.order, self.method, self.part) != ("virtual", "exact", 1.0):
            raise ConfigError(
                f"{self.unroll} inner steps with order={self.order}, method={self.method}, "
                f"part={self.part}",
                where="bilevel.unroll",
                hint="several steps go with order=virtual, method=exact and part=1",
            )
        if self.method == "last_layer" and self.part < 1:
            raise ConfigError(
                "the last layer's product costs next to nothing on the whole batch",
                where="bilevel.part",
                hint="set part to 1",
            )

    @property
    def stride(self) -> int:
        """m of `part = 1 / m`."""
        return round(1 / self.part)


class _Outs(NamedTuple):
    """What of a batch depends on the inner parameters and is differentiated."""

    values: Mapping[str, Array]
    logits: Mapping[Role, Array]


class _Problem:
    """The two losses of one step, as functions of inner and outer parameters."""

    def __init__(self, weighed: Weighed, models, frozen: Frozen, state: TrainState, precision):
        self.weighed, self.models, self.step = weighed, models, state.step
        self.fixed = {role: p for role, (p, _) in frozen.items()} | dict(state.targets)
        self.state = {role: s for role, (_, s) in frozen.items()} | dict(state.model_state)
        self.memory, self.precision = state.memory, precision
        self.terms: Terms | None = None

    def nets(self, params: Mapping[Role, Params], key: Key) -> Nets:
        return BoundNets(
            self.models, self.fixed | dict(params), self.state, key=key, precision=self.precision
        )

    def forward(self, inner: Params, batch: Batch, key: Key) -> tuple[_Outs, Terms]:
        """Returns the outputs of a training batch, and the terms that they belong to."""
        terms = self.weighed.signals_of(self.nets(inner, key), batch, self.memory, self.step)
        check_terms(terms, batch["mask"].shape)
        return _Outs(dict(terms.values), dict(terms.logits)), terms

    def weights(self, outer, outs: _Outs, terms: Terms, batch: Batch, key: Key) -> Array:
        terms = dataclasses.replace(terms, values=outs.values, logits=outs.logits)
        evidence = self.weighed.evidence(terms, batch, self.memory)
        return self.weighed.weights(self.nets(outer, key), evidence, self.step)

    def loss(
        self, weights: Array, outs: _Outs, terms: Terms, mask: Array, total: Array
    ) -> tuple[Array, dict[str, Array]]:
        terms = dataclasses.replace(terms, values=outs.values, logits=outs.logits)
        return mean_loss(self.weighed.with_weights(terms, weights), mask, total)

    def outer_loss(self, inner: Params, batch: Batch, key: Key, names: tuple[str, ...]) -> Array:
        """Returns the mean of the outer terms; batch norm by batch, its running state unused."""
        terms = self.weighed.signals_of(self.nets(inner, key), batch, self.memory, self.step)
        for name in names:
            if name not in terms.values:
                raise ConfigError(
                    f"the objective has no term {name!r}",
                    where="bilevel.outer_loss",
                    hint=nearest(name, terms.values),
                )
        mask = batch["mask"]
        values = sum(terms.values[name] for name in names)
        return (mask * values).sum() / jnp.maximum(mask.sum(), 1)


def last_layer(model: Model, params: Params, state: State, inputs: tuple[Any, ...]) -> list[bool]:
    """Says of each parameter leaf whether it is of the last layer.

    The last layer is what the logits depend on and the embedding does not.

    Raises:
      ConfigError: the network gives no `embedding` or no `logits`, or nothing lies between them.
    """

    def outputs(params: Params, state: State, *inputs: Any) -> tuple[Array, Array]:
        found, _ = model.apply(params, state, *inputs, train=False, rngs={})
        for name in ("embedding", "logits"):
            if name not in found:
                raise ConfigError(
                    f"the network gives no {name!r}, which tells its last layer",
                    where="bilevel.method",
                    hint="use method=exact, or return the output from the network",
                )
        return found["embedding"], found["logits"]

    embedding, logits = hypergradient.dependencies(outputs, params, state, *inputs)
    chosen = [i in logits - embedding for i in range(len(jax.tree.leaves(params)))]
    if not any(chosen):
        raise ConfigError(
            "no parameter lies between embedding and logits",
            where="bilevel.method",
            hint="use method=exact",
        )
    return chosen


def make_bilevel_step(
    weighed: Weighed,
    models: Mapping[Role, Model],
    optimizers: Optimizers,
    bilevel: Bilevel,
    *,
    outer: bool,
    precision: str = "float32",
    ema: Mapping[Role, tuple[Role, float]] | None = None,
    grad_norm: bool = False,
) -> StepFn:
    """Builds one of the two steps between which the host chooses.

    Args:
      weighed: the objective and its weigher.
      models: a network for each role.
      optimizers: of both levels.
      bilevel: how the outer gradient is taken.
      outer: whether the weigher learns in this step. The step then takes `{"train": batch,
        "held_out": batch}`, where the training batch has a leading axis of `unroll` batches if
        that is more than one; otherwise it takes a training batch.
      precision: compute type of the networks.
      ema: `{role: (source, decay)}`, as in `steps.make_train_step`.
      grad_norm: whether the metrics have the norm of the inner gradient.

    Returns:
      `(state, frozen, batch, key) -> (state, metrics)`; with `outer` the metrics also have
      `outer_loss`, before the weigher's update, and `outer_grad_norm`.
    """
    ema = ema or {}
    by_gradient = weighed.weigher.by_gradient
    virtual = bilevel.order == "virtual" or by_gradient
    tx_inner, tx_outer = optimizers.inner, optimizers.outer

    def step(state: TrainState, frozen: Frozen, batch: Batch, key: Key):
        key = jax.random.fold_in(rng.stream(key, "step"), state.step)
        held_out: Any = batch["held_out"] if outer else None
        ahead: Any = batch["train"] if outer else batch
        train = jax.tree.map(lambda x: x[0], ahead) if outer and bilevel.unroll > 1 else ahead
        mask, total = train["mask"], jnp.maximum(train["mask"].sum(), 1)
        inner, omega = optimizers.split(state.params)
        opt_state: dict[str, PyTree] = dict(state.opt_state)
        problem = _Problem(weighed, models, frozen, state, precision)
        forward = lambda p: problem.forward(p, train, key)  # noqa: E731
        outs, push, terms = jax.linearize(forward, inner, has_aux=True)

        def inner_gradient(weights: Array) -> tuple[Params, dict[str, Array]]:
            used = weighed.used(weights, mask, state.step)
            loss = lambda o, w: problem.loss(w, o, terms, mask, total)  # noqa: E731
            if weighed.stop_features:
                cotangents, metrics = jax.grad(loss, has_aux=True)(outs, used)
            else:

                def steered(o):
                    w = problem.weights(omega, o, terms, train, key)
                    return loss(o, weighed.used(w, mask, state.step))

                cotangents, metrics = jax.grad(steered, has_aux=True)(outs)
            (grads,) = jax.linear_transpose(push, inner)(cotangents)
            return grads, metrics

        def weights_of(omega) -> Array:
            return problem.weights(omega, outs, terms, train, key)

        def outer_value_and_direction(grads, moved) -> tuple[Array, Params]:
            """Outer loss after the step, and its gradient pulled back to the inner gradient."""
            held_key = rng.stream(key, "held_out")
            loss = lambda p: problem.outer_loss(p, held_out, held_key, bilevel.outer_terms)  # noqa: E731
            if bilevel.method == "last_layer":
                flat, structure = jax.tree.flatten(moved)
                chosen = _last_layers(models, moved, problem.state, train)
                some = [x for x, c in zip(flat, chosen, strict=True) if c]

                def partial_loss(some):
                    return loss(_merge(structure, chosen, flat, some))

                value, v = jax.value_and_grad(partial_loss)(some)
                v = _merge(structure, chosen, [jnp.zeros_like(x) for x in flat], v)
            else:
                value, v = jax.value_and_grad(loss)(moved)
            u = hypergradient.pull_back(tx_inner, grads, opt_state["inner"], inner, v)
            return value, u

        def change(u: Params) -> _Outs:
            """The forward-mode product of the training batch along `u`."""
            if bilevel.method == "last_layer":
                flat, structure = jax.tree.flatten(inner)
                chosen = _last_layers(models, inner, problem.state, train)
                pick = lambda xs: [x for x, c in zip(xs, chosen, strict=True) if c]  # noqa: E731

                def partial_forward(some):
                    return forward(_merge(structure, chosen, flat, some))[0]

                tangents = pick(jax.tree.leaves(u))
                return jax.jvp(partial_forward, (pick(flat),), (tangents,))[1]
            if bilevel.low_memory:
                start = hypergradient.after(inner, u)
                return jax.jvp(lambda p: forward(p)[0], (start,), (u,))[1]
            return push(u)

        def outer_gradient(u: Params) -> PyTree:
            stop, stride = weighed.stop_features, bilevel.stride
            rows, seen = _every((train, outs), stride, rng.stream(key, "part"))
            some = lambda p: problem.forward(p, rows, key)[0]  # noqa: E731

            def h(omega, o, seen):
                weights = problem.weights(omega, seen, terms, rows, key)
                return problem.loss(weights, o, terms, rows["mask"], total / stride)[0]

            if bilevel.method == "finite_difference":
                return hypergradient.finite_difference(
                    some, h, inner, omega, u, seen, stop_features=stop
                )
            if stride > 1:
                start = hypergradient.after(inner, u)
                at, d_outs = jax.jvp(some, (start,), (u,))
            else:
                at, d_outs = outs, change(u)
            return hypergradient.directional(h, omega, at, d_outs, stop_features=stop)

        def through_unrolled() -> tuple[Array, PyTree]:
            """Outer loss and gradient through `unroll` steps on batches of their own."""

            def grad_fn(p, omega, k):
                rows = jax.tree.map(lambda x: x[k], ahead)
                rows_mask, rows_total = rows["mask"], jnp.maximum(rows["mask"].sum(), 1)
                rows_key = jax.random.fold_in(rng.stream(key, "ahead"), k) if k else key

                def loss(p, omega):
                    outs, terms = problem.forward(p, rows, rows_key)
                    seen = jax.lax.stop_gradient(outs) if weighed.stop_features else outs
                    weights = problem.weights(omega, seen, terms, rows, rows_key)
                    return problem.loss(weights, outs, terms, rows_mask, rows_total)[0]

                return jax.grad(loss, argnums=(0, 1))(p, omega)

            value = jnp.zeros(())

            def outer_grad(p):
                nonlocal value
                held_key = rng.stream(key, "held_out")
                value, v = jax.value_and_grad(
                    lambda p: problem.outer_loss(p, held_out, held_key, bilevel.outer_terms)
                )(p)
                return v

            gradient = hypergradient.unrolled(
                grad_fn,
                outer_grad,
                tx_inner,
                inner,
                opt_state["inner"],
                omega,
                steps=bilevel.unroll,
            )
            return value, gradient

        def learn(omega, gradient) -> Any:
            updates, opt_state["outer"] = tx_outer.update(gradient, opt_state["outer"], omega)
            return optax.apply_updates(omega, updates)

        def apply_inner(grads) -> tuple[Any, PyTree]:
            updates, new = tx_inner.update(grads, opt_state["inner"], inner)
            return optax.apply_updates(inner, updates), new

        metrics: dict[str, Array] = {}
        weights = weights_of(omega)
        if outer and by_gradient:
            start, _ = inner_gradient(weights)
            value, u = outer_value_and_direction(start, apply_inner(start)[0])
            d_outs = change(u)
            found = jnp.stack(
                [mask * d_outs.values[name] / total for name in weighed.signals], axis=1
            )
            weights = jax.lax.stop_gradient(weighed.weigher.from_gradient(found, mask))
            metrics |= {"outer_loss": value, "outer_grad_norm": optax.tree.norm(found)}
        elif outer and virtual:
            if bilevel.unroll > 1:
                value, gradient = through_unrolled()
            else:
                start, _ = inner_gradient(weights)
                value, u = outer_value_and_direction(start, apply_inner(start)[0])
                gradient = outer_gradient(u)
            metrics |= {"outer_loss": value, "outer_grad_norm": optax.tree.norm(gradient)}
            omega = learn(omega, gradient)
            weights = weights_of(omega)
        grads, inner_metrics = inner_gradient(weights)
        new_inner, new_opt = apply_inner(grads)
        if outer and not virtual:
            value, u = outer_value_and_direction(grads, new_inner)
            gradient = outer_gradient(u)
            metrics |= {"outer_loss": value, "outer_grad_norm": optax.tree.norm(gradient)}
            omega = learn(omega, gradient)
        opt_state["inner"] = new_opt

        params: dict[Role, Params] = {**new_inner, **omega}
        model_state = {**state.model_state, **terms.state}
        targets = move_targets(
            state.targets, params, model_state, ema=ema, returned=set(terms.state)
        )
        metrics = {**inner_metrics, **metrics}
        if grad_norm:
            metrics["grad_norm"] = optax.tree.norm(grads)
        new_state = TrainState(
            step=state.step + 1,
            params={role: params[role] for role in state.params},
            targets=targets,
            model_state=model_state,
            opt_state=opt_state,
            memory=state.memory if terms.memory is None else terms.memory,
        )
        return new_state, metrics

    return step


def _merge(structure: Any, chosen: list[bool], flat: list[Any], some: Any) -> PyTree:
    """Returns the tree with the chosen leaves replaced; `some` lists them or is a whole tree."""
    new = iter(some)
    leaves = [next(new) if c else x for x, c in zip(flat, chosen, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def _last_layers(models, params: Params, state, batch: Batch) -> list[bool]:
    """`last_layer` of every role that learns, in the order of the leaves of `params`."""
    chosen = []
    for role in sorted(params):
        chosen += last_layer(models[role], params[role], state[role], (batch["input"],))
    return chosen


def _every(tree: PyTree, stride: int, key: Key) -> PyTree:
    """Takes every `stride`-th row, from a random one of the first `stride` on."""
    if stride == 1:
        return tree
    start = jax.random.randint(key, (), 0, stride)

    def one(x: Array) -> Array:
        if x.shape[0] % stride:
            raise ConfigError(
                f"a batch of {x.shape[0]} does not divide into {stride} parts",
                where="bilevel.part",
                hint="choose a part that divides batch_size",
            )
        rows = x.reshape(x.shape[0] // stride, stride, *x.shape[1:])
        return jax.lax.dynamic_index_in_dim(rows, start, 1, keepdims=False)

    return jax.tree.map(one, tree)
