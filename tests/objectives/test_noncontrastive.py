"""BYOL, SimSiam, Barlow Twins, VICReg and KoLeo against loops written from the equations."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.losses import noncontrastive
from tests import harness
from tests.reference import difference, draw, unit

B, V, D = 6, 3, 4
MASK = np.array([1, 1, 0, 1, 1, 0.0])
VALID = np.flatnonzero(MASK)
PAIRS = [(i, j) for i in range(V) for j in range(V) if i != j]


def check(loss, loop, x, *, rtol=1e-6):
    """Compares value and gradient of a scalar, in float64."""
    with jax.enable_x64(True):
        value, grad = jax.jit(jax.value_and_grad(loss))(jnp.asarray(x))
        np.testing.assert_allclose(value, loop(x), rtol=1e-9)
        np.testing.assert_allclose(grad, difference(loop, x), rtol=rtol, atol=1e-8)


def test_cosine_of_views_is_byol_and_simsiam():
    p, t = draw(B, V, D), draw(B, V, D, seed=1)

    def byol(p):  # eq. 2 of BYOL, mean over ordered pairs
        total = 0.0
        for b in VALID:
            for i, j in PAIRS:
                total += ((unit(p[b, i]) - unit(t[b, j])) ** 2).sum() / len(PAIRS)
        return total / len(VALID)

    def ours(p):
        c = noncontrastive.cross_view_cosine(p, jnp.asarray(t))
        return ((2 - 2 * c) * MASK).sum() / MASK.sum()

    check(ours, byol, p)


def loop_barlow(x, y, trade_off):
    d, n = x.shape[1], len(VALID)
    x, y = x[VALID], y[VALID]
    hat = [
        [
            (z[:, i] - z[:, i].mean()) / math.sqrt(((z[:, i] - z[:, i].mean()) ** 2).mean() + 1e-5)
            for i in range(d)
        ]
        for z in (x, y)
    ]
    total = 0.0
    for i in range(d):
        for j in range(d):
            c = sum(hat[0][i][b] * hat[1][j][b] for b in range(n)) / n
            total += (1 - c) ** 2 if i == j else trade_off * c * c
    return total


def test_barlow_twins():
    x, y = draw(B, D), draw(B, D, seed=1)

    def ours(x):
        c = noncontrastive.cross_correlation(x, jnp.asarray(y), jnp.asarray(MASK))
        return noncontrastive.redundancy(c, trade_off=0.3)

    check(ours, lambda x: loop_barlow(x, y, 0.3), x, rtol=1e-5)


def test_vicreg_statistics_are_unbiased():
    z = draw(B, D) * np.array([0.3, 0.5, 2.0, 1.0])

    def variance(z):
        columns = z[VALID].T
        return np.mean([max(0, 1 - math.sqrt(np.var(c, ddof=1) + 1e-4)) for c in columns])

    def covariance(z):
        z = z[VALID]
        c, total = np.cov(z.T, ddof=1), 0.0
        for i in range(D):
            for j in range(D):
                total += c[i, j] ** 2 if i != j else 0
        return total / D

    mask = jnp.asarray(MASK)
    check(lambda z: noncontrastive.variance_hinge(z, mask), variance, z, rtol=1e-5)
    check(lambda z: noncontrastive.covariance_penalty(z, mask), covariance, z, rtol=1e-5)


def test_a_collapsed_batch_has_a_finite_gradient():
    z, mask = jnp.ones((B, D)), jnp.asarray(MASK)
    total = lambda z: (  # noqa: E731
        noncontrastive.variance_hinge(z, mask)
        + noncontrastive.covariance_penalty(z, mask)
        + noncontrastive.redundancy(noncontrastive.cross_correlation(z, z, mask), trade_off=1.0)
        + noncontrastive.koleo(z, mask).sum()
    )
    value, grad = jax.jit(jax.value_and_grad(total))(z)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


def loop_koleo(x, mask, groups):
    values, size = np.zeros(len(x)), len(x) // groups
    for i in range(len(x)):
        others = [j for j in range(i // size * size, (i // size + 1) * size) if j != i and mask[j]]
        if mask[i] and others:
            nearest = min(math.dist(unit(x[i]), unit(x[j])) for j in others)
            values[i] = -math.log(nearest + 1e-8)
    return values


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_koleo_in_groups(groups):
    """In three groups of two, some rows have no other that is not padding."""
    x = draw(B, D)
    ours = lambda x: noncontrastive.koleo(x, jnp.asarray(MASK), groups=groups).sum()  # noqa: E731
    check(ours, lambda x: loop_koleo(x, MASK, groups).sum(), x, rtol=1e-5)


def test_koleo_of_equal_images():
    x = draw(B, D)
    x[1] = x[0]

    @jax.jit
    def both(x):
        values, pull = jax.vjp(lambda x: noncontrastive.koleo(x, jnp.ones(B)), x)
        return values, pull(jnp.ones(B))[0]

    values, grad = jax.device_get(both(x))
    # The two rows are equal, but compiled code may normalize them with other last bits.
    assert (values[:2] > -math.log(1e-7)).all() and (values[:2] <= -math.log(1e-8) + 1e-4).all()
    assert np.isfinite(grad).all()


def nets_of(outputs) -> Any:
    """Networks that give stored arrays, by role, whatever they see."""

    def nets(role, *inputs, train=False, stop_gradient_params=False):
        del inputs, train, stop_gradient_params
        return outputs[role], {}

    return nets


def loss_of(name, z, *, mask=MASK, **kwargs):
    """Loss of embeddings `[b, v, d]`, the heads being identities."""
    objective = harness.make_objective(name, **kwargs)
    flat = {"output": z.reshape(-1, D), "embedding": z.reshape(-1, D)}
    nets = nets_of(dict.fromkeys(objective.roles, flat))
    mask = mask.copy()  # JAX 0.10 keeps the precision in which it met a constant first
    batch = {"views": np.zeros((len(mask), z.shape[1], 2, 2, 1)), "mask": jnp.asarray(mask)}
    terms = objective.loss(nets, batch, {}, jnp.int32(0))
    mean = lambda v: (v * mask).sum() / mask.sum()  # noqa: E731
    return sum(terms.coef.get(k, 1.0) * mean(v) for k, v in terms.values.items())


def test_published_weights_of_two_views():
    """Invariance is a mean over features, of the hinge half counts for each view."""
    z = draw(B, 2, D)
    x, y = z[VALID, 0], z[VALID, 1]
    hinge = lambda z: np.maximum(0, 1 - np.sqrt(z.var(0, ddof=1) + 1e-4)).mean()  # noqa: E731
    off = lambda c: ((c * c).sum() - (np.diag(c) ** 2).sum()) / D  # noqa: E731
    want = 25 * ((x - y) ** 2).mean() + 25 * (hinge(x) + hinge(y)) / 2
    want += off(np.cov(x.T)) + off(np.cov(y.T))
    with jax.enable_x64(True):
        got = jax.jit(lambda z: loss_of("vicreg", z))(z)
        np.testing.assert_allclose(got, want, rtol=1e-9)
        got = jax.jit(lambda z: loss_of("barlow_twins", z, trade_off=0.1))(z)
        np.testing.assert_allclose(got, loop_barlow(z[:, 0], z[:, 1], 0.1), rtol=1e-9)


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg"])
def test_order_of_the_batch_does_not_matter(name):
    z, order = jnp.asarray(draw(B, V, D)), np.random.RandomState(3).permutation(B)
    got = loss_of(name, z[order], mask=MASK[order])
    np.testing.assert_allclose(got, loss_of(name, z), rtol=1e-5)


@pytest.mark.parametrize("stop", [True, False])
def test_stop_gradient_of_simsiam(stop):
    """Without predictor both sides are z: half of the gradient is stopped."""
    z = draw(B, V, D)
    fixed = z.copy()

    def loop(z):
        other = fixed if stop else z
        values = [unit(z[b, i]) @ unit(other[b, j]) for b in VALID for i, j in PAIRS]
        return -np.mean(values)

    with jax.enable_x64(True):
        loss = lambda z: loss_of("simsiam", z, predictor=False, stop_gradient=stop)  # noqa: E731
        grad = jax.jit(jax.grad(loss))(z)
        np.testing.assert_allclose(grad, difference(loop, z), rtol=1e-6, atol=1e-8)


def test_controls_have_fewer_networks():
    assert "predictor" not in harness.make_objective("byol", predictor=False).roles
    assert "predictor" not in harness.make_objective("simsiam", predictor=False).roles


@pytest.mark.parametrize(
    ("name", "kwargs", "where"),
    [
        ("barlow_twins", {"trade_off": -1.0}, "objective.kwargs.trade_off"),
        ("vicreg", {"variance": -1.0}, "objective.kwargs.variance"),
    ],
)
def test_bad_arguments_are_refused(name, kwargs, where):
    with pytest.raises(ConfigError) as error:
        harness.make_objective(name, **kwargs)
    assert error.value.where == where


@pytest.mark.parametrize("name", ["barlow_twins", "cacr", "groco", "moco_v3", "vicreg"])
def test_more_views_than_a_program_can_name_pairs_of_are_refused(name):
    batch = harness.make_batch()
    batch["views"] = jnp.tile(batch["views"], (1, 7, 1, 1, 1))
    with pytest.raises(ConfigError, match="14 views"):
        harness.setup(name, batch=batch)
