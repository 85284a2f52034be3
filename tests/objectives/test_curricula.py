"""Ranking losses and curricula against loops over candidates and pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from distill_jax.core import state
from distill_jax.core.api import Model
from distill_jax.core.errors import ConfigError
from distill_jax.data.transforms import rankings
from distill_jax.evaluators import ranking as evaluator
from distill_jax.losses import listwise
from distill_jax.models import two_tower
from distill_jax.objectives import ranking

B, N, TOTAL = 3, 5, 10
R = np.random.default_rng(0)
SCORES = R.normal(size=(B, N))
FIRST = R.normal(size=(B, N))
LABEL = np.array([[3.0, 0, 1, 0, 2], [0, 0, 1, 1, 3], [2, 0, 0, 3, 3]])
KNOWN = np.array([[1.0] * 5, [1.0] * 4 + [0], [1.0] * 5])
STUDENT = Model(
    lambda key, x: ({"w": jnp.ones(())}, {}),
    lambda params, s, x, **_: ({"logits": params["w"] * x}, s),
)


def batch_of(**more):
    arrays = {
        "input": SCORES,
        "label": LABEL,
        "labelled": KNOWN,
        "first_stage": FIRST,
        "mask": np.ones(B),
    }
    whole = {"index": jnp.arange(B), "epoch": jnp.zeros(B, int)}
    return {**{k: jnp.asarray(x, jnp.float32) for k, x in arrays.items()}, **whole, **more}


def nets(role, x, *, train=False):
    return {"logits": x}, {}


def value(scores, known, kind, i):
    """A heuristic of candidate i of one list."""
    others = [j for j in range(N) if known[j]]
    if kind == "reciprocal_rank":
        return 1 / (1 + sum(scores[j] > scores[i] for j in others))
    own = scores[others]
    if kind == "normalized_score":
        return (scores[i] - own.min()) / (own.max() - own.min())
    return scipy.stats.gaussian_kde(own).integrate_box_1d(-np.inf, scores[i])


def losses(loss, kind=None, order="easy"):
    """Weight-free losses and the ease of each example of each list."""
    found = []
    for s, first, r, known in zip(SCORES, FIRST, LABEL, KNOWN, strict=True):
        h = [value(first, known, kind, i) if kind and known[i] else 0.0 for i in range(N)]
        rows = []
        for i in range(N):
            if loss == "pointwise" and known[i]:
                p, y = 1 / (1 + np.exp(-s[i])), r[i] / 3
                d = h[i] if r[i] > 0 else 1 - h[i]
                rows.append((-(y * np.log(p) + (1 - y) * np.log(1 - p)), d))
            for j in range(N):
                if loss == "pairwise" and known[i] and known[j] and r[i] > r[j]:
                    rows.append((np.log1p(np.exp(s[j] - s[i])), (h[i] - h[j] + 1) / 2))
        ell, d = np.array(rows).T
        found.append((ell, 1 - d if order == "hard" else d))
    return found


@pytest.mark.parametrize("loss", ["pointwise", "pairwise"])
@pytest.mark.parametrize("kind", rankings.HEURISTICS)
@pytest.mark.parametrize("order", ["easy", "hard"])
def test_a_curriculum_is_its_equation(loss, kind, order):
    add = rankings.make_ranking_ease(heuristic=kind, pairs=loss == "pairwise", order=order)
    batch = add(jax.random.key(0), batch_of(), jnp.int32(0))
    objective = ranking.make(rank_loss=loss, grades=3, ramp="50 %", total_steps=TOTAL)
    for step in (0, 2, 5, 9):
        done = min(step / 5, 1)
        terms = objective.loss(nets, batch, {}, jnp.int32(step))
        rows = losses(loss, kind, order)
        wanted = [np.mean((d * (1 - done) + done) * ell) for ell, d in rows]
        np.testing.assert_allclose(terms.values["ranking"], wanted, rtol=2e-5)
        mean = [np.mean(d * (1 - done) + done) for _, d in rows]
        np.testing.assert_allclose(terms.values["ease_weight"], mean, rtol=1e-5)
        assert terms.coef["ease_weight"] == 0


@pytest.mark.parametrize("loss", ["pointwise", "pairwise"])
def test_at_batch_level_all_losses_have_one_weight(loss):
    add = rankings.make_ranking_ease(heuristic="kde", pairs=loss == "pairwise")
    batch = add(jax.random.key(0), batch_of(mask=jnp.array([1.0, 1, 0])), jnp.int32(0))
    objective = ranking.make(rank_loss=loss, grades=3, ramp=10, level="batch")
    assert objective.couples_batch and not ranking.make(ramp=10).couples_batch
    found = objective.loss(nets, batch, {}, jnp.int32(4)).values["ranking"]
    rows = losses(loss, "kde")
    weight = np.mean([np.mean(0.6 * d + 0.4) for _, d in rows[:2]])
    np.testing.assert_allclose(found, [weight * ell.mean() for ell, _ in rows], rtol=2e-5)


def test_without_a_curriculum():
    for loss in ("pointwise", "pairwise"):
        found = ranking.make(rank_loss=loss, grades=3).loss(nets, batch_of(), {}, jnp.int32(0))
        wanted = [ell.mean() for ell, _ in losses(loss)]
        np.testing.assert_allclose(found.values["ranking"], wanted, rtol=2e-5)
    found = ranking.make(rank_loss="listwise").loss(nets, batch_of(), {}, jnp.int32(0))
    wanted = []
    for s, r, known in zip(SCORES, LABEL, KNOWN, strict=True):
        at = known > 0
        gains = 2 ** r[at] - 1
        p = np.exp(s[at]) / np.exp(s[at]).sum()
        wanted.append(-(gains / gains.sum() * np.log(p)).sum())
    np.testing.assert_allclose(found.values["ranking"], wanted, rtol=2e-5)
    nothing = batch_of(label=jnp.zeros((B, N)))
    for loss in ranking.LOSSES[1:]:
        terms = ranking.make(rank_loss=loss).loss(nets, nothing, {}, jnp.int32(0))
        np.testing.assert_array_equal(terms.values["ranking"], 0)


@pytest.mark.parametrize("pairs", [True, False])
def test_shuffled_ease_has_the_same_values(pairs):
    def made(order, key=0, **more):
        add = rankings.make_ranking_ease(heuristic="kde", pairs=pairs, order=order)
        batch = add(jax.random.key(key), batch_of(**more), jnp.int32(0))
        return np.asarray(batch["ease"]).reshape(B, -1)

    easy, mixed = made("easy"), made("shuffled")
    np.testing.assert_allclose(np.sort(mixed, 1), np.sort(easy, 1), rtol=1e-6)
    np.testing.assert_array_equal(mixed == 0, easy == 0)
    assert (mixed != easy).any(1).all() and (mixed != made("shuffled", key=1)).any()
    np.testing.assert_array_equal(mixed, made("shuffled"))
    assert (mixed != made("shuffled", epoch=jnp.ones(B, int))).any()


def test_metrics_are_their_definitions():
    batch = {"label": LABEL, "labelled": KNOWN}
    found = evaluator.make(cutoffs=(2, 4), relevant=3)({"student": {"logits": SCORES}}, batch)
    order = listwise.plackett_luce_rankings(
        jnp.asarray(SCORES), jnp.zeros((B, 1, N)), jnp.asarray(KNOWN)
    )
    for cutoff in (2, 4):
        gains = listwise.ndcg(jnp.asarray(LABEL), order, jnp.asarray(KNOWN), cutoff=cutoff)
        np.testing.assert_allclose(found[f"ndcg{cutoff}"], gains.mean(), rtol=1e-5)
    reciprocal, first = [], []
    for ranked, r, known in zip(np.asarray(order)[:, 0], LABEL, KNOWN, strict=True):
        ranks = [i for i, c in enumerate(ranked) if known[c] and r[c] >= 3]
        reciprocal.append(1 / (ranks[0] + 1) if ranks and ranks[0] < 4 else 0)
        first.append(bool(ranks) and ranks[0] == 0)
    np.testing.assert_allclose(found["mrr4"], np.mean(reciprocal))
    np.testing.assert_allclose(found["precision1"], np.mean(first))


def test_two_towers_are_their_equation():
    model = two_tower.make(hidden=(4,), width=3)
    x = {"query": R.normal(size=(2, 6)), "candidates": R.normal(size=(2, N, 6))}
    x = {name: value.astype(np.float32) for name, value in x.items()}
    params, _ = model.init(jax.random.key(0), x)
    kernels = [np.asarray(params[f"Dense_{i}"]["kernel"]) for i in (0, 1)]
    embed = lambda h: np.maximum(h @ kernels[0], 0) @ kernels[1]  # noqa: E731
    wanted = (embed(x["query"])[:, None] * embed(x["candidates"])).sum(-1) / 3**0.5
    found = model.apply(params, {}, x, train=False)[0]["logits"]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    with pytest.raises(ConfigError, match="no query and candidates"):
        model.init(jax.random.key(0), np.zeros((2, 6), np.float32))


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        ({"rank_loss": "pairwse"}, {}, "pairwise"),
        ({"level": "batches"}, {}, "batch"),
        ({"grades": 0}, {}, "grades is 0"),
        ({"rank_loss": "listwise", "ramp": 5}, {}, "the loss is of lists"),
        ({"ramp": "50 %"}, {}, "needs total_steps"),
        ({"ramp": 5}, {}, "pairs=True"),
        ({"ramp": 5, "rank_loss": "pointwise"}, {"ease": jnp.ones((B, N, N))}, "pairs=False"),
        ({}, {"label": jnp.zeros((B, N + 1))}, "one score for each candidate"),
    ],
)
def test_what_is_refused(objective, changes, message):
    with pytest.raises(ConfigError, match=message):
        batch = batch_of(**changes)
        state.infer_shapes(ranking.make(**objective), {"student": STUDENT}, batch)


def test_ease_that_cannot_be_made():
    for kwargs, message in (
        ({"heuristic": "rank"}, "reciprocal_rank"),
        ({"order": "random"}, "no order"),
    ):
        with pytest.raises(ConfigError, match=message):
            rankings.make_ranking_ease(**kwargs)
    batch = batch_of()
    del batch["first_stage"]
    with pytest.raises(ConfigError, match="no first_stage"):
        rankings.make_ranking_ease()(jax.random.key(0), batch, jnp.int32(0))
