"""The step of a bilevel problem: a student learns from weighted terms and a weighting learns too.

    inner:  theta' = theta + update(grad_theta mean_i sum_s w_is(omega) L_is(theta))
    outer:  omega descends the loss of theta' on held-out examples

(Hu et al. 2024, eq. 4-5, arXiv:2312.15112, with one step in place of the inner optimum.)
`outer_trace` has the gradient through one step, `horizon` the gradients with a longer horizon.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distill_jax.core import rng
from distill_jax.core.api import Array, Batch, Key, Model, Params, PyTree, Role, TrainState
from distill_jax.core.outer_options import (
    METHODS,
    ONE_STEP,
    UPDATES,
    Bilevel,
    Optimizers,
    refusal,
)
from distill_jax.core.outer_trace import Made, Trace, last_layer
from distill_jax.core.steps import Decay, Frozen, StepFn, finish_step
from distill_jax.core.weighted_objective import WeightedObjective

__all__ = ["METHODS", "UPDATES", "Bilevel", "Optimizers", "last_layer", "make_bilevel_step"]


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
    """Builds a step, with or without an update of the weighting; the host selects one each time.

    Args:
      weighted: the objective and its weighting.
      models: a network for each role.
      optimizers: the optimizers of both levels.
      bilevel: options of the outer gradient.
      outer: whether the weighting learns in this step. The step then takes `{"train": batch,
        "held_out": batch}`, where the training batch has a leading axis of `bilevel.batches`
        batches if that is more than one; otherwise it takes a training batch.
      precision: compute type of the networks.
      ema: `{role: (source, decay)}`, as in `steps.make_train_step`.
      grad_norm: whether the metrics include the norm of the inner gradient.
      skip_nonfinite: whether a step changes nothing if the loss or the gradient of either level is
        not finite, see `steps.skip`.
      report_nonfinite: whether the metrics include `nonfinite`, 1 in such steps, else 0.

    Returns:
      `(state, frozen, batch, key) -> (state, metrics)`. With `outer`, the metrics also include
      `outer_loss`, before the weighting's update, and `outer_grad_norm`.
    """
    finish = functools.partial(
        finish_step,
        ema=ema or {},
        grad_norm=grad_norm,
        skip_nonfinite=skip_nonfinite,
        report_nonfinite=report_nonfinite,
    )
    made = Made(weighted, models, optimizers, bilevel, precision)
    by_gradient = weighted.weighting.by_gradient
    lookahead = bilevel.outer_update == "lookahead" or by_gradient

    far = bilevel.batches > 1 or bilevel.method in ("neumann", "cg", "truncated")
    if by_gradient and bilevel.method not in ONE_STEP:
        what = f"{type(weighted.weighting).__name__} takes its weights from a gradient of one step"
        raise refusal("method", what, "set method to exact")
    if bilevel.method == "two_speed" and not weighted.stop_features:
        what = "method=two_speed takes what the weighting sees for given"
        raise refusal("method", what, "set stop_features, or method to exact")

    def step(state: TrainState, frozen: Frozen, batch: Batch, key: Key):
        root, key = key, jax.random.fold_in(rng.stream(key, "step"), state.step)
        held_out: Any = batch["held_out"] if outer else None
        ahead: Any = batch["train"] if outer else batch
        several = outer and bilevel.batches > 1
        train = jax.tree.map(lambda x: x[bilevel.back], ahead) if several else ahead
        trace = Trace(made, state, frozen, train, key)
        omega, outer_state = trace.omega, state.opt_state["outer"]
        metrics: dict[str, Array] = {}
        kept: dict[str, PyTree] = {}  # state of the method between steps

        def direction(grads, moved) -> Params:
            metrics["outer_loss"], u = trace.outer_direction(grads, moved, held_out)
            return u

        def learn(gradient) -> tuple[Any, PyTree]:
            metrics["outer_grad_norm"] = optax.tree.norm(gradient)
            updates, new = optimizers.outer.update(gradient, outer_state, omega)
            return optax.apply_updates(omega, updates), new

        def far_gradient() -> PyTree:
            past = state.opt_state.get("past")
            metrics["outer_loss"], gradient = trace.outer_gradient_far(ahead, held_out, root, past)
            return gradient

        weights = trace.weights_now(omega)
        if outer and lookahead:
            if far:
                omega, outer_state = learn(far_gradient())
            else:
                tried, _ = trace.inner_gradient(omega, weights)
                u = direction(tried, trace.apply(tried)[0])
                if by_gradient:
                    gradient = trace.gradient_in_weights(u)
                    metrics["outer_grad_norm"] = optax.tree.norm(gradient)
                    weights = weighted.weighting.from_gradient(gradient, trace.rows)
                else:
                    omega, outer_state = learn(trace.outer_gradient(u))
            if not by_gradient:
                weights = trace.weights_now(omega)
        grads, inner_metrics = trace.inner_gradient(omega, weights)
        inner, inner_state = trace.apply(grads)
        if bilevel.method == "two_speed":
            kept["tangent"] = tangents = trace.carried(state.opt_state["tangent"])
            if outer:
                metrics["outer_loss"], gradient = trace.outer_gradient_two_speed(
                    grads, inner, tangents, held_out
                )
                omega, outer_state = learn(gradient)
        elif outer and not lookahead:
            gradient = far_gradient() if far else trace.outer_gradient(direction(grads, inner))
            omega, outer_state = learn(gradient)
        if bilevel.method == "truncated":
            now, due = {"params": inner, "state": inner_state}, state.step + bilevel.horizon
            due = (due - bilevel.warmup) % bilevel.every == 0
            past = state.opt_state["past"]
            kept["past"] = jax.tree.map(lambda n, p: jnp.where(due, n, p), now, past)

        terms, params = trace.terms, {**inner, **omega}
        return finish(
            state,
            {role: params[role] for role in state.params},
            {"inner": inner_state, "outer": outer_state, **kept},
            {**state.model_state, **terms.state},
            state.memory if terms.memory is None else terms.memory,
            grads,
            {**inner_metrics, **metrics},
            returned=set(terms.state),
        )

    return step
