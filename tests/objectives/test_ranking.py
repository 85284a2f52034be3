"""The sorting network and the losses on ranks, against loops over wires and anchors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.losses import ranking
from tests.objectives.test_contrastive import LABEL, MASK, REAL, B, V, check
from tests.reference import draw, unit

TAU = 0.3


def loop_sort(x, beta):
    """The odd-even network on one list, comparator by comparator."""
    x, rows = list(x), np.eye(len(x))
    for layer in range(len(x)):
        for lower in range(layer % 2, len(x) - 1, 2):
            a, b = x[lower], x[lower + 1]
            s = 0.5 + math.atan(beta * (b - a)) / math.pi
            x[lower], x[lower + 1] = s * a + (1 - s) * b, (1 - s) * a + s * b
            r, q = rows[lower].copy(), rows[lower + 1].copy()
            rows[lower], rows[lower + 1] = s * r + (1 - s) * q, (1 - s) * r + s * q
    return np.array(x), rows


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_soft_sort(n):
    x = draw(3, n)
    with jax.enable_x64(True):
        sort = jax.jit(lambda x: ranking.soft_sort(x, steepness=2.0))
        values, matrix = jax.device_get(sort(jnp.asarray(x)))
    for i in range(3):
        want = loop_sort(x[i], 2.0)
        np.testing.assert_allclose(values[i], want[0], rtol=1e-12)
        np.testing.assert_allclose(matrix[i], want[1], atol=1e-12)
    np.testing.assert_allclose(matrix.sum(-1), 1, rtol=1e-12)
    np.testing.assert_allclose(matrix.sum(-2), 1, rtol=1e-12)
    assert (matrix >= 0).all()
    np.testing.assert_allclose(np.einsum("brn,bn->br", matrix, x), values, rtol=1e-10)


def test_steep_network_sorts():
    x = draw(4, 7, seed=1)
    with jax.enable_x64(True):
        sort = jax.jit(lambda x: ranking.soft_sort(x, steepness=1e12))
        values, matrix = jax.device_get(sort(jnp.asarray(x)))
    np.testing.assert_allclose(values, np.sort(x), atol=1e-9)
    np.testing.assert_allclose(matrix, np.eye(7)[np.argsort(x)], atol=1e-9)


def loop_order(positive, negative, beta):
    scores = np.concatenate([np.sort(negative), np.sort(positive)])
    rows, n = loop_sort(scores, beta)[1], len(scores)
    total = 0.0
    for i in range(n):
        q = sum(rows[r, i] for r in range(len(negative), n))
        total -= math.log(q) if i >= len(negative) else math.log(1 - q)
    return total / n


def loop_groco(z, k, beta, others):
    """Positives and negatives are of `others`, which stay as they are: no gradient."""
    z, total = unit(z), 0.0
    for i in REAL:
        for v in range(V):
            positive = [z[i, v] @ others[i, u] for u in range(V) if u != v]
            similar = [(others[i, v] @ others[j, v], j) for j in REAL if j != i]
            hardest = sorted(similar, reverse=True)[:k]
            negative = [z[i, v] @ others[j, v] for _, j in hardest]
            total += loop_order(np.array(positive), np.array(negative), beta)
    return total / len(REAL) / V


def test_groco():
    z, mask = draw(B, V, 5), jnp.asarray(MASK)
    check(
        lambda z: ranking.groco(z, mask, negatives=4, steepness=3.0),
        lambda x: loop_groco(x, 4, 3.0, unit(z)),
        z,
    )


def test_order_is_0_where_a_steep_network_finds_it():
    good, bad = jnp.array([0.8, 0.9]), jnp.array([-0.5, 0.1, 0.3])
    order = jax.jit(
        lambda positive, negative: ranking.group_order(positive, negative, steepness=1e9)
    )
    assert float(order(good, bad)) < 1e-5
    assert float(order(bad, good)) > 5


def test_few_real_negatives_are_filled_up():
    """Padding is never a negative, even where fewer real ones are left than are asked for."""
    z = draw(4, 2, 5)
    other = np.concatenate([z[:2], draw(2, 2, 5, seed=1)])
    mask = jnp.array([1.0, 1.0, 0.0, 0.0])
    loss = jax.jit(lambda z: ranking.groco(z, mask, negatives=4, steepness=1.0)[:2])
    value = loss(z)
    assert np.isfinite(value).all()
    np.testing.assert_allclose(value, loss(other), rtol=1e-6)


def loop_look(z, k):
    z, total = unit(z), 0.0
    for i in REAL:
        for v in range(V):
            own = [(z[i, v] @ z[i, u], LABEL[i]) for u in range(V) if u != v]
            others = [(z[i, v] @ z[j, u], LABEL[j]) for j in REAL if j != i for u in range(V)]
            voters = own + sorted(others, reverse=True)[:k]
            votes = [math.exp(s / TAU) for s, y in voters if y == LABEL[i]]
            total -= math.log(sum(votes) / sum(math.exp(s / TAU) for s, _ in voters))
    return total / len(REAL) / V


@pytest.mark.parametrize("k", [3, 1000])
def test_look(k):
    label, mask = jnp.asarray(LABEL), jnp.asarray(MASK)
    check(
        lambda z: ranking.look(z, label, mask, neighbours=k, temperature=TAU),
        lambda z: loop_look(z, k),
        draw(B, V, 5),
    )


def test_own_views_alone_make_a_vote():
    """A class with one example: its other view always votes for it, so the loss is finite."""

    @jax.jit
    @jax.value_and_grad
    def loss(z):
        options = {"neighbours": 2, "temperature": 0.1}
        return ranking.look(z, jnp.arange(4), jnp.ones(4), **options).sum()

    value, grad = loss(jnp.asarray(draw(4, 2, 5)))
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
