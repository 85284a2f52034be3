"""What traced functions show: dependence, zeros, dead gradients, and a softmax taken twice."""

import jax
import jax.numpy as jnp
import pytest

from distill_jax.analysis import dependence, softmax, walk

X = jax.ShapeDtypeStruct((4, 3), jnp.float32)


def loss_of(apply):
    """Returns the gradient of a sum over `{"a": [3], "b": [3]}`, of which "b" must be dead."""
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    return lambda x: jax.grad(lambda p: apply(p, x).sum())(params)


@jax.custom_vjp
def quantize(x):
    return jnp.round(x)


quantize.defvjp(lambda x: (quantize(x), None), lambda _, g: (jnp.zeros_like(g),))


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x)


straight_through.defvjp(lambda x: (straight_through(x), None), lambda _, g: (g,))


def scanned(p, x):
    def body(carry, _):
        return carry * p["a"][None] + jax.lax.stop_gradient(p["b"])[None], None

    return jax.lax.scan(body, x, None, length=3)[0]


def branches(p, x):
    dead = jax.lax.stop_gradient(p["b"])[None]
    return jax.lax.cond(x.sum() > 0, lambda: x * p["a"][None] + dead, lambda: x + dead)


DEAD = {
    "stop_gradient": lambda p, x: x * p["a"][None] + jax.lax.stop_gradient(p["b"])[None],
    "unused": lambda p, x: x * p["a"][None],
    "times zero": lambda p, x: x * p["a"][None] + 0.0 * jnp.exp(x * p["b"][None]),
    "argmax": lambda p, x: x * p["a"][None] + jnp.argmax(x * p["b"][None], -1)[:, None],
    "round": lambda p, x: x * p["a"][None] + jnp.round(x * p["b"][None]),
    "custom_vjp": lambda p, x: x * p["a"][None] + quantize(x * p["b"][None]),
    "checkpoint": lambda p, x: jax.checkpoint(DEAD["stop_gradient"])(p, x),
    "scan": scanned,
    "cond": branches,
    "vmap": lambda p, x: jax.vmap(lambda row: DEAD["stop_gradient"](p, row[None])[0])(x),
}


@pytest.mark.parametrize("name", DEAD)
def test_dead_leaves_are_found(name):
    assert dependence.dead_leaves(loss_of(DEAD[name]), X) == [False, True]


def test_a_straight_through_rule_keeps_a_leaf_alive():
    grad = loss_of(lambda p, x: x * p["a"][None] + straight_through(x * p["b"][None]))
    assert dependence.dead_leaves(grad, X) == [False, False]


def test_dependencies_pass_loops_and_skip_zeros():
    def fn(x, y, z):
        total = jax.lax.fori_loop(0, 3, lambda i, c: c + y.sum(), 0.0)
        return {"loop": total, "zero": 0.0 * x + z, "all": x + total}

    on = {name: set(result.on) for name, result in dependence.of(fn, X, X, X).items()}
    assert on == {"loop": {"1"}, "zero": {"2"}, "all": {"0", "1"}}
    nested = lambda x, y: x + y["b"]  # noqa: E731
    assert dependence.inputs_used(nested, X, {"a": X, "b": X}) == {"0", "1/b"}


TWICE = {
    "softmax, log_softmax": lambda x: jax.nn.log_softmax(jax.nn.softmax(x)),
    "temperature": lambda x: jax.nn.log_softmax(jax.nn.softmax(x) / 4.0),
    "softmax, logsumexp": lambda x: jax.nn.logsumexp(jax.nn.softmax(x), -1),
    "by hand": lambda x: jax.nn.softmax(jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True)),
    "exp of log": lambda x: jax.nn.softmax(jnp.exp(jax.nn.log_softmax(x)) + 1e-6),
    "half precision": lambda x: jax.nn.softmax(jax.nn.softmax(x).astype(jnp.bfloat16)),
    "jit": lambda x: jax.jit(jax.nn.softmax)(jax.jit(jax.nn.softmax)(x)),
}
ONCE = {
    "softmax": jax.nn.softmax,
    "log_softmax, softmax": lambda x: jax.nn.softmax(jax.nn.log_softmax(x)),
    "entropy": lambda x: (jax.nn.softmax(x) * jax.nn.log_softmax(x)).sum(-1),
    "attention": lambda x: jax.nn.softmax(jax.nn.softmax(x) @ x.T),
    "weighed": lambda x: jax.nn.softmax(jax.nn.softmax(x) * x),
    "other axis": lambda x: jnp.exp(x) / jnp.exp(x).sum(0, keepdims=True),
}


@pytest.mark.parametrize("name", [*TWICE, *ONCE])
def test_a_softmax_of_a_softmax_is_found(name):
    fn = (TWICE | ONCE)[name]
    gradient = lambda x: jax.grad(lambda x: fn(x).astype(jnp.float32).sum())(x)  # noqa: E731
    for traced in (fn, gradient):
        assert softmax.repeated(walk.trace(traced, X)) == (name in TWICE)


def test_probabilities_are_known_as_such():
    assert softmax.gives_probabilities(lambda x: {"logits": x, "p": jax.nn.softmax(x)}, X)
    assert not softmax.gives_probabilities(jax.nn.log_softmax, X)
