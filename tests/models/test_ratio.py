"""Ratio networks: sizes, starts, transcriptions, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.models import ratio_attention, ratio_mlp

B, T, F = 5, 9, 4
MAKES = {"mlp": ratio_mlp.make, "attention": ratio_attention.make}


def features(seed=0):
    return jnp.asarray(np.random.RandomState(seed).randn(B, T, F), jnp.float32)


def scattered(model, x, seed=1):
    """Returns parameters drawn by NumPy, none of them zero."""
    r = np.random.RandomState(seed)
    shapes, _ = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.tree.map(lambda p: jnp.asarray(0.5 * r.randn(*p.shape), jnp.float32), shapes)


@functools.cache
def started(name, **kwargs):
    """Returns a network of four units a layer, and its first parameters."""
    kwargs |= {"mlp": {"hidden": (4,)}, "attention": {"width": 4}}[name]
    model = MAKES[name](**kwargs)
    return model, jax.jit(model.init)(jax.random.key(0), features())[0]


def logits(model, params, x):
    apply = jax.jit(lambda params, x: model.apply(params, {}, x, train=False, rngs={})[0])
    return np.asarray(apply(params, x)["logits"])


def size(model, shape):
    params, _ = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
    return sum(p.size for p in jax.tree.leaves(params))


@pytest.mark.parametrize(
    "hidden, want",
    [
        ((), 900 + 1),
        ((128,), 900 * 128 + 128 + 128 + 1),
        ((128, 64), 900 * 128 + 128 + 128 * 64 + 64 + 64 + 1),
    ],
)
def test_parameters_of_the_perceptron_for_100_classes(hidden, want):
    assert size(ratio_mlp.make(hidden=hidden), (1, 9, 100)) == want


def test_parameters_of_attention_for_100_classes():
    d = 64
    attention = d * 3 * d + 3 * d + d * d + d
    want = 9 * 100 * d + 9 * d + 2 * d + attention + d + 1
    assert size(ratio_attention.make(), (1, 9, 100)) == want


@pytest.mark.parametrize("hidden", [(), (6,), (6, 3)])
def test_perceptron_equals_numpy(hidden):
    model, x = ratio_mlp.make(outputs=2, hidden=hidden, ratio=0.2), features()
    params = scattered(model, x)
    h = np.asarray(x, np.float64).reshape(B, T * F)
    for i in range(len(hidden) + 1):
        layer = jax.tree.map(np.float64, params[f"Dense_{i}"])
        h = h @ layer["kernel"] + layer["bias"]
        h = np.maximum(h, 0) if i < len(hidden) else h + np.log(0.2 / 0.8)
    np.testing.assert_allclose(logits(model, params, x), h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_attention_equals_numpy(heads):
    """Token by token and head by head, as its docstring says."""
    d, model, x = 6, ratio_attention.make(outputs=2, heads=heads, width=6, ratio=0.7), features()
    params = scattered(model, x)
    p = jax.tree.map(np.float64, params)
    want = np.zeros((B, 2))
    for i, blocks in enumerate(np.asarray(x, np.float64)):
        tokens = np.stack([blocks[t] @ p["kernel"][t] + p["names"][0, t] for t in range(T)])
        centred = tokens - tokens.mean(1, keepdims=True)
        normal = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-6)
        normal = normal * p["LayerNorm_0"]["scale"] + p["LayerNorm_0"]["bias"]
        qkv, out = p["Attention_0"]["Dense_0"], p["Attention_0"]["Dense_1"]
        mixed = []
        for head in np.split(normal @ qkv["kernel"] + qkv["bias"], heads, axis=1):
            q, k, v = np.split(head, 3, axis=1)
            scores = np.exp(q @ k.T / np.sqrt(d / heads))
            mixed.append(scores / scores.sum(1, keepdims=True) @ v)
        tokens = tokens + np.concatenate(mixed, 1) @ out["kernel"] + out["bias"]
        want[i] = tokens.mean(0) @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
    want += np.log(0.7 / 0.3)
    np.testing.assert_allclose(logits(model, params, x), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("ratio", [0.5, 0.1])
def test_the_start_is_the_ratio_whatever_the_input(name, ratio):
    model, params = started(name, outputs=3, ratio=ratio)
    got = 1 / (1 + np.exp(-logits(model, params, 10 * features())))
    np.testing.assert_allclose(got, np.full((B, 3), ratio), rtol=1e-6)


@pytest.mark.parametrize("name", MAKES)
def test_a_random_start_tells_examples_apart(name):
    model, params = started(name, zero_init=False)
    assert np.ptp(logits(model, params, features())) > 0.01


def test_attention_knows_blocks_by_their_place():
    model, x = ratio_attention.make(width=8), features()
    params = scattered(model, x)
    assert not np.allclose(logits(model, params, x), logits(model, params, x[:, ::-1]), rtol=1e-2)


def test_attention_needs_blocks():
    model = ratio_attention.make()
    with pytest.raises(ConfigError, match=r"^input: .*\[b, blocks, f\]"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((B, F)))


@pytest.mark.parametrize(
    "name, kwargs, at",
    [
        *((name, {"ratio": r}, "ratio") for name in MAKES for r in (0.0, 1.0)),
        *((name, {"outputs": 0}, "outputs") for name in MAKES),
        ("mlp", {"hidden": (4, 0)}, "hidden"),
        ("attention", {"heads": 0}, "heads"),
        ("attention", {"width": 0}, "width"),
        ("attention", {"heads": 3}, "width"),
    ],
)
def test_hyperparameters_are_checked(name, kwargs, at):
    with pytest.raises(ConfigError, match=f"{at}: "):
        MAKES[name](**kwargs)
