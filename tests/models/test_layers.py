"""Normalization layers against float64 and against what PyTorch gives for the same inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.models import layers

# Largest errors of PyTorch 2.13.0 (CPU) over the draws of `drawn`, by mean and deviation: of the
# variance relative to its value, of the output, and of the gradient relative to its largest entry.
TORCH = {
    (0, 1): (2.40e-07, 3.79e-07, 1.26e-07),
    (100, 1): (1.64e-07, 2.09e-05, 3.47e-06),
    (1000, 1): (1.69e-07, 1.68e-04, 2.20e-05),
    (1000, 0.1): (2.71e-06, 2.11e-03, 2.67e-04),
    (100, 0.1): (2.18e-07, 1.91e-04, 1.65e-05),
    (10, 0.01): (1.97e-07, 1.38e-04, 1.80e-05),
}
WORST = (1000, 0.1)
SEEDS = range(5)


def drawn(m, s, seed, shape=(64, 8)):
    """Returns an input and a gradient with respect to the output."""
    random = np.random.default_rng(seed)
    x = (random.normal(size=shape) * s + m).astype(np.float32)
    return x, random.normal(size=shape).astype(np.float32)


def exact(x, g, epsilon=1e-5):
    """Returns variance, output and gradient in float64."""
    x, g = x.astype(np.float64), g.astype(np.float64)
    axes = tuple(range(x.ndim - 1))
    scale = 1 / np.sqrt(x.var(axes) + epsilon)
    y = (x - x.mean(axes)) * scale
    return x.var(axes), y, scale * (g - g.mean(axes) - y * (g * y).mean(axes))


NORM = layers.BatchNorm(momentum=0.0)
VARIABLES = {
    "params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)},
    "batch_stats": {"mean": jnp.zeros(8), "var": jnp.ones(8)},
}


@jax.jit
def found(x, g):
    def apply(x):
        return NORM.apply(VARIABLES, x, train=True, mutable=["batch_stats"])

    y, pull, state = jax.vjp(apply, x, has_aux=True)
    return state["batch_stats"]["var"], y, pull(g)[0]


def errors(got, want):
    scales = want[0], 1.0, np.abs(want[2]).max()
    got = [np.asarray(x, np.float64) for x in got]
    return [np.abs((a - b) / c).max() for a, b, c in zip(got, want, scales, strict=True)]


@pytest.mark.parametrize("setting", TORCH, ids=str)
def test_batch_norm_is_as_precise_as_in_pytorch(setting):
    draws = [drawn(*setting, seed) for seed in SEEDS]
    ours = np.max([errors(found(*draw), exact(*draw)) for draw in draws], axis=0)
    assert (ours <= 4 * np.array(TORCH[setting])).all(), ours


def test_batch_norm_over_maps_with_a_large_mean():
    x, g = drawn(*WORST, 0, (64, 8, 8, 8))
    variance, output, gradient = errors(found(x, g), exact(x, g))
    # The mean is 1000 times the deviation: half a rounding error of it is 3e-4 of an output.
    assert variance < 1e-6 and output < 2e-3 and gradient < 1e-4


def test_batch_norm_over_devices_has_the_statistics_of_the_whole_batch():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, g = drawn(*WORST, 0)
    x += np.arange(64, dtype=np.float32)[:, None] // 8  # each device has another mean
    split = NamedSharding(mesh, PartitionSpec("data"))
    got = found(*(jax.device_put(a, split) for a in (x, g)))
    assert (np.array(errors(got, exact(x, g))) <= 4 * np.array(TORCH[WORST])).all()


def test_batch_norm_of_runs_side_by_side():
    draws = [drawn(*setting, 0) for setting in TORCH]
    replicas = jax.vmap(found)(*(np.stack(arrays) for arrays in zip(*draws, strict=True)))
    for i, setting in enumerate(TORCH):
        got = errors([a[i] for a in replicas], exact(*draws[i]))
        assert (np.array(got) <= 4 * np.array(TORCH[setting])).all(), setting


def test_batch_norm_forward_mode_equals_reverse_mode():
    x, g = drawn(100, 1, 0)
    v = drawn(0, 1, 1)[0]
    call = lambda x: NORM.apply(VARIABLES, x, train=True, mutable=["batch_stats"])[0]  # noqa: E731
    push = (jax.jvp(call, (x,), (v,))[1] * g).sum()
    pulled = (exact(x, g)[2] * v).sum()
    np.testing.assert_allclose(push, pulled, rtol=1e-3)


def test_batch_norm_of_bfloat16_reduces_in_float32():
    x = (drawn(0, 1, 0)[0] + 100).astype(jnp.bfloat16)
    variance, output, _ = found(x, jnp.ones_like(x))
    want = exact(x.astype(np.float32), np.ones(x.shape))
    assert output.dtype == jnp.bfloat16 and variance.dtype == jnp.float32
    np.testing.assert_allclose(variance, want[0], rtol=1e-6)
    np.testing.assert_allclose(output.astype(np.float32), want[1], atol=0.02)


def test_batch_norm_of_a_constant_has_no_variance():
    x = np.full((64, 8), 1000.1, np.float32)
    variance, output, gradient = found(x, np.ones_like(x))
    assert np.max(variance) < 1e-6 and np.isfinite(gradient).all()
    assert np.abs(output).max() < 0.1


def test_running_variance_is_an_average_of_biased_ones():
    x, _ = drawn(0, 1, 0, (4, 8))
    norm = layers.BatchNorm(momentum=0.75)
    _, state = norm.apply(VARIABLES, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(
        state["batch_stats"]["var"], 0.75 + 0.25 * x.var(0, ddof=0), rtol=1e-5
    )


@pytest.mark.parametrize("setting", TORCH, ids=str)
def test_layer_norm_centres_before_it_squares(setting):
    x, _ = drawn(*setting, 0, (8, 64))
    variables = {"params": {"scale": jnp.full(64, 2.0), "bias": jnp.ones(64)}}
    norm = layers.LayerNorm(epsilon=1e-6)
    got = jax.jit(norm.apply)(variables, x)
    want = 2 * exact(x.T, x.T, 1e-6)[1].T + 1
    assert np.abs(got - want).max() <= 4 * TORCH[setting][1]


def test_layer_norm_has_the_parameters_and_values_of_flax():
    x, _ = drawn(0, 1, 0)
    ours, theirs = layers.LayerNorm(epsilon=1e-6), nn.LayerNorm(epsilon=1e-6)
    params = theirs.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, ours.init(jax.random.key(0), x)) == jax.tree.map(
        jnp.shape, params
    )
    np.testing.assert_allclose(ours.apply(params, x), theirs.apply(params, x), atol=1e-5)
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, x))
    assert ours.apply(*low).dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", [(2, 6, 4, 3), (1, 7, 5, 2)], ids=str)
def test_mean_pool_and_its_gradient_are_those_of_a_window(shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), np.float32)

    def both(pool):
        return pool(x), jax.grad(lambda x: (pool(x) ** 2).sum())(x)

    want = both(lambda x: nn.avg_pool(x, (2, 2), (2, 2)))
    got = both(layers.mean_pool)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), got, want)
