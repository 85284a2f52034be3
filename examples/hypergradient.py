"""Differentiate a held-out loss in the weights of training examples, through one step of SGD."""

import jax
import jax.numpy as jnp
import optax

import distill_jax as dj

x, y = jax.random.normal(jax.random.key(0), (16, 4)), jnp.arange(16) % 2
held_x, held_y = x[:4], y[:4]
y = y.at[8:].set(1 - y[8:])  # wrong labels


def losses(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(x @ params, y)


compute = dj.hypergradient(
    forward=lambda params: losses(params, x, y),
    inner_loss=lambda omega, values: (jax.nn.sigmoid(omega) * values).mean(),
    outer_loss=lambda params: losses(params, held_x, held_y).mean(),
    optimizer=(optimizer := optax.sgd(0.1, momentum=0.9)),
)
params = jnp.zeros((4, 2))
value, d_omega = jax.jit(compute)(params, optimizer.init(params), jnp.zeros(16))
print("held-out loss", float(value))
print("gradient, right labels", float(d_omega[:8].mean()), "wrong", float(d_omega[8:].mean()))
