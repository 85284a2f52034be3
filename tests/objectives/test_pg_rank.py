"""PG-RANK against an enumeration of all rankings; draws; absent candidates; bad batches."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core import state, steps
from distill_jax.core.api import Model
from distill_jax.core.errors import ConfigError
from distill_jax.data.transforms import rankings
from distill_jax.losses import listwise
from distill_jax.objectives import pg_rank

N = 4
RANKINGS = np.array(list(itertools.permutations(range(N))))
SCORES = np.array([0.3, -0.5, 1.1, 0.2])
RELEVANCE = np.array([1.0, 0.0, 0.0, 3.0])
STUDENT = Model(
    lambda key, x: ({"scores": jnp.asarray(SCORES)}, {}),
    lambda params, s, x, **_: ({"logits": jnp.broadcast_to(params["scores"][None], x.shape)}, s),
)


def log_prob(scores, ranking):
    """`log pi` and its gradient, from the definition."""
    total, gradient = 0.0, np.zeros(len(scores))
    for i, chosen in enumerate(ranking):
        left = list(ranking[i:])
        probs = np.exp(scores[left]) / np.exp(scores[left]).sum()
        total += np.log(probs[0])
        gradient[chosen] += 1
        gradient[left] -= probs
    return total, gradient


def gain(relevance, ranking, cutoff):
    def dcg(order):
        return sum((2 ** relevance[c] - 1) / np.log2(i + 2) for i, c in enumerate(order[:cutoff]))

    return dcg(ranking) / dcg(np.argsort(-relevance))


def forced(ranking):
    """Noise with which the scores sort to a ranking."""
    noise = -SCORES.copy()
    noise[ranking] += 10.0 * np.arange(N)[::-1]
    return noise


def batch_of(pairs):
    b = len(pairs)
    return {
        "input": jnp.zeros((b, N)),
        "label": jnp.tile(RELEVANCE[None], (b, 1)),
        "gumbel": jnp.asarray([[forced(r) for r in pair] for pair in pairs]),
        "mask": jnp.ones(b),
        "index": jnp.arange(b),
        "epoch": jnp.zeros(b, int),
    }


@pytest.fixture(scope="module")
def enumerated():
    """Every pair of rankings: its probability, and the gradient that its estimate gives."""
    found = [log_prob(SCORES, r) for r in RANKINGS]
    probs = np.exp([x for x, _ in found])
    utility = [gain(RELEVANCE, r, 2) for r in RANKINGS]
    exact = sum(p * u * g for p, u, (_, g) in zip(probs, utility, found, strict=True))
    pairs = list(itertools.product(range(len(RANKINGS)), repeat=2))
    weights = np.array([probs[i] * probs[j] for i, j in pairs])
    estimates = {}
    with jax.enable_x64(True):
        batch = batch_of([(RANKINGS[i], RANKINGS[j]) for i, j in pairs])

        def values(scores, objective):
            params = {"student": {"scores": scores}}
            nets = steps.BoundNets(
                {"student": STUDENT}, params, {"student": {}}, key=jax.random.key(0)
            )
            return objective.loss(nets, batch, {}, jnp.int32(0)).values

        for baseline in (True, False):
            objective = pg_rank.make(cutoff=2, baseline=baseline)
            jacobian = jax.jit(jax.jacobian(lambda s, o=objective: values(s, o)))(SCORES)
            estimates[baseline] = -np.asarray(jacobian["policy_gradient"])
        logged = np.asarray(values(SCORES, pg_rank.make(cutoff=2))["utility"])
    wanted = [(utility[i] + utility[j]) / 2 for i, j in pairs]
    np.testing.assert_allclose(logged, wanted, rtol=1e-12)
    np.testing.assert_allclose(weights.sum(), 1)
    return exact, weights, estimates


@pytest.mark.parametrize("baseline", [True, False])
def test_the_estimate_is_the_gradient_on_average(enumerated, baseline):
    """Of the expected nDCG over all 24 rankings, for all pairs of samples."""
    exact, weights, estimates = enumerated
    np.testing.assert_allclose(weights @ estimates[baseline], exact, atol=1e-12)
    assert np.abs(exact).max() > 0.05


def test_the_baseline_lowers_the_variance(enumerated):
    exact, weights, estimates = enumerated
    with_it, without = (weights @ ((x - exact) ** 2) for x in (estimates[True], estimates[False]))
    assert with_it.sum() < without.sum()


def test_log_probs_and_gains():
    scores, mask = jnp.asarray(SCORES)[None], jnp.ones((1, N))
    found = jax.jit(listwise.plackett_luce_log_prob)(scores, jnp.asarray(RANKINGS)[None], mask)[0]
    np.testing.assert_allclose(found, [log_prob(SCORES, r)[0] for r in RANKINGS], rtol=1e-5)
    for cutoff in (1, 3, 10):
        gains = listwise.ndcg(
            jnp.asarray(RELEVANCE)[None], jnp.asarray(RANKINGS)[None], mask, cutoff=cutoff
        )
        wanted = [gain(RELEVANCE, r, cutoff) for r in RANKINGS]
        np.testing.assert_allclose(gains[0], wanted, rtol=1e-5)
    nothing = listwise.ndcg(jnp.zeros((1, N)), jnp.asarray(RANKINGS)[None], mask, cutoff=2)
    np.testing.assert_array_equal(nothing, 0)


def test_rankings_are_drawn_with_their_probabilities():
    draws, b = 500, 8
    batch = {"label": jnp.zeros((b, N)), "index": jnp.arange(b), "epoch": jnp.zeros(b, int)}
    apply = rankings.make_gumbel_noise(rankings=draws)
    noise = apply(jax.random.key(0), batch, jnp.int32(0))["gumbel"]
    scores = jnp.tile(jnp.asarray(SCORES, jnp.float32)[None], (b, 1))
    drawn = listwise.plackett_luce_rankings(scores, noise, jnp.ones((b, N)))
    order = {tuple(r): i for i, r in enumerate(RANKINGS)}
    counts = np.bincount([order[tuple(r)] for r in np.asarray(drawn).reshape(-1, N)], minlength=24)
    probs = np.exp([log_prob(SCORES, r)[0] for r in RANKINGS])
    error = np.sqrt(probs * (1 - probs) / (draws * b))
    assert (np.abs(counts / (draws * b) - probs) < 4.5 * error).all()
    turned = {name: x[::-1] for name, x in batch.items()}
    np.testing.assert_array_equal(apply(jax.random.key(0), turned, 3)["gumbel"], noise[::-1])


def test_absent_candidates_change_nothing():
    whole = batch_of([(RANKINGS[3], RANKINGS[17])])
    extra = {
        **whole,
        "input": jnp.zeros((1, N + 2)),
        "label": jnp.pad(whole["label"], ((0, 0), (0, 2)), constant_values=3),
        "gumbel": jnp.pad(whole["gumbel"], ((0, 0), (0, 0), (0, 2)), constant_values=50),
        "labelled": jnp.asarray([[1.0] * N + [0.0] * 2]),
    }

    def loss(scores, batch):
        params = {"student": {"scores": scores}}
        nets = steps.BoundNets({"student": STUDENT}, params, {"student": {}}, key=jax.random.key(0))
        return pg_rank.make().loss(nets, batch, {}, jnp.int32(0)).values["policy_gradient"][0]

    both = jax.jit(jax.value_and_grad(loss))
    value, gradient = both(jnp.asarray(SCORES), whole)
    longer = jnp.pad(jnp.asarray(SCORES), (0, 2), constant_values=9)
    other, wide = both(longer, extra)
    np.testing.assert_allclose(value, other, rtol=1e-6)
    np.testing.assert_allclose(np.pad(gradient, (0, 2)), wide, atol=1e-6)


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        ({"cutoff": 0}, {}, "cutoff"),
        ({}, {"gumbel": None}, "gumbel_noise"),
        ({}, {"gumbel": jnp.zeros((1, 1, N))}, "2 or more"),
        ({}, {"gumbel": jnp.zeros((1, 2, N + 1))}, "one score for each candidate"),
        ({}, {"label": jnp.zeros((1, N + 1))}, "one score for each candidate"),
    ],
)
def test_what_is_refused(objective, changes, message):
    batch = {**batch_of([(RANKINGS[0], RANKINGS[1])]), **changes}
    batch = {name: x for name, x in batch.items() if x is not None}
    with pytest.raises(ConfigError, match=message):
        state.infer_shapes(pg_rank.make(**objective), {"student": STUDENT}, batch)


def test_noise_that_cannot_be_drawn():
    with pytest.raises(ConfigError, match="rankings is 0"):
        rankings.make_gumbel_noise(rankings=0)
    with pytest.raises(ConfigError, match="no lists of labels"):
        batch = {"label": jnp.zeros(2, int), "index": jnp.arange(2), "epoch": jnp.zeros(2, int)}
        rankings.make_gumbel_noise()(jax.random.key(0), batch, jnp.int32(0))
