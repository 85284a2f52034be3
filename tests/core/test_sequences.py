"""Positions of padded and packed sequences, and log-probabilities chunk by chunk."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.core import partition, sequences
from distill_jax.run import collectives


@pytest.mark.parametrize(
    ("mask", "segments", "positions"),
    [
        (None, None, [0, 1, 2, 3, 4, 5]),
        ([1, 1, 1, 1, 0, 0], None, [0, 1, 2, 3, 4, 5]),
        ([0, 0, 1, 1, 1, 1], None, [0, 0, 0, 1, 2, 3]),
        ([0, 1, 1, 0, 1, 1], None, [0, 0, 1, 2, 3, 4]),
        (None, [4, 4, 4, 7, 7, 1], [0, 1, 2, 0, 1, 0]),
        ([1, 1, 1, 1, 1, 0], [1, 1, 2, 2, 2, 0], [0, 1, 0, 1, 2, 0]),
        ([0, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2], [0, 0, 1, 0, 1, 2]),
    ],
)
def test_positions(mask, segments, positions):
    mask, segments = (None if x is None else jnp.array([x]) for x in (mask, segments))
    found = jax.jit(lambda *args: sequences.positions_of(*args, (1, 6)))(mask, segments)
    np.testing.assert_array_equal(found, [positions])


B, T, D, V, K = 3, 7, 5, 20, 4


@functools.cache
def drawn():
    random = np.random.default_rng(0)
    hidden, table, bias = (
        random.normal(size=shape).astype(np.float32) for shape in ((B, T, D), (V, D), (V,))
    )
    ask = random.integers(0, V, (B, T, K)).astype(np.int32)
    return hidden, table, ask, bias


def dense(hidden, table, ask, bias, temperature=1.0):
    logits = (jnp.einsum("btd,vd->btv", hidden, table) + bias[None, None]) / temperature
    return jnp.take_along_axis(jax.nn.log_softmax(logits), ask, -1)


@pytest.mark.parametrize("chunk", [3, 100])
def test_log_probs_are_those_of_all_logits(chunk):
    hidden, table, ask, bias = drawn()
    found = jax.jit(functools.partial(sequences.log_probs_of, temperature=2.0, chunk=chunk))(
        hidden, table, ask, bias=bias
    )
    wanted = jax.jit(dense)(hidden, table, ask, bias, 2.0)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_derivatives_are_those_of_all_logits():
    """In both directions: bilevel steps differentiate forwards."""
    hidden, table, ask, bias = drawn()
    weight = np.random.default_rng(1).normal(size=ask.shape).astype(np.float32)

    def chunked(h, w, c):
        return (weight * sequences.log_probs_of(h, w, ask, bias=c, chunk=2)).sum()

    def whole(h, w, c):
        return (weight * dense(h, w, ask, c)).sum()

    @jax.jit
    def derivatives(*at):
        ones = jax.tree.map(jnp.ones_like, at)
        return [(jax.grad(f, (0, 1, 2))(*at), jax.jvp(f, at, ones)) for f in (chunked, whole)]

    got, want = (jax.tree.leaves(x) for x in derivatives(hidden, table, bias))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_a_token_that_does_not_exist_is_nan():
    hidden, table, _, _ = drawn()
    ask = jnp.full((B, T, 1), V)
    assert np.isnan(jax.jit(sequences.log_probs_of)(hidden, table, ask)).all()


def test_the_most_probable_tokens_and_the_rest():
    hidden, table, _, bias = drawn()
    found = jax.jit(lambda *args: sequences.top_log_probs_of(*args, K, bias=bias, chunk=2))(
        hidden, table
    )
    logits = np.einsum("btd,vd->btv", *(x.astype(np.float64) for x in (hidden, table))) + bias
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    index = np.argsort(-p, -1)
    np.testing.assert_array_equal(found.index, index[..., :K])
    ordered = np.take_along_axis(p, index, -1)
    np.testing.assert_allclose(found.log_probs, np.log(ordered[..., :K]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.tail, np.log(ordered[..., K:].sum(-1)), rtol=1e-5, atol=1e-6)


def test_ties_are_counted_once():
    found = jax.jit(sequences.top_log_probs, static_argnums=1)(jnp.zeros((1, 1, 5)), 2)
    np.testing.assert_array_equal(found.index[0, 0], [0, 1])
    np.testing.assert_allclose(found.tail, np.log(3 / 5), rtol=1e-6)


def test_a_tiny_tail_is_right():
    """1e-20 of probability, which 1 minus the rest cannot tell."""
    found = jax.jit(sequences.top_log_probs, static_argnums=1)(
        jnp.array([[[0.0, -46.0, -46.0]]]), 1
    )
    np.testing.assert_allclose(found.tail, -46 + np.log(2), rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "v", "chunk"),
    [((8, 1024, 4), 256, 1024), ((8, 1024, 4), 49_152, 85), ((512, 64, 4), 128_000, 1)],
)
def test_chunks_bound_the_logits(shape, v, chunk):
    assert sequences.chunk_size(shape, v) == chunk
    assert (
        v < sequences.SMALL_VOCABULARY
        or chunk == 1
        or (shape[0] * chunk * v <= sequences.CHUNK_ENTRIES)
    )


def test_a_batch_stays_split_over_devices():
    """Chunks along t: no device gathers the hidden states of the others."""
    hidden, table, ask, _ = drawn()
    mesh = partition.make_mesh(data=2, devices=jax.devices()[:2])
    split = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    hidden, ask = (np.repeat(x[:1], 4, 0) for x in (hidden, ask))

    def loss(h, w, a):
        return sequences.log_probs_of(h, w, a, chunk=2).sum()

    step = jax.jit(jax.grad(loss), in_shardings=(split, whole, split))
    text = step.lower(hidden, table, ask).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    alone = jax.jit(jax.grad(loss))(hidden, table, ask)
    np.testing.assert_allclose(step(hidden, table, ask), alone, rtol=1e-5, atol=1e-6)


def test_top_tokens_of_a_split_batch_need_no_exchange():
    hidden, table, _, _ = drawn()
    mesh = partition.make_mesh(data=2, devices=jax.devices()[:2])
    split, whole = partition.over_batch(mesh), partition.replicated(mesh)
    hidden = np.stack([hidden[0], 2 * hidden[0], -hidden[0], hidden[0] ** 2])

    def top(h, w):
        return sequences.top_log_probs_of(h, w, 3, chunk=2)

    with jax.set_mesh(mesh):
        step = jax.jit(top, in_shardings=(split, whole)).lower(hidden, table).compile()
    assert "all-gather" not in step.as_text()
    found = step(jax.device_put(hidden, split), jax.device_put(table, whole))
    for one, other in zip(found, jax.jit(top)(hidden, table), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_the_table_is_exchanged_once(dtype):
    """Not in every chunk, and in 32 bits."""
    hidden, table, ask, _ = drawn()
    hidden, table = (x.astype(dtype) for x in (hidden, table))
    mesh = partition.make_mesh(data=2, devices=jax.devices()[:2])
    split, whole = partition.over_batch(mesh), partition.replicated(mesh)
    hidden, ask = (np.concatenate([x, x[::-1]]) for x in (hidden, ask))

    def loss(h, w, a):
        return sequences.log_probs_of(h, w, a, chunk=2).sum()

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), in_shardings=(split, whole, split))
    with jax.set_mesh(mesh):
        step = grad.lower(hidden, table, ask).compile()
    [total] = collectives.totals(collectives.of_compiled(step)).values()
    assert total.nbytes == 4 * table.size
    placed = (jax.device_put(x, s) for x, s in ((hidden, split), (table, whole), (ask, split)))
    alone = jax.jit(jax.grad(loss, argnums=(0, 1)))(hidden, table, ask)
    tolerance = {"float32": 1e-5, "bfloat16": 3e-2}[dtype]
    for one, other in zip(step(*placed), alone, strict=True):
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)
