"""Gradients of losses where they have a kink: 0 at a tie, and finite wherever inputs are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.losses import (
    contrastive,
    features,
    isotropy,
    jepa,
    logits,
    noncontrastive,
    ranking,
    relations,
    ties,
)
from distill_jax.models import prototypes
from distill_jax.weighting import trilateral

MASK = jnp.ones(4)
Z = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
MAP = jnp.asarray(np.random.default_rng(1).normal(size=(4, 4, 4, 6)), jnp.float32)
VIEWS = jnp.stack([Z, Z[::-1]], axis=1)

# Distances from a student to a fixed teacher, which is reached: nothing may move it away.
REACHED = {
    "absolute": (jepa.absolute, Z),
    "smooth_l1": (jepa.smooth_l1, Z),
    "squared": (jepa.squared, Z),
    "attention": (features.attention_distance, MAP),
    "hierarchical": (features.hierarchical_distance, MAP),
    "distance": (lambda s, t: relations.distance_share(s, t, MASK), Z),
    "angle": (lambda s, t: relations.angle_share(s, t, MASK), Z),
    "similarity": (lambda s, t: relations.similarity_share(s, t, MASK), Z),
    "congruence": (lambda s, t: relations.congruence_share(s, t, MASK, gamma=0.4, order=2), Z),
    "successive": (lambda s, t: relations.successive_share(s, t, MASK), Z),
    "channels": (relations.channel_correlation, MAP),
}


def gradient(fn, *args):
    return jax.jit(jax.grad(lambda x: fn(x, *args[1:]).sum()))(args[0])


@pytest.mark.parametrize("name", REACHED)
def test_a_teacher_that_is_reached_gives_no_gradient(name):
    fn, x = REACHED[name]
    np.testing.assert_allclose(gradient(fn, x, x), 0, atol=1e-7)


def test_factors_of_one_direction_have_no_gradient():
    # 2 / |2| and 1 / |1|: both entries are equal, and the second is 0 in both.
    one, two = jnp.array([[1.0, 0.0]]), jnp.array([[2.0, 0.0]])
    np.testing.assert_array_equal(gradient(features.factor_distance, two, one), 0)
    # By hand: (3, 4) / 5 against (1, 0), signs -1 and 1, the mean of two entries.
    got = gradient(features.factor_distance, jnp.array([[3.0, 4.0]]), one)
    np.testing.assert_allclose(got, [[-0.5 * (16 + 12) / 125, 0.5 * (9 + 12) / 125]], rtol=1e-6)


def test_absolute_value():
    x = jnp.array([-2.0, -0.0, 0.0, 3.0])
    np.testing.assert_array_equal(ties.absolute(x), [2, 0, 0, 3])
    np.testing.assert_array_equal(jax.grad(lambda x: ties.absolute(x).sum())(x), [-1, 0, 0, 1])


# At inputs of zeros, or all equal: embeddings that have died or collapsed.
DEGENERATE = {
    **{name: (lambda x, fn=fn: fn(x, x + 1), x) for name, (fn, x) in REACHED.items()},
    "factor": (lambda x: features.factor_distance(x, x + MAP), MAP),
    "pkt": (lambda x: relations.probability_share(x, x + Z, MASK), Z),
    "nst": (lambda x: relations.selectivity(x, x + MAP), MAP),
    "boundary": (lambda x: features.boundary_distance(x, -x, margin=1.0), MAP),
    "standardized": (logits.standardize, Z),
    "target_norm": (jepa.standardize, Z),
    "inter": (lambda x: logits.inter_class(x, x + Z, temperature=4.0), Z),
    "intra": (lambda x: logits.intra_class(x, x + Z, MASK, temperature=4.0), Z),
    "dkd": (
        lambda x: sum(logits.decoupled_kl(x, x + Z, jnp.zeros(4, jnp.int32), temperature=4.0)),
        Z,
    ),
    "cosine": (lambda x: noncontrastive.cross_view_cosine(x, x), VIEWS),
    "barlow": (
        lambda x: noncontrastive.redundancy(
            noncontrastive.cross_correlation(x, x, MASK), trade_off=0.1
        ),
        Z,
    ),
    "hinge": (lambda x: noncontrastive.variance_hinge(x, MASK), Z),
    "covariance": (lambda x: noncontrastive.covariance_penalty(x, MASK), Z),
    "koleo": (lambda x: noncontrastive.koleo(x, MASK), Z),
    "sigreg": (lambda x: isotropy.sigreg(x, MASK, jnp.eye(6)), Z),
    "attraction": (lambda x: contrastive.attraction(x, t=1.0), VIEWS),
    "repulsion": (lambda x: contrastive.repulsion(x, MASK, t=1.0), VIEWS),
    "groco": (lambda x: ranking.groco(x, MASK, negatives=2, steepness=10.0), VIEWS),
    "look": (
        lambda x: ranking.look(x, jnp.arange(4) % 2, MASK, neighbours=2, temperature=0.1),
        VIEWS,
    ),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_dead_and_collapsed_embeddings_have_moderate_gradients(name):
    fn, like = DEGENERATE[name]
    x = np.stack([np.zeros(like.shape), np.ones(like.shape)]).astype(np.float32)
    losses, slopes = jax.jit(jax.vmap(jax.value_and_grad(lambda x: fn(x).sum())))(x)
    assert np.isfinite(losses).all()
    assert np.abs(slopes).max() < 1e4


def test_zero_vectors_have_no_direction():
    x = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    units = [[0, 0], [0.6, 0.8]]
    kinds = (
        contrastive.normalize,
        ties.normalized,
        features._normalized,
        lambda x: prototypes._directions(x, -1),
    )
    for fn in kinds:
        np.testing.assert_allclose(fn(x), units, rtol=1e-6)
        slope = gradient(lambda x, fn=fn: fn(x)[:, :1], x)
        np.testing.assert_allclose(slope, [[0, 0], [16 / 125, -12 / 125]], rtol=1e-5, atol=1e-9)


def test_edges_of_length_zero_have_no_gradient():
    edge = trilateral.EDGE_MODES["abs"]
    np.testing.assert_array_equal(jax.vmap(jax.grad(edge))(jnp.array([-1.0, 0, 2])), [-1, 0, 1])


def test_squares_off_the_diagonal_are_not_lost_beside_those_on_it():
    matrix = jnp.eye(3) * 3e3 + jnp.ones((3, 3)) * 0.1
    want = 3 * (1 - 3000.1) ** 2
    for trade_off in (0.0, 1e9):
        got = noncontrastive.redundancy(matrix, trade_off=trade_off)
        np.testing.assert_allclose(got, want + trade_off * 6 * 0.01, rtol=1e-5)


def test_target_norm_has_the_epsilon_of_the_authors():
    # torch.nn.functional.layer_norm of the same row, whose epsilon is 1e-5.
    row = jnp.array([[0.01, -0.01, 0.02, -0.02]])
    want = np.array(row) / np.sqrt(2.5e-4 + 1e-5)
    np.testing.assert_allclose(want[0, 0], 0.6202, atol=1e-4)
    np.testing.assert_allclose(jepa.standardize(row), want, rtol=1e-5)
