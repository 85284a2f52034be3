"""Gradients of an outer loss in the weights of an inner loss, through the inner optimizer's step.

The inner loss is `J(params, omega) = h(omega, F(params))`: `F` gives per-example losses (and the
logits that a weighting reads), `h` weights and averages them and depends on the outer variables
`omega`. One step of any optax optimizer gives `params' = params + update(g)` with
`g = dJ/dparams`, and the outer loss is `V(params')`. Then, with `v = dV/dparams'` and
`u = (d update / d g)^T v`,

    dV/domega = d/domega <u, dJ/dparams> = d/domega [ (dh/dF) (dF/dparams) u ],

one forward-mode product of the network and the gradient of the small function `h` (Hu et al. 2024
do not specify the rule, arXiv:2312.15112; this is the product of Ren et al. 2018, arXiv:1803.09050,
for any optimizer). It is exact and needs no second derivative of the network. The transpose of the
same linearization of `F` gives `g`, so there is only one forward pass.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from distill_jax.analysis import walk
from distill_jax.core.api import Array, Params, PyTree

Forward = Callable[[Params], PyTree]
"""`params -> outs`, pure: the values of a batch that depend on the inner parameters."""

Weighing = Callable[[PyTree, PyTree, PyTree], Array]
"""`(omega, outs, seen) -> J`: the inner loss; `seen` is the part of `outs` the weighting reads."""


def hypergradient(
    forward: Forward,
    inner_loss: Callable[[PyTree, PyTree], Array],
    outer_loss: Callable[[Params], Array],
    optimizer: optax.GradientTransformation,
) -> Callable[[Params, PyTree, PyTree], tuple[Array, PyTree]]:
    """Returns a function that computes the gradient of an outer loss through one optimizer step.

    Let `J(params, omega) = inner_loss(omega, forward(params))`, and let `params'` be the parameters
    after one step of the optimizer on `J`. The result is the gradient of `outer_loss(params')` with
    respect to `omega`. It is exact for any optax optimizer with a differentiable update, and costs
    one pass of `forward`, its transpose and one forward-mode product.

    Args:
      forward: `params -> outputs`, the outputs on a training batch that the inner loss reads.
      inner_loss: `(omega, outputs) -> scalar`.
      outer_loss: `params -> scalar`, the loss on held-out examples.
      optimizer: any optax optimizer of `params`.

    Returns:
      `(params, opt_state, omega) -> (outer loss, its gradient in omega)`; pure.
    """

    def compute(params: Params, opt_state: PyTree, omega: PyTree) -> tuple[Array, PyTree]:
        outs, product = jax.linearize(forward, params)
        (grads,) = jax.linear_transpose(product, params)(jax.grad(inner_loss, 1)(omega, outs))
        updates, _ = optimizer.update(grads, opt_state, params)
        value, cotangent = jax.value_and_grad(outer_loss)(optax.apply_updates(params, updates))
        u = pull_back(optimizer, grads, opt_state, params, cotangent)
        h = lambda omega, outs, seen: inner_loss(omega, outs)  # noqa: E731
        return value, directional(h, omega, outs, product(u), stop_features=False)

    return compute


def directional(
    h: Weighing, omega: PyTree, outs: PyTree, d_outs: PyTree, *, stop_features: bool
) -> PyTree:
    """Returns `d/domega` of the derivative of `h` in `outs` along `d_outs`.

    Args:
      h: the inner loss as a function of the network's outputs.
      omega: outer variables.
      outs: outputs at the inner parameters.
      d_outs: their forward-mode product, the change along the pulled-back outer gradient.
      stop_features: whether the derivative through the weighting's inputs is stopped.
    """

    def along(omega: PyTree) -> Array:
        def loss(o: PyTree) -> Array:
            return h(omega, o, jax.lax.stop_gradient(o) if stop_features else o)

        return jax.jvp(loss, (outs,), (d_outs,))[1]

    return jax.grad(along)(omega)


def finite_difference(
    forward: Forward,
    h: Weighing,
    params: Params,
    omega: PyTree,
    direction: PyTree,
    seen: PyTree,
    *,
    stop_features: bool,
    step_size: float = 0.01,
) -> PyTree:
    """Returns the same by a central difference of two forward passes (Liu et al. 2019, eq. 8).

    Args:
      forward: the network on the training batch.
      h: the inner loss.
      params: inner parameters.
      omega: outer variables.
      direction: the pulled-back outer gradient, like `params`.
      seen: the inputs of the weighting at `params`.
      stop_features: whether the weighting reads `seen` in both passes.
      step_size: length of the step; defaults to the paper's value. The error is of the order of
        its square, plus rounding.
    """
    scale = step_size / jnp.maximum(optax.tree.norm(direction), jnp.finfo(jnp.float32).tiny)

    def outs(sign: int) -> PyTree:
        moved = jax.tree.map(lambda p, d: (p + sign * scale * d).astype(p.dtype), params, direction)
        return forward(moved)

    plus, minus = outs(1), outs(-1)

    def difference(omega: PyTree) -> Array:
        a = h(omega, plus, seen if stop_features else plus)
        b = h(omega, minus, seen if stop_features else minus)
        return (a - b) / (2 * scale)

    return jax.grad(difference)(omega)


def pull_back(
    tx: optax.GradientTransformation,
    grads: Params,
    opt_state: PyTree,
    params: Params,
    cotangent: Params,
) -> Params:
    """Returns `(d update / d grads)^T cotangent` of one optimizer step; no pass of the network.

    Derivatives that are infinite at a zero second moment or a zero norm are set to zero, see
    `regular`. The update itself does not change.

    Args:
      tx: any optax optimizer.
      grads: inner gradient.
      opt_state: optimizer state before the step.
      params: inner parameters before the step.
      cotangent: gradient of the outer loss in the parameters after the step.
    """

    def update(grads: Params) -> Params:
        return tx.update(grads, opt_state, params)[0]

    _, pull = jax.vjp(regular(update), grads)
    return pull(cotangent)[0]


def unrolled(
    grad_fn: Callable[[Params, PyTree, int], tuple[Params, PyTree]],
    outer_value_and_grad: Callable[[Params], tuple[Array, Params]],
    tx: optax.GradientTransformation,
    params: Params,
    opt_state: PyTree,
    omega: PyTree,
    *,
    steps: int,
) -> tuple[Array, PyTree]:
    """Returns `V(params_K)` and `dV(params_K)/domega` through `steps` inner steps, exactly.

    It uses reverse mode over the steps and forward mode within each step (Kemaev et al. 2025,
    arXiv:2505.00793). It stores parameters, optimizer state and gradient of every step, but no
    activations: the pass of the network is recomputed. The memory is that of one step, plus three
    or four copies of the parameters per step.

    Args:
      grad_fn: `(params, omega, k) -> (dJ/dparams, dJ/domega)` on the batch of inner step k.
      outer_value_and_grad: `params -> (V, dV/dparams)`.
      tx: the inner optimizer.
      params: inner parameters before the first step: the current ones to look ahead, or those of
        K steps ago for truncated backpropagation.
      opt_state: optimizer state before the first step.
      omega: outer variables, the same in all steps.
      steps: K.
    """
    visited = []
    for k in range(steps):
        grads, _ = grad_fn(params, omega, k)
        visited.append((params, opt_state, grads))
        params, opt_state = apply(tx, grads, opt_state, params)
    value, adjoint = outer_value_and_grad(params)
    moving = floats_of(opt_state)
    state_adjoint = jax.tree.map(jnp.zeros_like, moving.pick(opt_state))
    total = jax.tree.map(jnp.zeros_like, omega)
    for k in reversed(range(steps)):
        params, opt_state, grads = visited[k]
        params = after(params, adjoint)  # or XLA would keep the activations of the pass above

        def advance(grads, floats, params, opt_state=opt_state):
            new = apply(tx, grads, moving.merge(opt_state, floats), params)
            return new[0], moving.pick(new[1])

        _, pull = jax.vjp(regular(advance), grads, moving.pick(opt_state), params)
        u, state_adjoint, through = pull((adjoint, state_adjoint))
        _, (hessian_product, d_omega) = jax.jvp(
            lambda p, k=k: grad_fn(p, omega, k), (params,), (u,)
        )
        adjoint = jax.tree.map(jnp.add, through, hessian_product)
        total = jax.tree.map(jnp.add, total, d_omega)
    return value, total


def after(tree: PyTree, cause: PyTree) -> PyTree:
    """Returns `tree` unchanged, but computable only after `cause`.

    XLA may compute every pass of the network as early as possible and merge equal passes. It then
    holds activations until their last use. An `optimization_barrier` does not prevent this on CPU,
    where barriers are removed before scheduling. Adding zero times the cause does, because
    floating-point arithmetic does not allow dropping it.
    """
    leaves = [x for x in jax.tree.leaves(cause) if x.size]
    zero = sum(0.0 * x.reshape(-1)[0] for x in leaves)
    return jax.tree.map(lambda x: x + jnp.asarray(zero, x.dtype), tree)


def apply(
    tx: optax.GradientTransformation, grads: Params, opt_state: PyTree, params: Params
) -> tuple[Any, PyTree]:
    """Returns parameters and optimizer state after a step."""
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


class SomeLeaves(NamedTuple):
    """Extracts selected leaves of a tree and replaces them.

    Attributes:
      chosen: whether each leaf is selected.
    """

    chosen: list[bool]

    def pick(self, tree: PyTree) -> list[Array]:
        return [x for x, c in zip(jax.tree.leaves(tree), self.chosen, strict=True) if c]

    def merge(self, tree: PyTree, some: list[Array]) -> Any:
        """Returns the tree with its selected leaves replaced by `some`."""
        new, (leaves, structure) = iter(some), jax.tree.flatten(tree)
        merged = [next(new) if c else x for x, c in zip(leaves, self.chosen, strict=True)]
        return jax.tree.unflatten(structure, merged)


def floats_of(tree: PyTree) -> SomeLeaves:
    """Returns an object that extracts the floating-point leaves of trees like `tree`."""
    leaves = jax.tree.leaves(tree)
    return SomeLeaves([bool(jnp.issubdtype(jnp.result_type(x), jnp.floating)) for x in leaves])


# Regular derivatives.


def regular(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Returns `fn` with derivatives of `sqrt(x)`, `1 / sqrt(x)` and `y / x` at `x = 0` set to zero.

    Adam divides by the root of a second moment, which is zero if a parameter never had a gradient;
    clipping divides by a norm. There, autodiff gives 0 * inf = NaN although the slope is finite:
    for `m / (sqrt(v) + eps)` with `v = (1 - b) g^2`, the slope at `g = 0` is that of `m / eps`,
    and this rule returns it. Values do not change. The rule also applies to functions inside
    `jit`, but not inside loops and branches.
    """

    @functools.wraps(fn)
    def call(*args: Any) -> PyTree:
        flat, structure = jax.tree.flatten(args)
        out_structure = None

        def flat_fn(*flat: Any) -> list[Any]:
            nonlocal out_structure
            leaves, out_structure = jax.tree.flatten(fn(*jax.tree.unflatten(structure, flat)))
            return leaves

        jaxpr = jax.make_jaxpr(flat_fn)(*flat)
        assert out_structure is not None
        return jax.tree.unflatten(out_structure, walk.evaluate(jaxpr, flat, _apply_regular))

    return call


def _apply_regular(eqn: Any, inputs: list[Any]) -> list[Any]:
    name = eqn.primitive.name
    if name in _REGULAR and jnp.issubdtype(inputs[0].dtype, jnp.floating):
        return [_REGULAR[name](*inputs)]
    return walk.bind(eqn, inputs)


@jax.custom_jvp
def _sqrt(x: Array) -> Array:
    return jax.lax.sqrt(x)


@_sqrt.defjvp
def _(primals, tangents):
    (x,), (t,) = primals, tangents
    root = jax.lax.sqrt(x)
    return root, jnp.where(root > 0, t / jnp.where(root > 0, 2 * root, 1), 0)


@jax.custom_jvp
def _rsqrt(x: Array) -> Array:
    return jax.lax.rsqrt(x)


@_rsqrt.defjvp
def _(primals, tangents):
    (x,), (t,) = primals, tangents
    return jax.lax.rsqrt(x), jnp.where(x > 0, -0.5 * t * jnp.where(x > 0, x, 1) ** -1.5, 0)


@jax.custom_jvp
def _div(y: Array, x: Array) -> Array:
    return jax.lax.div(y, x)


@_div.defjvp
def _(primals, tangents):
    (y, x), (ty, tx) = primals, tangents
    divisor = jnp.where(x != 0, x, 1)
    return jax.lax.div(y, x), jnp.where(x != 0, (ty - tx * (y / divisor)) / divisor, 0)


_REGULAR = {"sqrt": _sqrt, "rsqrt": _rsqrt, "div": _div}
