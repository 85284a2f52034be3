"""Outer gradients with a horizon beyond one inner step, at a lower cost than unrolling ahead.

All functions are pure. Those that compute a whole gradient take the arguments of
`hypergradient.unrolled`. Let `a` be the adjoint of the parameters, initially `dV/dparams` after the
step, and let `H` be the Hessian of the inner loss.

* `neumann`: K terms of the series for the inverse of `I - dPhi/dparams`, where `Phi` is the step of
  the optimizer at the current point, including its state. For gradient descent with rate `lr` it is
  `u = -lr sum_j (I - lr (H + damping))^j a`, K steps with a fixed Hessian (Lorraine et al. 2020,
  arXiv:1911.02590). With one term it is the one-step gradient.
* `conjugate_gradient`: `u = -(H + damping)^-1 a` by K steps. It is the gradient at an optimum of
  the inner loss (Pedregosa 2016, arXiv:1602.02355; Rajeswaran et al. 2019, arXiv:1909.04630).
* Truncated backpropagation (Shaban et al. 2019, arXiv:1810.10667) is `hypergradient.unrolled` from
  the state of K steps ago, on the batches since then.
* `carry`: forward mode for few outer variables (Franceschi et al. 2017, arXiv:1703.01785). The
  tangents of the student with respect to them are updated during training. The gradient of the
  outer loss is then an inner product in any step, exact from the first step on.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distill_jax.core import hypergradient, partition
from distill_jax.core.api import Array, Params, PyTree
from distill_jax.core.errors import ArgumentError

GradFn = Callable[[Params, PyTree, int], tuple[Params, PyTree]]
OuterFn = Callable[[Params], tuple[Array, Params]]


def neumann(
    grad_fn: GradFn,
    outer_value_and_grad: OuterFn,
    tx: optax.GradientTransformation,
    params: Params,
    opt_state: PyTree,
    omega: PyTree,
    *,
    steps: int,
    damping: float = 0.0,
) -> tuple[Array, PyTree]:
    """Returns the outer loss after one step, and its gradient by a Neumann series.

    It is the gradient through `steps` steps that all use the Hessian and the optimizer state of the
    current step. Memory does not grow with `steps`; each term costs a Hessian-vector product.

    Args:
      grad_fn: `(params, omega, 0) -> (dJ/dparams, dJ/domega)` on the current batch.
      outer_value_and_grad: `params -> (V, dV/dparams)`.
      tx: the inner optimizer.
      params: inner parameters before the step.
      opt_state: optimizer state before the step.
      omega: outer variables.
      steps: K, number of terms.
      damping: added to the diagonal of the Hessian.
    """
    grads, hessian = jax.linearize(lambda p: grad_fn(p, omega, 0)[0], params)
    moving = hypergradient.floats_of(opt_state)

    def advance(grads, floats, params):
        new = hypergradient.apply(tx, grads, moving.merge(opt_state, floats), params)
        return new[0], moving.pick(new[1])

    state = moving.pick(opt_state)
    _, pull = jax.vjp(hypergradient.regular(advance), grads, state, params)
    value, adjoint = outer_value_and_grad(advance(grads, state, params)[0])

    def term(carry, _):
        adjoints, total = carry
        u, of_state, through = pull(adjoints)
        adjoint = jax.tree.map(
            lambda t, h, x: t + h + jnp.asarray(damping, x.dtype) * x, through, hessian(u), u
        )
        return ((adjoint, of_state), jax.tree.map(jnp.add, total, u)), None

    none = jax.tree.map(jnp.zeros_like, (state, grads))
    (adjoints, total), _ = jax.lax.scan(term, ((adjoint, none[0]), none[1]), length=steps - 1)
    total = jax.tree.map(jnp.add, total, pull(adjoints)[0])
    return value, _in_omega(grad_fn, params, omega, total)


def conjugate_gradient(
    grad_fn: GradFn,
    outer_value_and_grad: OuterFn,
    tx: optax.GradientTransformation,
    params: Params,
    opt_state: PyTree,
    omega: PyTree,
    *,
    steps: int,
    damping: float = 0.0,
) -> tuple[Array, PyTree]:
    """Returns the outer loss after one step, and its gradient by conjugate gradients from zero.

    The optimizer is used only to take the step. The iteration stops at a direction without positive
    curvature. If this is the first direction, the gradient is zero and damping is needed.

    Args:
      grad_fn, outer_value_and_grad, tx, params, opt_state, omega: as in `neumann`.
      steps: K, number of products with the Hessian.
      damping: added to the diagonal of the Hessian.
    """
    grads, hessian = jax.linearize(lambda p: grad_fn(p, omega, 0)[0], params)
    value, right = outer_value_and_grad(hypergradient.apply(tx, grads, opt_state, params)[0])

    def step(carry, _):
        x, residual, direction, square, going = carry
        product = _plus(hessian(direction), damping, direction)
        curvature = jnp.asarray(optax.tree.vdot(direction, product))
        going = going & (curvature > 0) & (square > 0)
        alpha = jnp.where(going, square / jnp.where(going, curvature, 1), 0)
        x, residual = _plus(x, alpha, direction), _plus(residual, -alpha, product)
        new = optax.tree.vdot(residual, residual)
        beta = jnp.where(going, new / jnp.where(going, square, 1), 0)
        return (x, residual, _plus(residual, beta, direction), new, going), None

    zero = jax.tree.map(jnp.zeros_like, right)
    start = (zero, right, right, optax.tree.vdot(right, right), jnp.bool_(True))
    (solution, *_), _ = jax.lax.scan(step, start, length=steps)
    return value, _in_omega(grad_fn, params, omega, jax.tree.map(jnp.negative, solution))


def _plus(x: PyTree, scale: Array | float, y: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: (a + scale * b).astype(a.dtype), x, y)


def _in_omega(grad_fn: GradFn, params: Params, omega: PyTree, u: Params) -> PyTree:
    """Returns `(d^2 J / domega dparams) u`."""
    return jax.jvp(lambda p: grad_fn(p, omega, 0)[1], (params,), (u,))[1]


# Forward mode.


Tangents = tuple[PyTree, list[Array]]
"""Derivatives of the parameters and of the floating-point leaves of the optimizer state with
respect to each of m outer variables, leaves `[m, ...]`."""


def zero_tangents(params: Params, opt_state: PyTree, *, count: int) -> Tangents:
    """Returns the tangents before the first step, for `count` outer variables."""
    floats = hypergradient.floats_of(opt_state).pick(opt_state)
    return jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), (params, floats))


def carry(
    step_fn: Callable[[Params, PyTree, Array], tuple[Params, PyTree]],
    params: Params,
    opt_state: PyTree,
    tangents: Tangents,
    *,
    forget: float = 1.0,
) -> Tangents:
    """Returns the tangents after an inner step.

    They are exact if the outer variables do not change. The cost is one forward-mode product of
    the step, a Hessian-vector product, for each variable.

    Args:
      step_fn: `(params, opt_state, c [m]) -> (params, opt_state)`, the inner step; its optimizer
        is `hypergradient.regular` at zero.
      params: inner parameters before the step.
      opt_state: optimizer state before the step.
      tangents: tangents before the step.
      forget: factor of the tangents of earlier steps; below 1 the horizon is about
        `1 / (1 - forget)`.
    """
    moving = hypergradient.floats_of(opt_state)
    count = jax.tree.leaves(tangents)[0].shape[0]

    def advance(params, floats, c):
        new, state = step_fn(params, moving.merge(opt_state, floats), c)
        return new, moving.pick(state)

    primals = params, moving.pick(opt_state), jnp.zeros(count, jax.tree.leaves(params)[0].dtype)
    _, push = jax.linearize(advance, *primals)
    kept = jax.tree.map(lambda x: jnp.asarray(forget, x.dtype) * x, tangents)
    columns = [
        push(*jax.tree.map(lambda x, j=j: x[j], kept), unit)
        for j, unit in enumerate(jnp.eye(count, dtype=primals[2].dtype))
    ]
    return jax.tree.map(lambda *x: jnp.stack(x), *columns)


def along(cotangent: Params, tangents: Tangents) -> Array:
    """Returns the gradient `[m]` of a loss; `cotangent` is its gradient in the parameters."""
    products = jax.tree.map(lambda v, t: jnp.tensordot(t, v, axes=v.ndim), cotangent, tangents[0])
    return sum(jax.tree.leaves(products))  # pyright: ignore[reportReturnType]


# Offsets of all weights.


def offset(weights: Array, c: Array) -> Array:
    """Returns weights `[b, s]` with `c` `[s - 1]` added to their log-ratios to the first weight.

    The sum over the terms does not change. For ratios `sigmoid(logit)`, `c` is added to the logit.
    """
    factor = jnp.exp(jnp.concatenate([jnp.zeros(1, c.dtype), c]))
    scaled = weights * factor[None]
    return scaled * (weights.sum(-1, keepdims=True) / scaled.sum(-1, keepdims=True))


def centred(weights: Array, mask: Array) -> Array:
    """Returns the same weights without the derivative along offsets shared by all examples."""
    logs = jnp.log(jnp.maximum(weights, jnp.finfo(weights.dtype).tiny))
    logits = logs[:, 1:] - logs[:, :1]
    mean = (mask[:, None] * logits).sum(0) / jnp.maximum(mask.sum(), 1)
    return offset(weights, jax.lax.stop_gradient(mean) - mean)


def output_biases(omega: PyTree) -> Any:
    """Returns the parameters that shift all log-ratios of a weighting: its network's last bias.

    Returns:
      An array `[s - 1]`, or its shape.

    Raises:
      ArgumentError: the networks do not have exactly one such bias.
    """
    return jax.tree.leaves(omega)[_bias_at(omega)]


def with_output_biases(tree: PyTree, biases: Array) -> PyTree:
    """Returns the parameters with the output biases replaced."""
    leaves, structure = jax.tree.flatten(tree)
    leaves[_bias_at(tree)] = biases
    return jax.tree.unflatten(structure, leaves)


def _bias_at(tree: PyTree) -> int:
    """Returns the leaf that is the output bias: the one bias that is smaller than all others."""
    names = [partition.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    sizes = {
        i: x.size
        for i, (name, x) in enumerate(zip(names, jax.tree.leaves(tree), strict=True))
        if name.rpartition("/")[2] == "bias" and x.ndim == 1
    }
    least = [i for i, size in sizes.items() if size == min(sizes.values())]
    if len(least) != 1:
        raise ArgumentError(
            f"method=two_speed shifts the last bias of the weighting's network, and {len(least)} "
            "parameters may be it",
            where="method",
            hint="a network with one output bias, narrower than its hidden layers, such as "
            "ratio_mlp; or method=exact",
        )
    return least[0]
