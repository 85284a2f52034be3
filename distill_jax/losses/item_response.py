"""Difficulty of examples from the answers of many networks: item response models.

`P(network i is right on example j) = sigmoid(a_j (ability_i - difficulty_j))`; with `a_j = 1` the
one-parameter model (Rasch 1960), else the two-parameter one (Birnbaum 1968). The estimate maximizes
the posterior under standard normal priors of abilities and difficulties, and of `log a_j` with a
deviation of one half, which makes it finite where all networks agree.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from distill_jax.core import ranges
from distill_jax.core.api import Array

SPREAD = 0.5
"""Standard deviation of the prior of the logarithm of a discrimination."""


class Items(NamedTuple):
    """An estimate.

    Attributes:
      ability: of each network, `[m]`.
      difficulty: of each example, `[n]`.
      discrimination: of each example, `[n]`, above 0; 1 in the one-parameter model.
    """

    ability: Array
    difficulty: Array
    discrimination: Array

    def logits(self) -> Array:
        """Returns the log-odds that a network is right on an example, `[m, n]`."""
        gap = self.ability[:, None] - self.difficulty[None]
        return self.discrimination[None] * gap


def negative_log_posterior(
    ability: Array, difficulty: Array, log_slope: Array, right: Array, known: Array
) -> Array:
    """Returns the scalar that `fit` minimizes, up to a constant.

    Args:
      ability: `[m]`.
      difficulty: `[n]`.
      log_slope: `log a`, `[n]`.
      right: 1 where a network is right, `[m, n]`.
      known: 1 where this is known, `[m, n]`.
    """
    logits = Items(ability, difficulty, jnp.exp(log_slope)).logits()
    loss = (known * optax.sigmoid_binary_cross_entropy(logits, right)).sum()
    prior = (ability**2).sum() + (difficulty**2).sum() + (log_slope**2).sum() / SPREAD**2
    return loss + 0.5 * prior


def fit(
    right: Array, known: Array | None = None, *, slopes: bool = False, steps: int = 500
) -> Items:
    """Estimates abilities and difficulties from answers.

    Args:
      right: 1 where network i is right on example j, 0 where it is wrong, `[m, n]`.
      known: 1 where the answer is known, `[m, n]`; all are by default.
      slopes: whether examples have discriminations (the two-parameter model).
      steps: of Adam with a falling rate, at least 1.
    """
    ranges.sizes(steps=steps)
    right = jnp.asarray(right, jnp.float32)
    seen = jnp.ones_like(right) if known is None else jnp.asarray(known, right.dtype)
    m, n = right.shape
    start = (jnp.zeros(m), jnp.zeros(n), jnp.zeros(n))
    tx = optax.adam(optax.cosine_decay_schedule(0.1, steps))

    def step(carry, _):
        params, state = carry
        gradient = jax.grad(negative_log_posterior, argnums=(0, 1, 2))(*params, right, seen)
        ability, difficulty, slope = gradient
        gradient = (ability, difficulty, slope if slopes else jnp.zeros_like(slope))
        update, state = tx.update(gradient, state)
        return (optax.apply_updates(params, update), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps)[0][0])
    ability, difficulty, log_slope = run((start, tx.init(start)))
    return Items(ability, difficulty, jnp.exp(log_slope))
