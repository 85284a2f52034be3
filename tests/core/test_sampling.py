"""Samples: with a cache and without, padded, greedy, ended, of several draws; and their keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core import sampling
from distill_jax.core.errors import ConfigError
from distill_jax.models import transformer

V, P, STEPS = 40, 5, 6
NETS = {
    "gpt2": {"layout": "gpt2", "max_length": P + STEPS, "depth": 2},
    "llama": {"layout": "llama", "groups": 2, "rope_theta": 100.0, "depth": 1},
}
SOME = [pytest.param("gpt2", marks=pytest.mark.slow), "llama"]
SIZES = {"vocabulary": V, "width": 16, "heads": 4, "mlp_width": 24}
BATCH = {"epoch": np.array([3, 3]), "index": np.array([7, 11])}
PROMPT = np.random.default_rng(0).integers(0, V, (2, P)).astype(np.int32)
START = np.array([2, 0], np.int32)


@functools.cache
def network(name):
    """Returns a decoder with a cache, one without, and parameters that are sure of little."""
    arguments = {**SIZES, **NETS[name]}
    model = transformer.make(**arguments)
    like = jax.ShapeDtypeStruct((2, P), jnp.int32)
    shapes, _ = jax.eval_shape(model.init, jax.random.key(0), like)
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape) * 0.5, x.dtype), shapes)

    def apply(params, tokens, mask):
        return model.apply(params, {}, {"tokens": tokens, "mask": mask}, train=False)[0]["logits"]

    decoders = {True: model.decode, False: sampling.uncached(apply, V)}
    return decoders, params, jax.jit(apply)


@functools.cache
def run(name, cached, **options):
    decoders, params, _ = network(name)
    draw = functools.partial(sampling.sample, decoders[cached], params, **options)
    return jax.jit(lambda prompt, keys, start: draw(prompt, keys, start=start))


def drawn(name, cached=True, prompt=PROMPT, start=START, batch=BATCH, count=3, **options):
    keys = sampling.keys_of(jax.random.key(5), batch, count)
    return run(name, cached, **{"steps": STEPS, **options})(prompt, keys, start)


@pytest.mark.parametrize("name", SOME)
def test_a_cache_changes_nothing(name):
    """Also with padding on the left, which the first prompt has."""
    fast, slow = drawn(name), drawn(name, cached=False)
    np.testing.assert_array_equal(fast.tokens, slow.tokens)
    np.testing.assert_allclose(fast.log_probs, slow.log_probs, atol=5e-6)
    assert len(np.unique(np.asarray(fast.tokens)[..., P:])) > 8


@pytest.mark.parametrize("name", SOME)
def test_log_probs_are_those_of_the_network_reading_what_it_said(name):
    samples = drawn(name, temperature=0.7)
    _, params, apply = network(name)
    tokens = samples.tokens.reshape(6, -1)
    mask = np.arange(P + STEPS) >= np.repeat(START, 3)[:, None]
    logits = apply(params, tokens, mask.astype(np.float32))
    wanted = jax.nn.log_softmax(logits[:, P - 1 : -1] / 0.7)
    wanted = np.take_along_axis(np.asarray(wanted), np.asarray(tokens)[:, P:, None], -1)[..., 0]
    np.testing.assert_allclose(samples.log_probs.reshape(6, -1)[:, P:], wanted, atol=5e-6)
    np.testing.assert_array_equal(samples.mask[..., P:], 1)
    np.testing.assert_array_equal(samples.log_probs[..., :P], 0)
    np.testing.assert_array_equal(samples.tokens[..., :P], np.repeat(PROMPT[:, None], 3, 1))


@pytest.mark.parametrize("name", SOME)
def test_padding_on_the_left_changes_nothing(name):
    padded = drawn(name)
    alone = drawn(
        name,
        prompt=PROMPT[:1, 2:],
        start=np.array([0], np.int32),
        batch={key: value[:1] for key, value in BATCH.items()},
    )
    np.testing.assert_array_equal(padded.tokens[0, :, P:], alone.tokens[0, :, P - 2 :])
    np.testing.assert_allclose(
        padded.log_probs[0, :, P:], alone.log_probs[0, :, P - 2 :], atol=5e-6
    )


def test_draws_depend_on_the_example_and_not_on_its_neighbours():
    whole = drawn("llama")
    turned = drawn(
        "llama",
        prompt=PROMPT[::-1],
        start=START[::-1],
        batch={key: value[::-1] for key, value in BATCH.items()},
    )
    np.testing.assert_array_equal(whole.tokens, turned.tokens[::-1])
    fewer = drawn("llama", count=2)
    np.testing.assert_array_equal(whole.tokens[:, :2], fewer.tokens)
    assert not (whole.tokens[:, 0] == whole.tokens[:, 1]).all()


def test_the_most_probable_token():
    """At temperature 0, as of the one most probable token, whatever the keys."""
    greedy = drawn("llama", temperature=0.0)
    np.testing.assert_array_equal(greedy.tokens, drawn("llama", top_k=1).tokens)
    assert (greedy.tokens == greedy.tokens[:, :1]).all() and (greedy.log_probs[..., P:] < 0).all()
    np.testing.assert_array_equal(drawn("llama", top_k=1).log_probs, 0)


def test_the_end_token_ends_a_sequence():
    free = drawn("llama")
    end = int(free.tokens[0, 0, P + 2])
    ended = drawn("llama", end=end)
    reached = np.asarray(free.tokens)[..., P:] == end
    live = np.cumsum(reached, -1) - reached == 0
    np.testing.assert_array_equal(ended.mask[..., P:], live)
    np.testing.assert_array_equal(
        np.asarray(ended.tokens)[..., P:], np.where(live, free.tokens[..., P:], end)
    )
    np.testing.assert_array_equal(
        ended.log_probs[..., P:], np.where(live, free.log_probs[..., P:], 0)
    )


def test_the_loop_stops_when_all_have_ended():
    """Counted by a network that says how often it was called."""
    calls = []

    def step(params, tokens, cache, at, start):
        del params, start
        jax.debug.callback(lambda at: calls.append(int(at)), at)
        logits = jnp.zeros((len(tokens), V)).at[:, 1].set(jnp.where(at >= 2, 1.0, -1.0))
        return logits, cache

    def cache(b, length, dtype):
        return jnp.zeros((b, length), dtype)

    decode = sampling.Decode(cache, step, V)
    keys = sampling.keys_of(jax.random.key(0), BATCH)
    draw = functools.partial(sampling.sample, decode, {}, steps=50, temperature=0.0, end=1)
    samples = jax.jit(draw)(np.zeros((2, 2), np.int32), keys)
    jax.effects_barrier()
    assert samples.mask.sum() == 2 * 2 and sorted(calls) == [0, 2]


def test_frequencies_are_the_softmax():
    def step(params, tokens, cache, at, start):
        del params, at, start
        return jnp.tile(jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]])), (len(tokens), 1)), cache

    decode = sampling.Decode(lambda b, length, dtype: jnp.zeros((b, length), dtype), step, 4)
    n = 4000
    keys = sampling.keys_of(
        jax.random.key(1), {"epoch": np.zeros(1, int), "index": np.zeros(1, int)}, n
    )
    draw = functools.partial(sampling.sample, decode, {}, steps=1)
    for options, wanted in (
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"temperature": 0.5}, np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365),
    ):
        samples = jax.jit(functools.partial(draw, **options))(np.zeros((1, 1), np.int32), keys)
        counts = np.bincount(np.asarray(samples.tokens)[0, :, 1], minlength=4) / n
        np.testing.assert_allclose(counts, wanted, atol=4 * 0.5 / n**0.5)
        first = np.asarray(samples.tokens)[0, :, 1]
        np.testing.assert_allclose(
            np.exp(samples.log_probs[0, :, 1]), np.asarray(wanted)[first], rtol=1e-5
        )


def test_no_gradient_flows_through_samples():
    """A loss may hold a sampler; reverse mode would refuse its loop."""
    decoders, params, apply = network("llama")
    keys = sampling.keys_of(jax.random.key(5), BATCH, 1)

    def loss(params):
        samples = sampling.sample(decoders[True], params, PROMPT, keys, steps=3)
        tokens = samples.tokens[:, 0]
        logits = apply(params, tokens, jnp.ones(tokens.shape))
        return jax.nn.log_softmax(logits)[:, :, 0].sum() + samples.log_probs.sum()

    @jax.jit
    def both(params):
        ones = jax.tree.map(jnp.ones_like, params)
        return jax.grad(loss)(params), jax.jvp(loss, (params,), (ones,))[1]

    gradient, tangent = both(params)
    total = sum(float(x.sum()) for x in jax.tree.leaves(gradient))
    np.testing.assert_allclose(total, tangent, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"steps": 0}, "steps"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": V + 1}, "top_k"),
        ({"end": V}, "end"),
        ({"steps": STEPS + 1}, "steps"),
        ({"prompt": PROMPT[:, :0]}, "prompt"),
        ({"count": 0}, "prompt"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn(options, where):
    with pytest.raises(ConfigError) as error:
        drawn("gpt2", **options)
    assert error.value.where == where
