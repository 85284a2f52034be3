"""Losses of several label sources against a NumPy transcription of Zhao et al. 2023, section 3."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ArgumentError
from distill_jax.data import weak_rules
from distill_jax.evaluators import vote_risk
from distill_jax.losses.votes import majority
from distill_jax.objectives import pareto
from tests.reference import draw, log_softmax, softmax

VOTES = np.array([[0, 1, 1], [-1, 2, -1], [-1, -1, -1], [1, 1, 1]])
TOGETHER = {
    "linear": sum,
    "square": lambda losses: sum(losses) ** 2,
    "norm": lambda losses: sum(x * x for x in losses) ** 0.5,
    "max": lambda losses: max(losses, default=0),
}


def found(made, logits, votes=VOTES):
    nets = lambda *_, **__: ({"logits": jnp.asarray(logits)}, {})  # noqa: E731
    batch = {"input": None, "votes": jnp.asarray(votes), "mask": jnp.ones(len(votes))}
    return made.loss(nets, batch, {}, jnp.int32(0))


@pytest.mark.parametrize("aggregate", TOGETHER)
def test_aggregates_of_the_sources_that_vote(aggregate):
    logits, m = draw(4, 3), VOTES.shape[1]
    with jax.enable_x64(True):
        got = found(pareto.make(aggregate=aggregate), logits)
        one = found(pareto.make(aggregate=aggregate, source=1), logits)
    log_p, want = log_softmax(logits), []
    for b, votes in enumerate(VOTES):
        want.append(TOGETHER[aggregate]([-log_p[b, v] / m for v in votes if v >= 0]))
    np.testing.assert_allclose(got.values["votes"], want)
    np.testing.assert_array_equal(got.counts["votes"], [1, 1, 0, 1])
    alone = [0 if v < 0 else TOGETHER[aggregate]([-log_p[b, v]]) for b, v in enumerate(VOTES[:, 1])]
    np.testing.assert_allclose(one.values["votes"], alone)


@pytest.mark.parametrize("aggregate", [*TOGETHER, "majority"])
def test_gradients_are_finite_where_nobody_votes(aggregate):
    made = pareto.make(aggregate=aggregate)
    grad = jax.grad(lambda z: found(made, z).values["votes"].sum())(jnp.asarray(draw(4, 3)))
    assert np.isfinite(grad).all() and not grad[2].any() and grad[0].any()


def test_majority_splits_ties():
    np.testing.assert_allclose(
        majority(jnp.asarray([[0, 1, 1], [0, 1, -1], [-1, -1, -1]]), k=4),
        [[0, 1, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4],
    )


def test_risk_and_error_of_a_source():
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(400, 3)), random.integers(0, 3, 400)
    votes = random.integers(-1, 3, (400, 2))
    got = vote_risk.make(source=1, bins=4, riskiest=0.25)(
        {"student": {"logits": logits}}, {"label": labels, "votes": votes}
    )
    rows = np.flatnonzero(votes[:, 1] >= 0)
    risk = 1 - softmax(logits)[rows, votes[rows, 1]]
    wrong = votes[rows, 1] != labels[rows]
    ece = 0.0
    for low in np.arange(4) / 4:
        inside = (risk >= low) & (risk < low + 0.25)
        ece += abs(risk[inside].mean() - wrong[inside].mean()) * inside.mean()
    assert np.isclose(got["risk_ece"], ece)
    assert np.isclose(got["risk_correlation"], np.corrcoef(risk, wrong)[0, 1])
    kept = sorted(zip(risk, wrong, strict=True))[: len(rows) - round(len(rows) / 4)]
    assert np.isclose(got["vote_error_rest"], sum(w for _, w in kept) / len(rows))
    assert np.isclose(got["vote_error"], wrong.mean())


def test_rules_abstain_and_copies_are_wrong_together():
    pytest.importorskip("sklearn")
    made = weak_rules.make(rules=3, copies=2, split_seed=1)
    for part in made.parts.values():
        rows = part.read(np.arange(len(part)))
        votes = rows["votes"]
        assert votes.shape[1] == 6 and set(np.unique(votes)) == {-1, 0, 1}
        np.testing.assert_array_equal(votes[:, 0], votes[:, 3])
        np.testing.assert_array_equal(votes[:, 0], votes[:, 4])
        assert (votes[:, 5] >= 0).all() and (votes[:, 0] < 0).any()
    assert (votes[:, 5] == rows["label"]).mean() > 0.7


@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        (pareto.make, {"aggregate": "mean"}),
        (weak_rules.make, {"task": "digit"}),
        (weak_rules.make, {"copies": 9}),
    ],
)
def test_wrong_arguments_are_named(make, kwargs):
    with pytest.raises(ArgumentError, match=next(iter(kwargs))):
        make(**kwargs)


def test_sources_that_do_not_exist_are_named():
    with pytest.raises(ArgumentError, match="source is 3"):
        found(pareto.make(source=3), draw(4, 3))
