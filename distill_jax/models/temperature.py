"""A learned temperature and an optional learned bias: the two scalars of losses on pairs."""

import math

import jax
import jax.numpy as jnp

from distill_jax.core.api import Key, Model, Outputs, Params, State
from distill_jax.core.errors import ArgumentError


def make(
    *, initial: float = 0.07, bias: float | None = None, largest_scale: float = 100.0
) -> Model:
    """Returns a map of anything with b rows to `scale` `[b]` and, with a bias, `bias` `[b]`.

    All rows are equal: `scale = min(exp(log_scale), largest_scale)`, one over the temperature
    (Radford et al. 2021, arXiv:2103.00020, section 2.5). The limit passes the gradient on, so that
    a scale at the limit can come back.

    Args:
      initial: temperature at the start, positive; 0.07 for a softmax over candidates, 0.1 for
        sigmoids.
      bias: its value at the start, -10 for sigmoids (Zhai et al. 2023, arXiv:2303.15343); None
        leaves it out, since a softmax does not depend on it.
      largest_scale: limit of the scale, positive.

    Raises:
      ArgumentError: a temperature or a limit that is not positive.
    """
    for name, value in (("initial", initial), ("largest_scale", largest_scale)):
        if not value > 0:
            raise ArgumentError(f"{name} is {value}", where=name, hint="a positive number")

    def init(key: Key, x: jax.Array) -> tuple[Params, State]:
        del key, x
        params = {"log_scale": jnp.asarray(-math.log(initial), float)}
        return params if bias is None else {**params, "bias": jnp.asarray(bias, float)}, {}

    def apply(params: Params, state: State, x: jax.Array, *, train: bool = False, rngs=None):
        del train, rngs
        log_scale = params["log_scale"]
        excess = jnp.maximum(log_scale - math.log(largest_scale), 0)
        scales = {"scale": jnp.exp(log_scale - jax.lax.stop_gradient(excess))}
        if bias is not None:
            scales["bias"] = params["bias"]
        outputs: Outputs = {k: jnp.broadcast_to(v[None], x.shape[:1]) for k, v in scales.items()}
        return outputs, state

    return Model(init, apply)
