"""One step of a bilevel problem while it is traced: both losses, and the outer gradient."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from distill_jax.analysis import dependence
from distill_jax.core import horizon, hypergradient, replay, rng
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
from distill_jax.core.errors import nearest
from distill_jax.core.means import Totals, mean_loss, per_row, totals_of
from distill_jax.core.outer_options import Bilevel, Optimizers, refusal
from distill_jax.core.partition import named_leaves
from distill_jax.core.state import check_terms
from distill_jax.core.steps import BoundNets, Frozen
from distill_jax.core.weighted_objective import WeightedObjective


class Outs(NamedTuple):
    """The values of a batch that depend on the inner parameters and are differentiated."""

    values: Mapping[str, Array]
    logits: Mapping[Role, Array]


class Trace:
    """One step while it is traced: batches, parameters, and the network linearized at them.

    Attributes:
      inner: parameters of the networks trained on the training loss, by role.
      omega: parameters of the weighting's networks, by role.
      terms: the objective's terms at `inner`, with new model state and memory.
      outs: the values that depend on `inner`; `push` maps a tangent of `inner` to one of `outs`.
    """

    def __init__(self, made: "Made", state: TrainState, frozen: Frozen, train: Batch, key: Key):
        self.weighted, self.options, self.optimizers = made.weighted, made.options, made.optimizers
        self.models, self.precision = made.models, made.precision
        self.memory, self.step, self.train, self.key = state.memory, state.step, train, key
        self.fixed = {role: p for role, (p, _) in frozen.items()} | dict(state.targets)
        self.model_state = {role: s for role, (_, s) in frozen.items()} | dict(state.model_state)
        self.inner, self.omega = made.optimizers.split(state.params)
        self.inner_state: PyTree = state.opt_state["inner"]
        self.mask = train["mask"]
        self.plan = self._plan()
        self.outs, self.push, (self.terms, self.known) = jax.linearize(
            self._pass, self.inner, has_aux=True
        )
        self.totals = totals_of(self.terms, self.mask)
        self.rows = self.weighted.row_mask(self.terms, self.mask)

    def _plan(self) -> replay.Plan | None:
        """Returns the plan by which the product on a part of the batch reuses the whole pass."""
        options = self.options
        if options.stride == 1 or options.method != "exact" or options.low_memory:
            return None
        rows = jax.eval_shape(lambda x: self.part(x, 0), self.train)
        forward = lambda inner, batch: self.forward(inner, batch, self.key)  # noqa: E731
        return replay.make_plan(forward, self.inner, self.train, rows)

    def _pass(self, inner: Params) -> tuple[Outs, tuple[Terms, list[Array]]]:
        if self.plan is None:
            outs, terms = self.forward(inner, self.train, self.key)
            return outs, (terms, [])
        (outs, terms), known = self.plan.record(inner, self.train)
        return outs, (terms, known)

    # The two losses.

    def nets(self, params: Mapping[Role, Params], key: Key, batch: Batch | None = None) -> Nets:
        given = (self.models, self.fixed | dict(params), self.model_state)
        return BoundNets(*given, key=key, precision=self.precision, batch=batch)

    def forward(
        self, inner: Params, batch: Batch, key: Key, step: Array | None = None
    ) -> tuple[Outs, Terms]:
        """Returns the outputs of a batch and their terms."""
        step = self.step if step is None else step
        terms = self.weighted.loss_terms_of(self.nets(inner, key, batch), batch, self.memory, step)
        check_terms(terms, batch["mask"].shape)
        return Outs(dict(terms.values), dict(terms.logits)), terms

    def weights(
        self,
        omega: Params,
        seen: Outs,
        terms: Terms,
        batch: Batch,
        key: Key,
        step: Array | None = None,
    ) -> Array:
        """Returns the weights `[n, s]` that the weighting computes from `seen`."""
        step = self.step if step is None else step
        terms = dataclasses.replace(terms, values=seen.values, logits=seen.logits)
        evidence = self.weighted.evidence(terms, batch, self.memory)
        return self.weighted.weights(self.nets(omega, key), evidence, step)

    def loss(
        self, weights: Array, outs: Outs, terms: Terms, mask: Array, totals: Totals | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the inner loss and its metrics; `totals` if the terms are a part of a batch."""
        terms = dataclasses.replace(terms, values=outs.values, logits=outs.logits)
        return mean_loss(self.weighted.with_weights(terms, weights), mask, totals)

    def outer_loss(self, inner: Params, held_out: Batch) -> Array:
        """Returns the mean of the outer terms; batch norms use batch statistics."""
        nets = self.nets(inner, rng.stream(self.key, "held_out"), held_out)
        terms = self.weighted.loss_terms_of(nets, held_out, self.memory, self.step)
        for name in self.options.outer_terms:
            if name not in terms.values:
                hint = nearest(name, terms.values)
                raise refusal("outer_loss", f"the objective has no term {name!r}", hint)
        totals = totals_of(terms, held_out["mask"])
        means = [
            totals.mean(name, terms.values[name], held_out["mask"])
            for name in self.options.outer_terms
        ]
        return jnp.asarray(sum(means))

    # The inner step.

    def weights_now(self, omega: Params) -> Array:
        """Returns the weights of the training batch."""
        return self.weights(omega, self.outs, self.terms, self.train, self.key)

    def inner_gradient(self, omega: Params, weights: Array) -> tuple[Params, dict[str, Array]]:
        """Returns the inner gradient at the given weights, or through them if they are steered."""

        def loss(outs: Outs) -> tuple[Array, dict[str, Array]]:
            w = weights
            if not self.weighted.stop_features and not self.weighted.weighting.by_gradient:
                w = self.weights(omega, outs, self.terms, self.train, self.key)
            w = self.weighted.used(w, self.rows, self.step)
            return self.loss(w, outs, self.terms, self.mask, self.totals)

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

    def change(self, u: Params) -> Outs:
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
        """Returns the gradient in `omega`, given the result of `outer_direction`."""
        stop, stride = self.weighted.stop_features, self.options.stride
        first = jax.random.randint(rng.stream(self.key, "part"), (), 0, stride)
        own = {"weights": self.terms.weights, "counts": self.terms.counts}
        rows, seen, own = self.part((self.train, self.outs, own), first)
        terms = self.terms.replace(**own)
        totals = jax.tree.map(lambda x: x / stride, self.totals)
        forward = lambda inner: self.forward(inner, rows, self.key)[0]  # noqa: E731

        def h(omega, outs, seen):
            weights = self.weights(omega, seen, terms, rows, self.key)
            if self.options.method == "two_speed":  # tangents handle what examples share
                mask = self.weighted.row_mask(terms, rows["mask"])
                weights = horizon.centred(weights, mask)
            return self.loss(weights, outs, terms, rows["mask"], totals)[0]

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
            raise refusal("jvp_fraction", what, "choose a part that divides batch_size")
        before, size, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
        x = x.reshape(*before, b // stride, stride, size // b, *after)
        x = jax.lax.dynamic_index_in_dim(x, first, axis + 1, keepdims=False)
        return x.reshape(*before, size // stride, *after)

    def both_gradients(
        self, inner: Params, omega: Params, rows: Batch, key: Key, step: Array
    ) -> tuple[Params, Params]:
        """Returns the gradients of the inner loss of a batch in both levels' parameters."""

        def loss(inner: Params, omega: Params) -> Array:
            outs, terms = self.forward(inner, rows, key, step)
            seen = jax.lax.stop_gradient(outs) if self.weighted.stop_features else outs
            weights = self.weights(omega, seen, terms, rows, key, step)
            return self.loss(weights, outs, terms, rows["mask"])[0]

        return jax.grad(loss, argnums=(0, 1))(inner, omega)

    def outer_gradient_far(
        self, ahead: Batch, held_out: Batch, root: Key, past: Any
    ) -> tuple[Array, PyTree]:
        """Returns the outer loss and its gradient over the horizon set in the options.

        Args:
          ahead: the batches `[n, b, ...]` of an outer step, without the first axis if n is 1.
          held_out: the held-out batch.
          root: the key of the run.
          past: parameters and optimizer state from K steps ago, for "truncated".
        """
        options, several = self.options, self.options.batches > 1

        def grad_fn(inner: Params, omega: Params, k: int) -> tuple[Params, Params]:
            rows = jax.tree.map(lambda x: x[k], ahead) if several else ahead
            step, key = self.step, self.key
            if options.method == "truncated":
                step = self.step - (options.back - k)
                key = jax.random.fold_in(rng.stream(root, "step"), step)
            elif k:
                key = jax.random.fold_in(rng.stream(self.key, "ahead"), k)
            return self.both_gradients(inner, omega, rows, key, step)

        def outer(inner: Params) -> tuple[Array, Params]:
            return jax.value_and_grad(self.outer_loss)(inner, held_out)

        params, opt_state, tx = self.inner, self.inner_state, self.optimizers.inner
        if options.method == "truncated":
            params, opt_state = past["params"], past["state"]
        if options.method not in ("neumann", "cg"):
            return hypergradient.unrolled(
                grad_fn, outer, tx, params, opt_state, self.omega, steps=options.batches
            )
        estimate = horizon.neumann
        if options.method == "cg":
            estimate = horizon.conjugate_gradient
        how: Any = {"steps": options.horizon, "damping": options.damping}
        return estimate(grad_fn, outer, tx, params, opt_state, self.omega, **how)

    # Two speeds.

    def carried(self, tangents: horizon.Tangents) -> horizon.Tangents:
        """Returns the student's tangents in offsets of all weights after this step."""
        found = horizon.output_biases(self.omega).size
        if found != (expected := len(self.weighted.loss_terms) - 1):
            what = f"the weighting's network has {found} outputs, and log-ratios are {expected}"
            hint = "a weighting that gives one ratio for each term after the first; or method=exact"
            raise refusal("method", what, hint)

        def step(inner: Params, inner_state: PyTree, c: Array) -> tuple[Params, PyTree]:
            def loss(inner: Params) -> Array:
                outs, terms = self.forward(inner, self.train, self.key)
                seen = jax.lax.stop_gradient(outs)
                weights = self.weights(self.omega, seen, terms, self.train, self.key)
                weights = self.weighted.used(horizon.offset(weights, c), self.rows, self.step)
                return self.loss(weights, outs, terms, self.mask, self.totals)[0]

            advance = functools.partial(hypergradient.apply, self.optimizers.inner)
            return hypergradient.regular(advance)(jax.grad(loss)(inner), inner_state, inner)

        given = self.inner, self.inner_state, tangents
        return horizon.carry(step, *given, forget=self.options.forget)

    def outer_gradient_two_speed(
        self, grads: Params, moved: Params, tangents: horizon.Tangents, held_out: Batch
    ) -> tuple[Array, PyTree]:
        """Returns the outer loss and gradient: by tangents for the output biases, else one-step."""
        value, v = jax.value_and_grad(self.outer_loss)(moved, held_out)
        u = hypergradient.pull_back(self.optimizers.inner, grads, self.inner_state, self.inner, v)
        gradient = self.outer_gradient(u)
        return value, horizon.with_output_biases(gradient, horizon.along(v, tangents))

    def gradient_in_weights(self, u: Params) -> Array:
        """Returns the gradient `[n, s]` of the outer loss in the weights themselves."""
        change, own = self.change(u).values, self.terms.weights

        def of(name: str) -> Array:
            mask = per_row(self.mask, change[name])
            return mask * own.get(name, 1) / self.totals.total(name) * change[name]

        return jnp.stack([of(name).reshape(-1) for name in self.weighted.loss_terms], axis=1)

    def _last_layer(self, params: Params) -> hypergradient.SomeLeaves:
        chosen = []
        for role in sorted(params):  # the order of the leaves of a dict
            state = self.model_state[role]
            chosen += last_layer(self.models[role], params[role], state, (self.train["input"],))
        return hypergradient.SomeLeaves(chosen)


class Made(NamedTuple):
    """Values shared by all traces of a step."""

    weighted: WeightedObjective
    models: Mapping[Role, Model]
    optimizers: Optimizers
    options: Bilevel
    precision: str


def last_layer(model: Model, params: Params, state: State, inputs: tuple[Any, ...]) -> list[bool]:
    """Returns, for each parameter leaf, whether it belongs to the last layer.

    The logits depend on the last layer, and the embedding does not.

    Raises:
      ArgumentError: the network has no output `embedding` or `logits`, or no layer between them.
    """

    def outputs(params: Params, state: State, *inputs: Any) -> tuple[Array, Array]:
        endpoints, _ = model.apply(params, state, *inputs, train=False, rngs={})
        for name in ("embedding", "logits"):
            if name not in endpoints:
                what = f"the network gives no {name!r}, which identifies its last layer"
                hint = "use method=exact, or return the output from the network"
                raise refusal("method", what, hint)
        return endpoints["embedding"], endpoints["logits"]

    embedding, logits = dependence.of(outputs, params, state, *inputs)
    chosen = [f"0/{name}" in logits.on - embedding.on for name in named_leaves(params)]
    if not any(chosen):
        what = "no parameter lies between embedding and logits"
        raise refusal("method", what, "use method=exact")
    return chosen
