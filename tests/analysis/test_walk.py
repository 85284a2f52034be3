"""The walk enters everything that calls a function, and computes what the function computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from distill_jax.analysis import dependence, walk

X = np.linspace(0.1, 1.0, 6).reshape(2, 3).astype(np.float32)


@jax.custom_vjp
def doubled(x):
    return 2 * jnp.sin(x)


doubled.defvjp(lambda x: (doubled(x), None), lambda _, g: (2 * g,))

CALLS = {
    "jit": lambda x: jax.jit(jnp.sin)(x),
    "checkpoint": lambda x: jax.checkpoint(jnp.sin)(x),
    "custom_jvp": lambda x: jax.nn.relu(jnp.sin(x)),
    "custom_vjp": doubled,
    "scan": lambda x: lax.scan(lambda c, row: (c + 1, jnp.sin(row) * c), 1.0, x)[1],
    "while": lambda x: lax.while_loop(lambda y: y.sum() > 1, jnp.sin, x),
    "cond": lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x),
    "shard_map": lambda x: jax.shard_map(
        jnp.sin,
        mesh=jax.make_mesh((1,), ("a",), devices=jax.devices()[:1]),
        in_specs=jax.sharding.PartitionSpec(),
        out_specs=jax.sharding.PartitionSpec(),
    )(x),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_is_entered(name):
    traced = walk.trace(CALLS[name], X)
    assert "sin" in walk.primitives(traced.jaxpr)
    assert dependence.of_trace(traced).on == {"0"}
    apply = lambda eqn, inputs: walk.bind(eqn, inputs)  # noqa: E731
    [got] = walk.evaluate(traced.jaxpr, [X], apply)
    np.testing.assert_array_equal(got, CALLS[name](X))


def test_a_carry_is_followed_until_it_stays():
    """Each turn of the loop passes an input on to the next place, so that it takes three turns."""

    def fn(a, b, c, d):
        turn = lambda carry: (carry[1], carry[2], carry[3], carry[3] + 1)  # noqa: E731
        return lax.while_loop(lambda carry: carry[3] < 9, turn, (a, b, c, d))

    on = [result.on for result in dependence.of(fn, 1.0, 2.0, 3.0, 4.0)]
    assert on == [{"0", "1", "2", "3"}, {"1", "2", "3"}, {"2", "3"}, {"3"}]
