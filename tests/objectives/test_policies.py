"""Which examples a teacher is asked about: the policies, and the objectives that use them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from distill_jax.core.errors import ConfigError
from distill_jax.losses import policies
from distill_jax.objectives import active_distillation, ssld
from tests import harness
from tests.reference import softmax

R = np.random.default_rng(0)


def worth(p, gains, wrong, kappa):
    """The least gain over the sets of wrong answers: those of the largest p g."""
    v = np.sort(p * gains)[::-1]
    return v[wrong:].sum() - kappa * v[:wrong].sum()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kappa", [0.0, 1.0])
def test_the_distribution_solves_the_game(seed, kappa):
    """Against a linear programme: max sum v - (1 + kappa) (m t + sum u), u_i >= v_i - t, u >= 0."""
    r = np.random.default_rng(seed)
    n = 9
    gains, wrong = r.uniform(0.05, 1, n), int(r.integers(0, 4))
    c = np.concatenate([-gains, [(1 + kappa) * wrong], np.full(n, 1 + kappa)])
    above = np.hstack([np.diag(gains), -np.ones((n, 1)), -np.eye(n)])
    sums = np.concatenate([np.ones(n), np.zeros(n + 1)])[None]
    bounds = [(0, None)] * n + [(0, None)] + [(0, None)] * n
    best = linprog(c, A_ub=above, b_ub=np.zeros(n), A_eq=sums, b_eq=[1], bounds=bounds)
    p = policies.robust_distribution(gains, wrong=wrong, kappa=kappa)
    assert p.min() >= 0
    np.testing.assert_allclose(p.sum(), 1)
    np.testing.assert_allclose(worth(p, gains, wrong, kappa), -best.fun, atol=1e-6)


def test_a_teacher_without_errors_is_asked_greedily():
    p = policies.robust_distribution(np.array([0.2, 0.9, 0.5]), wrong=0, kappa=0)
    np.testing.assert_array_equal(p, [0, 1, 0])


def test_a_hopeless_teacher_is_asked_about_everything():
    p = policies.robust_distribution(np.array([0.2, 0.9, 0.5]), wrong=3, kappa=1)
    assert (p > 0).all()


def test_margins_and_entropy():
    probs = softmax(R.normal(size=(20, 4)))
    want = [1 - (sorted(row)[-1] - sorted(row)[-2]) for row in probs]
    np.testing.assert_allclose(policies.margin_gains(probs), want)
    np.testing.assert_allclose(policies.margin_gains(np.eye(3)), 1e-3)
    np.testing.assert_allclose(policies.entropy(np.eye(3)), 0)
    np.testing.assert_allclose(policies.entropy(np.full((1, 4), 0.25)), np.log(4))


@pytest.mark.parametrize("budget", [1, 5, 12, 20])
def test_inclusion_probabilities(budget):
    p = np.sort(R.dirichlet(np.full(20, 0.3)))
    got = policies.inclusion_probabilities(p, budget=budget)
    np.testing.assert_allclose(got.sum(), budget)
    assert got.min() >= 0 and got.max() <= 1 + 1e-12
    free = got < 1 - 1e-9
    np.testing.assert_allclose(np.ptp(got[free] / p[free]) if free.any() else 0, 0, atol=1e-6)


def test_a_budget_beyond_the_support_spreads_evenly():
    got = policies.inclusion_probabilities(np.array([0.5, 0.5, 0, 0, 0]), budget=3)
    np.testing.assert_allclose(got, [1, 1, 1 / 3, 1 / 3, 1 / 3])


def test_rounding_keeps_the_sum_and_the_means():
    inclusion = np.array([1, 0, 0.9, 0.3, 0.5, 0.7, 0.1, 0.5])
    draws = [policies.dependent_rounding(inclusion, np.random.default_rng(s)) for s in range(4000)]
    assert {int(d.sum()) for d in draws} == {4}
    np.testing.assert_allclose(np.mean(draws, 0), inclusion, atol=4 * 0.5 / 4000**0.5)


def test_top_of_each_class():
    probs = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.55, 0.45]])
    got = policies.class_topk(probs, per_class=1)
    np.testing.assert_array_equal(got, [True, False, True, False])
    argmax = policies.class_topk(probs, per_class=2)
    column = policies.class_topk(probs, per_class=2, rule="column")
    np.testing.assert_array_equal(argmax, [True, True, True, False])
    np.testing.assert_array_equal(column, [True, True, True, True])
    with pytest.raises(ConfigError, match="rule"):
        policies.class_topk(probs, per_class=1, rule="row")


def dataset_pass(n=40, labelled=10):
    rows = {"probs": softmax(2 * R.normal(size=(n, 5))), "labelled": np.zeros(n, np.float32)}
    rows["labelled"][:labelled] = n / labelled
    ids = np.random.default_rng(1).permutation(64)[:n].astype(np.int32)
    return rows, ids


@pytest.mark.parametrize("policy", active_distillation.POLICIES)
def test_a_budget_is_spent_once_and_on_the_pool(policy):
    objective = harness.make_objective("active_distillation", policy=policy, budget=7, planted=0.2)
    memory = jax.device_get(objective.memory(jax.random.key(0), {}))
    rows, ids = dataset_pass()
    found = objective.init_memory(rows, ids, memory, np.random.default_rng(0))
    assert np.count_nonzero(found["soft"]) == 7 and np.count_nonzero(found["hard"]) == 10
    assert not (found["soft"] * found["hard"]).any()
    assert set(np.flatnonzero(found["hard"])) == set(ids[:10])
    np.testing.assert_allclose(found["soft"].max(), 40 / 17, rtol=1e-6)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(
        lambda x: (x.shape, x.dtype), memory
    )
    gains = policies.margin_gains(rows["probs"][10:])
    top = ids[10:][np.argsort(-gains)]
    assert set(np.flatnonzero(found["shift"])) == set(top[:6])
    if policy == "margin":
        assert set(np.flatnonzero(found["soft"])) == set(top[:7])
    again = objective.init_memory(rows, ids, memory, np.random.default_rng(0))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, found, again)))


def test_terms_of_active_distillation():
    objective = harness.make_objective("active_distillation", temperature=2.0)
    batch = harness.make_batch(6)
    s, t = R.normal(size=(6, 5)), R.normal(size=(6, 5))
    memory = {
        "hard": jnp.asarray(R.random(64)),
        "soft": jnp.asarray(R.random(64)),
        "shift": jnp.asarray(R.integers(0, 5, 64)),
    }
    logits = {"student": jnp.asarray(s), "teacher": jnp.asarray(t)}

    def nets(role, *inputs, train=False, stop_gradient_params=False):
        return {"logits": logits[role]}, {}

    @jax.jit
    def both(batch, memory):
        terms = objective.loss(nets, batch, memory, jnp.int32(0))
        weighted = {name: terms.weights[name] * value for name, value in terms.values.items()}
        return weighted, terms.values

    (got, plain), memory, batch = jax.device_get((both(batch, memory), memory, batch))
    for i in range(6):
        said = np.roll(t[i], int(memory["shift"][i]))
        p, q = softmax(said / 2), softmax(s[i] / 2)
        kl = 4 * (p * np.log(p / q)).sum()
        ce = -np.log(softmax(s[i])[int(batch["label"][i])])
        np.testing.assert_allclose(got["distillation"][i], memory["soft"][i] * kl, rtol=1e-5)
        np.testing.assert_allclose(got["cross_entropy"][i], memory["hard"][i] * ce, rtol=1e-5)
        # of a held-out example, which has no place in the tables, the plain losses
        np.testing.assert_allclose(plain["distillation"][i], kl, rtol=1e-5)
        np.testing.assert_allclose(plain["cross_entropy"][i], ce, rtol=1e-5)


def test_more_questions_than_examples_are_refused():
    objective = harness.make_objective("active_distillation", budget=31)
    memory = jax.device_get(objective.memory(jax.random.key(0), {}))
    with pytest.raises(ConfigError, match="a budget of 31 for 30"):
        objective.init_memory(*dataset_pass(), memory, np.random.default_rng(0))


@pytest.mark.parametrize(
    "kwargs", [{"policy": "all"}, {"budget": -1}, {"kappa": 2.0}, {"error_rate": -0.1}]
)
def test_hyperparameters_are_checked(kwargs):
    with pytest.raises(ConfigError, match=next(iter(kwargs))):
        active_distillation.make(num_classes=5, num_examples=64, **kwargs)


@pytest.mark.parametrize("kwargs", [{"per_class": -1}, {"rule": "row"}])
def test_mining_is_checked(kwargs):
    with pytest.raises(ConfigError, match=next(iter(kwargs))):
        ssld.make(num_examples=64, **kwargs)


@pytest.mark.parametrize("per_class", [None, 2])
def test_mining_keeps_labelled_examples_and_the_highest_of_each_class(per_class):
    objective = harness.make_objective("ssld", per_class=per_class)
    memory = jax.device_get(objective.memory(jax.random.key(0), {}))
    rows, ids = dataset_pass()
    kept = objective.init_memory(rows, ids, memory, np.random.default_rng(0))["kept"]
    want = set(range(40)) if per_class is None else set(range(10))
    for label in range(5):
        own = [i for i in range(10, 40) if rows["probs"][i].argmax() == label]
        want |= set(sorted(own, key=lambda i: -rows["probs"][i, label])[:2])
    assert set(np.flatnonzero(kept)) == {int(ids[i]) for i in want}
    np.testing.assert_allclose(kept.sum(), 40, rtol=1e-6)


def test_mined_loss():
    """Half of Jeffreys' divergence and its gradient, times the weight of the example."""
    with jax.enable_x64(True):
        objective = harness.make_objective("ssld")
        batch = harness.make_batch(6)
        s, t, kept = R.normal(size=(6, 5)), R.normal(size=(6, 5)), R.random(64)

        def value(s):
            def nets(role, *inputs, train=False, stop_gradient_params=False):
                return {"logits": s if role == "student" else jnp.asarray(t)}, {}

            memory = {"kept": jnp.asarray(kept)}
            terms = objective.loss(nets, batch, memory, jnp.int32(0))
            return terms.weights["divergence"] * terms.values["divergence"]

        @jax.jit
        def both(s):
            got, pull = jax.vjp(value, s)
            return got, pull(jnp.ones_like(got))[0]

        got, grad = both(s)
        p, q = softmax(s), softmax(t)
        np.testing.assert_allclose(got, kept[:6] * 0.5 * ((p - q) * np.log(p / q)).sum(1))
        r = np.log(p / q)
        want = 0.5 * (p - q) + 0.5 * p * (r - (p * r).sum(1, keepdims=True))
        np.testing.assert_allclose(grad, kept[:6, None] * want, atol=1e-10)
