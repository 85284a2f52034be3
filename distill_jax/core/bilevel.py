"""The step of a bilevel problem: a student learns from weighted terms, a weighting from it.

    inner:  theta' = theta + update(grad_theta mean_i sum_s w_is(omega) L_is(theta))
    outer:  omega descends the loss of theta' on held-out examples

(Hu et al. 2024, eq. 4-5, arXiv:2312.15112, with one step in place of the inner optimum.)
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from distill_jax.analysis import dependence
from distill_jax.core import hypergradient, replay, rng
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
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.core.partition import named_leaves
from distill_jax.core.state import check_terms
from distill_jax.core.steps import (
    BoundNets,
    Decay,
    Frozen,
    StepFn,
    finish_step,
    mean_loss,
)
from distill_jax.core.weighted_objective import WeightedObjective

METHODS = ("exact", "finite_difference", "last_layer")
UPDATES = ("after_step", "lookahead")


class Optimizers(NamedTuple):
    """The optimizers of both levels; `init` makes the `opt_state` of a `TrainState`.

    Attributes:
      inner: over `{role: params}` of everything that learns from the training loss.
      outer: over `{role: params}` of the weighting's networks.
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
      outer_update: "after_step": the inner step is the step of training, and the weighting learns
        after it; "lookahead": the weighting learns from a step that is then made again with the
        new weights (Shu et al. 2019, algorithm 1).
      unroll: inner steps that the outer gradient goes through, on as many batches; more than one
        with outer_update=lookahead only.
      jvp_fraction: share 1/m of the training batch over which the product is taken, every m-th
        example from a random one on. The estimate is unbiased where the examples of a batch do not
        depend on each other. Under batch normalization the statistics are those of the whole
        batch, and their changes are estimated from the part (`replay`).
      low_memory: whether the forward-mode product makes its own forward pass, so that it need not
        wait for the inner gradient's activations: as much memory as a plain step, for one third of
        a step more. On a part of the batch that pass has the part's statistics; so has that of the
        finite difference, and of networks with dropout or with loops over the batch.
      outer_terms: terms of the objective whose sum, over held-out examples, is the outer loss.
    """

    method: str = "exact"
    outer_update: str = "after_step"
    unroll: int = 1
    jvp_fraction: float = 1.0
    low_memory: bool = False
    outer_terms: tuple[str, ...] = ("cross_entropy",)

    def __post_init__(self):
        for name, options in (("method", METHODS), ("outer_update", UPDATES)):
            if (value := getattr(self, name)) not in options:
                raise _refusal(name, f"unknown {name} {value!r}", nearest(value, options))
        fraction = self.jvp_fraction
        if not 0 < fraction <= 1 or abs(1 / fraction - round(1 / fraction)) > 1e-6:
            what = f"jvp_fraction is {fraction}"
            raise _refusal("jvp_fraction", what, "1 divided by a whole number")
        if self.unroll < 1:
            raise _refusal("unroll", f"unroll is {self.unroll}", "at least 1")
        how = self.outer_update, self.method, fraction
        if self.unroll > 1 and how != ("lookahead", "exact", 1.0):
            raise _refusal(
                "unroll",
                f"{self.unroll} inner steps with outer_update={self.outer_update}, "
                f"method={self.method}, jvp_fraction={fraction}",
                "several steps need outer_update=lookahead, method=exact and jvp_fraction=1",
            )
        if self.method == "last_layer" and fraction < 1:
            what = "the last layer's product costs next to nothing on the whole batch"
            raise _refusal("jvp_fraction", what, "set jvp_fraction to 1")

    @property
    def stride(self) -> int:
        """m of `jvp_fraction = 1 / m`."""
        return round(1 / self.jvp_fraction)


def _refusal(name: str, what: str, hint: str) -> ArgumentError:
    return ArgumentError(what, where=name, hint=hint)


class _Outs(NamedTuple):
    """What of a batch depends on the inner parameters and is differentiated."""

    values: Mapping[str, Array]
    logits: Mapping[Role, Array]


class _Trace:
    """One step while it is traced: batches, parameters, and the network linearized at them.

    Attributes:
      inner: parameters of what learns from the training loss, by role.
      omega: parameters of the weighting's networks, by role.
      terms: the objective's terms at `inner`, with new model state and memory.
      outs: what of them depends on `inner`; `push` maps a change of `inner` to one of `outs`.
    """

    def __init__(self, made: "_Made", state: TrainState, frozen: Frozen, train: Batch, key: Key):
        self.weighted, self.options, self.optimizers = made.weighted, made.options, made.optimizers
        self.models, self.precision = made.models, made.precision
        self.memory, self.step, self.train, self.key = state.memory, state.step, train, key
        self.fixed = {role: p for role, (p, _) in frozen.items()} | dict(state.targets)
        self.model_state = {role: s for role, (_, s) in frozen.items()} | dict(state.model_state)
        self.inner, self.omega = made.optimizers.split(state.params)
        self.inner_state: PyTree = state.opt_state["inner"]
        self.mask, self.total = train["mask"], jnp.maximum(train["mask"].sum(), 1)
        self.plan = self._plan()
        self.outs, self.push, (self.terms, self.known) = jax.linearize(
            self._pass, self.inner, has_aux=True
        )

    def _plan(self) -> replay.Plan | None:
        """Returns how the product on a part of the batch takes values from the whole pass."""
        options = self.options
        if options.stride == 1 or options.method != "exact" or options.low_memory:
            return None
        rows = jax.eval_shape(lambda x: self.part(x, 0), self.train)
        forward = lambda inner, batch: self.forward(inner, batch, self.key)  # noqa: E731
        return replay.make_plan(forward, self.inner, self.train, rows)

    def _pass(self, inner: Params) -> tuple[_Outs, tuple[Terms, list[Array]]]:
        if self.plan is None:
            outs, terms = self.forward(inner, self.train, self.key)
            return outs, (terms, [])
        (outs, terms), known = self.plan.record(inner, self.train)
        return outs, (terms, known)

    # The two losses.

    def nets(self, params: Mapping[Role, Params], key: Key) -> Nets:
        params = self.fixed | dict(params)
        return BoundNets(self.models, params, self.model_state, key=key, precision=self.precision)

    def forward(self, inner: Params, batch: Batch, key: Key) -> tuple[_Outs, Terms]:
        """Returns the outputs of a batch, and the terms that they belong to."""
        terms = self.weighted.loss_terms_of(self.nets(inner, key), batch, self.memory, self.step)
        check_terms(terms, batch["mask"].shape)
        return _Outs(dict(terms.values), dict(terms.logits)), terms

    def weights(self, omega: Params, seen: _Outs, terms: Terms, batch: Batch, key: Key) -> Array:
        """Returns the weighting's weights `[b, s]` of a batch of which it sees `seen`."""
        terms = dataclasses.replace(terms, values=seen.values, logits=seen.logits)
        evidence = self.weighted.evidence(terms, batch, self.memory)
        return self.weighted.weights(self.nets(omega, key), evidence, self.step)

    def loss(
        self, weights: Array, outs: _Outs, terms: Terms, mask: Array, total: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the inner loss and its metrics."""
        terms = dataclasses.replace(terms, values=outs.values, logits=outs.logits)
        return mean_loss(self.weighted.with_weights(terms, weights), mask, total)

    def outer_loss(self, inner: Params, held_out: Batch) -> Array:
        """Returns the mean of the outer terms; batch norm by batch, its running state unused."""
        nets = self.nets(inner, rng.stream(self.key, "held_out"))
        terms = self.weighted.loss_terms_of(nets, held_out, self.memory, self.step)
        for name in self.options.outer_terms:
            if name not in terms.values:
                hint = nearest(name, terms.values)
                raise _refusal("outer_loss", f"the objective has no term {name!r}", hint)
        mask, values = held_out["mask"], [terms.values[n] for n in self.options.outer_terms]
        return (mask * sum(values)).sum() / jnp.maximum(mask.sum(), 1)

    # The inner step.

    def weights_now(self, omega: Params) -> Array:
        """Returns the weights of the training batch."""
        return self.weights(omega, self.outs, self.terms, self.train, self.key)

    def inner_gradient(self, omega: Params, weights: Array) -> tuple[Params, dict[str, Array]]:
        """Returns the inner gradient at given weights, or through them if they are steered."""

        def loss(outs: _Outs) -> tuple[Array, dict[str, Array]]:
            w = weights
            if not self.weighted.stop_features and not self.weighted.weighting.by_gradient:
                w = self.weights(omega, outs, self.terms, self.train, self.key)
            w = self.weighted.used(w, self.mask, self.step)
            return self.loss(w, outs, self.terms, self.mask, self.total)

        cotangents, metrics = jax.grad(loss, has_aux=True)(self.outs)
        (grads,) = jax.linear_transpose(self.push, self.inner)(cotangents)
        return grads, metrics

    def apply(self, grads: Params) -> tuple[Any, PyTree]:
        """Returns inner parameters and optimizer state after a step."""
        updates, new = self.optimizers.inner.update(grads, self.inner_state, self.inner)
        return optax.apply_updates(self.inner, updates), new

    # The outer gradient.

    def outer_direction(
        self, grads: Params, moved: Params, held_out: Batch
    ) -> tuple[Array, Params]:
        """Returns the outer loss after the step, and its gradient pulled back to `grads`."""
        if self.options.method == "last_layer":
            part = self._last_layer(moved)
            value, some = jax.value_and_grad(
                lambda some: self.outer_loss(part.merge(moved, some), held_out)
            )(part.pick(moved))
            v = part.merge(jax.tree.map(jnp.zeros_like, moved), some)
        else:
            value, v = jax.value_and_grad(self.outer_loss)(moved, held_out)
        tx = self.optimizers.inner
        return value, hypergradient.pull_back(tx, grads, self.inner_state, self.inner, v)

    def change(self, u: Params) -> _Outs:
        """Returns the forward-mode product: how the training batch's outputs change along `u`."""
        forward = lambda inner: self.forward(inner, self.train, self.key)[0]  # noqa: E731
        if self.options.method == "last_layer":
            part = self._last_layer(self.inner)
            some = lambda x: forward(part.merge(self.inner, x))  # noqa: E731
            return jax.jvp(some, (part.pick(self.inner),), (part.pick(u),))[1]
        if self.options.low_memory:
            return jax.jvp(forward, (hypergradient.after(self.inner, u),), (u,))[1]
        return self.push(u)

    def outer_gradient(self, u: Params) -> PyTree:
        """Returns the gradient in `omega`, given what `outer_direction` gave."""
        stop, stride = self.weighted.stop_features, self.options.stride
        first = jax.random.randint(rng.stream(self.key, "part"), (), 0, stride)
        rows, seen, own = self.part((self.train, self.outs, self.terms.weights), first)
        terms = self.terms.replace(weights=own)
        forward = lambda inner: self.forward(inner, rows, self.key)[0]  # noqa: E731

        def h(omega, outs, seen):
            weights = self.weights(omega, seen, terms, rows, self.key)
            return self.loss(weights, outs, terms, rows["mask"], self.total / stride)[0]

        if self.options.method == "finite_difference":
            return hypergradient.finite_difference(
                forward, h, self.inner, self.omega, u, seen, stop_features=stop
            )
        if stride == 1:
            outs, d_outs = self.outs, self.change(u)
        elif self.plan is None:
            start = hypergradient.after(self.inner, u)
            outs, d_outs = jax.jvp(forward, (start,), (u,))
        else:
            plan, take = self.plan, functools.partial(self._take, first=first)
            again = lambda inner: plan.replay(inner, rows, self.known, take)[0]  # noqa: E731
            outs, d_outs = jax.jvp(again, (self.inner,), (u,))
        return hypergradient.directional(h, self.omega, outs, d_outs, stop_features=stop)

    def part(self, tree: PyTree, first: Array | int) -> PyTree:
        """Returns every m-th row of leaves `[b, ...]`, from `first` on."""
        if self.options.stride == 1:
            return tree
        return jax.tree.map(lambda x: self._take(x, 0, first=first), tree)

    def _take(self, x: Array, axis: int, *, first: Array | int) -> Array:
        """Returns every m-th row of an array whose `axis` holds b rows of equal length."""
        b, stride = self.mask.shape[0], self.options.stride
        if b % stride:
            what = f"a batch of {b} does not divide into {stride} parts"
            raise _refusal("jvp_fraction", what, "choose a part that divides batch_size")
        before, size, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
        x = x.reshape(*before, b // stride, stride, size // b, *after)
        x = jax.lax.dynamic_index_in_dim(x, first, axis + 1, keepdims=False)
        return x.reshape(*before, size // stride, *after)

    def outer_gradient_unrolled(self, ahead: Batch, held_out: Batch) -> tuple[Array, PyTree]:
        """Returns outer loss and gradient through steps on the batches `[unroll, b, ...]`."""

        def grad_fn(inner, omega, k):
            rows = jax.tree.map(lambda x: x[k], ahead)
            mask, total = rows["mask"], jnp.maximum(rows["mask"].sum(), 1)
            key = jax.random.fold_in(rng.stream(self.key, "ahead"), k) if k else self.key

            def loss(inner, omega):
                outs, terms = self.forward(inner, rows, key)
                seen = jax.lax.stop_gradient(outs) if self.weighted.stop_features else outs
                weights = self.weights(omega, seen, terms, rows, key)
                return self.loss(weights, outs, terms, mask, total)[0]

            return jax.grad(loss, argnums=(0, 1))(inner, omega)

        return hypergradient.unrolled(
            grad_fn,
            lambda inner: jax.value_and_grad(self.outer_loss)(inner, held_out),
            self.optimizers.inner,
            self.inner,
            self.inner_state,
            self.omega,
            steps=self.options.unroll,
        )

    def gradient_in_weights(self, u: Params) -> Array:
        """Returns the gradient `[b, s]` of the outer loss in the weights themselves."""
        change, own = self.change(u).values, self.terms.weights
        share = lambda name: self.mask * own.get(name, 1) / self.total  # noqa: E731
        return jnp.stack([share(n) * change[n] for n in self.weighted.loss_terms], axis=1)

    def _last_layer(self, params: Params) -> hypergradient.SomeLeaves:
        chosen = []
        for role in sorted(params):  # the order of the leaves of a dict
            state = self.model_state[role]
            chosen += last_layer(self.models[role], params[role], state, (self.train["input"],))
        return hypergradient.SomeLeaves(chosen)


class _Made(NamedTuple):
    """What all traces of a step share."""

    weighted: WeightedObjective
    models: Mapping[Role, Model]
    optimizers: Optimizers
    options: Bilevel
    precision: str


def last_layer(model: Model, params: Params, state: State, inputs: tuple[Any, ...]) -> list[bool]:
    """Says of each parameter leaf whether it is of the last layer.

    The last layer is what the logits depend on and the embedding does not.

    Raises:
      ArgumentError: the network gives no `embedding` or no `logits`, or nothing lies between them.
    """

    def outputs(params: Params, state: State, *inputs: Any) -> tuple[Array, Array]:
        endpoints, _ = model.apply(params, state, *inputs, train=False, rngs={})
        for name in ("embedding", "logits"):
            if name not in endpoints:
                what = f"the network gives no {name!r}, which tells its last layer"
                hint = "use method=exact, or return the output from the network"
                raise _refusal("method", what, hint)
        return endpoints["embedding"], endpoints["logits"]

    embedding, logits = dependence.of(outputs, params, state, *inputs)
    chosen = [f"0/{name}" in logits.on - embedding.on for name in named_leaves(params)]
    if not any(chosen):
        what = "no parameter lies between embedding and logits"
        raise _refusal("method", what, "use method=exact")
    return chosen


def make_bilevel_step(
    weighted: WeightedObjective,
    models: Mapping[Role, Model],
    optimizers: Optimizers,
    bilevel: Bilevel,
    *,
    outer: bool,
    precision: str = "float32",
    ema: Mapping[Role, tuple[Role, Decay]] | None = None,
    grad_norm: bool = False,
    skip_nonfinite: bool = False,
    report_nonfinite: bool = False,
) -> StepFn:
    """Builds one of the two steps between which the host chooses.

    Args:
      weighted: the objective and its weighting.
      models: a network for each role.
      optimizers: of both levels.
      bilevel: how the outer gradient is taken.
      outer: whether the weighting learns in this step. The step then takes `{"train": batch,
        "held_out": batch}`, where the training batch has a leading axis of `unroll` batches if
        that is more than one; otherwise it takes a training batch.
      precision: compute type of the networks.
      ema: `{role: (source, decay)}`, as in `steps.make_train_step`.
      grad_norm: whether the metrics have the norm of the inner gradient.
      skip_nonfinite: whether a step changes nothing where its loss, its gradient, or those of the
        outer level are not finite, see `steps.skip`.
      report_nonfinite: whether the metrics have `nonfinite`, 1 in such steps, else 0.

    Returns:
      `(state, frozen, batch, key) -> (state, metrics)`; with `outer` the metrics also have
      `outer_loss`, before the weighting's update, and `outer_grad_norm`.
    """
    finish = functools.partial(
        finish_step,
        ema=ema or {},
        grad_norm=grad_norm,
        skip_nonfinite=skip_nonfinite,
        report_nonfinite=report_nonfinite,
    )
    made = _Made(weighted, models, optimizers, bilevel, precision)
    by_gradient = weighted.weighting.by_gradient
    lookahead = bilevel.outer_update == "lookahead" or by_gradient

    def step(state: TrainState, frozen: Frozen, batch: Batch, key: Key):
        key = jax.random.fold_in(rng.stream(key, "step"), state.step)
        held_out: Any = batch["held_out"] if outer else None
        ahead: Any = batch["train"] if outer else batch
        several = outer and bilevel.unroll > 1
        train = jax.tree.map(lambda x: x[0], ahead) if several else ahead
        trace = _Trace(made, state, frozen, train, key)
        omega, outer_state = trace.omega, state.opt_state["outer"]
        metrics: dict[str, Array] = {}

        def direction(grads, moved) -> Params:
            metrics["outer_loss"], u = trace.outer_direction(grads, moved, held_out)
            return u

        def learn(gradient) -> tuple[Any, PyTree]:
            metrics["outer_grad_norm"] = optax.tree.norm(gradient)
            updates, new = optimizers.outer.update(gradient, outer_state, omega)
            return optax.apply_updates(omega, updates), new

        weights = trace.weights_now(omega)
        if outer and lookahead:
            if several:
                metrics["outer_loss"], gradient = trace.outer_gradient_unrolled(ahead, held_out)
                omega, outer_state = learn(gradient)
            else:
                tried, _ = trace.inner_gradient(omega, weights)
                u = direction(tried, trace.apply(tried)[0])
                if by_gradient:
                    gradient = trace.gradient_in_weights(u)
                    metrics["outer_grad_norm"] = optax.tree.norm(gradient)
                    weights = weighted.weighting.from_gradient(gradient, train["mask"])
                else:
                    omega, outer_state = learn(trace.outer_gradient(u))
            if not by_gradient:
                weights = trace.weights_now(omega)
        grads, inner_metrics = trace.inner_gradient(omega, weights)
        inner, inner_state = trace.apply(grads)
        if outer and not lookahead:
            omega, outer_state = learn(trace.outer_gradient(direction(grads, inner)))

        terms, params = trace.terms, {**inner, **omega}
        return finish(
            state,
            {role: params[role] for role in state.params},
            {"inner": inner_state, "outer": outer_state},
            {**state.model_state, **terms.state},
            state.memory if terms.memory is None else terms.memory,
            grads,
            {**inner_metrics, **metrics},
            returned=set(terms.state),
        )

    return step
