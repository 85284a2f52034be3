"""RFC / Bonsai: groups, heads and penalties against loops over examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.core.means import mean_loss
from distill_jax.losses import groups
from distill_jax.objectives import group_dro, hard_label_heads, invariance
from tests import harness
from tests.reference import cross_entropy, softmax

B, K = 12, 5
R = np.random.default_rng(0)
LOGITS, LABEL = R.normal(size=(B, K)), R.integers(0, K, B, np.int32)
MASK = np.array([1] * 9 + [0] * 3, float)
DOMAIN = R.integers(0, 3, B)


CE = cross_entropy(LOGITS, LABEL)


def masked(values):
    return (jnp.asarray(MASK, values.dtype) * values).sum() / MASK.sum()


def one_hot(domain, e):
    return jnp.asarray(np.eye(8)[domain][:, :e])


def environments(e):
    # A copy: JAX 0.10 keeps the precision in which a program met a constant first.
    return one_hot(DOMAIN, e), jnp.asarray(MASK, copy=True)


def risk(logits, e, scale=1.0):
    """Mean loss of an environment, in JAX for brute-force gradients."""
    rows = np.flatnonzero((e == DOMAIN) & (MASK > 0))
    log_p = jax.nn.log_softmax(scale * logits[rows])
    return -log_p[np.arange(len(rows)), LABEL[rows]].mean()


def check(shares, brute):
    """Equal values and equal gradients of two functions of the logits."""
    with jax.enable_x64(True):
        ours = jax.value_and_grad(lambda z: masked(shares(z)))
        both = jax.jit(lambda z: (ours(z), jax.value_and_grad(brute)(z)))
        (got, grad), (want, other) = both(LOGITS)
        np.testing.assert_allclose(got, want, rtol=1e-9)
        np.testing.assert_allclose(grad, other, atol=1e-9)


def losses(z):
    return -jnp.take_along_axis(jax.nn.log_softmax(z), jnp.asarray(LABEL)[:, None], axis=1)[:, 0]


def test_irm_penalty_is_the_square_of_a_gradient_in_the_scale():
    def brute(z):
        slopes = [jax.grad(lambda s, e=e: risk(z, e, s))(1.0) for e in range(3)]
        return sum(slope**2 for slope in slopes)

    check(lambda z: groups.irm_penalty(z, jnp.asarray(LABEL), *environments(3)), brute)


def test_vrex_penalty_is_a_variance():
    check(
        lambda z: groups.vrex_penalty(losses(z), *environments(4)),  # the fourth has no example
        lambda z: jnp.stack([risk(z, e) for e in range(3)]).var(),
    )


def test_environment_risks_are_summed():
    check(
        lambda z: groups.environment_risks(losses(z), *environments(3)),
        lambda z: sum(risk(z, e) for e in range(3)),
    )


def test_the_worst_group_is_the_largest_mean():
    member = R.random((B, 4)) < 0.4
    member[0], member[:, 3] = True, False
    means = [CE[m & (MASK > 0)].mean() for m in member.T[:3]]
    worst = groups.worst_group(jnp.asarray(CE), jnp.asarray(member), jnp.asarray(MASK))
    np.testing.assert_allclose(masked(worst * CE) / masked(worst), max(means), rtol=1e-6)
    assert set(np.flatnonzero(worst)) <= set(np.flatnonzero(member[:, int(np.argmax(means))]))


@pytest.mark.parametrize("domain", [DOMAIN, np.zeros(B, int)])
def test_balanced_weights(domain):
    weights = np.asarray(jax.jit(groups.balanced_weights)(one_hot(domain, 3), MASK))
    found = set(domain[MASK > 0])
    for e in found:
        np.testing.assert_allclose(
            weights[domain == e] @ MASK[domain == e] / MASK.sum(), 1 / len(found), rtol=1e-6
        )


def answers(**logits):
    def nets(role, *inputs, train=False, stop_gradient_params=False):
        if role == "heads":
            return {"output": logits[role]}, {}
        return {"logits": logits[role], "embedding": logits[role]}, {}

    return nets


def facts():
    return {
        "input": jnp.zeros((B, 1)),
        "label": jnp.asarray(LABEL),
        "mask": jnp.asarray(MASK),
        "index": jnp.arange(B),
        "domain": jnp.asarray(DOMAIN),
    }


def teachers(n):
    """Logits that are right on about half of the examples."""
    sure = [np.where(R.random(B) < 0.5, LABEL, (LABEL + 1) % K) for _ in range(n)]
    return sure, {f"teacher{j + 1}": jnp.asarray(5 * np.eye(K)[s]) for j, s in enumerate(sure)}


def test_a_round_minimizes_its_worst_group():
    said, nets = teachers(2)
    objective = group_dro.make(rounds=2)
    assert objective.roles == ("student", "teacher1", "teacher2")
    terms = objective.loss(answers(student=jnp.asarray(LOGITS), **nets), facts(), {}, jnp.int32(0))
    means = []
    for s in said:
        for group in (s == LABEL, s != LABEL):
            if (group & (MASK > 0)).any():
                means.append(CE[group & (MASK > 0)].mean())
    got, metrics = mean_loss(terms, jnp.asarray(MASK))
    np.testing.assert_allclose(got, max(means), rtol=1e-5)
    np.testing.assert_allclose(metrics["cross_entropy"], got)


def test_heads_learn_hard_predictions_balanced_by_agreement():
    said, nets = teachers(2)
    apart = R.normal(size=(B, 2, K))
    objective = hard_label_heads.make()
    found = answers(student=jnp.asarray(LOGITS), heads=jnp.asarray(apart.reshape(B, -1)), **nets)
    terms = objective.loss(found, facts(), {}, jnp.int32(0))
    heads = LOGITS[:, None] + apart - apart.mean(1, keepdims=True)
    np.testing.assert_allclose(heads.mean(1), LOGITS)
    want = np.mean([-np.log(softmax(heads[:, j])[np.arange(B), said[j]]) for j in range(2)], axis=0)
    np.testing.assert_allclose(terms.values["synthesis"], want, rtol=1e-5)
    agree = (said[0] == LABEL) == (said[1] == LABEL)
    for group in (agree, ~agree):
        share = (terms.weights["synthesis"] * MASK)[group].sum() / MASK.sum()
        np.testing.assert_allclose(share, 0.5, rtol=1e-6)


@pytest.mark.parametrize("penalty", invariance.PENALTIES)
@pytest.mark.parametrize("weight", [0.5, 1e4])
def test_the_loss_of_invariance(penalty, weight):
    objective = invariance.make(penalty=penalty, penalty_weight=weight, environments=3)

    @jax.jit
    def both(z, facts):
        terms = objective.loss(answers(student=z), facts, {}, jnp.int32(0))
        if penalty == "irm":
            extra = sum(jax.grad(lambda s, e=e: risk(z, e, s))(1.0) ** 2 for e in range(3))
        else:
            extra = jnp.stack([risk(z, e) for e in range(3)]).var()
        want = (sum(risk(z, e) for e in range(3)) + weight * extra) / max(weight, 1)
        return sum(terms.coef[name] * masked(value) for name, value in terms.values.items()), want

    got, want = both(LOGITS, facts())
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_data_without_domains_are_refused():
    batch = {k: v for k, v in facts().items() if k != "domain"}
    with pytest.raises(ConfigError, match="have no domain"):
        invariance.make().loss(answers(student=jnp.asarray(LOGITS)), batch, {}, jnp.int32(0))


def test_heads_of_another_width_are_refused():
    nets = answers(student=jnp.asarray(LOGITS), heads=jnp.zeros((B, 7)), **teachers(2)[1])
    with pytest.raises(ConfigError, match="2 rounds times 5 classes"):
        hard_label_heads.make().loss(nets, facts(), {}, jnp.int32(0))


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("group_dro", {"rounds": 0}),
        ("hard_label_heads", {"rounds": 1}),
        ("invariance", {"penalty": "l2"}),
        ("invariance", {"penalty_weight": -1.0}),
        ("invariance", {"environments": 1}),
    ],
)
def test_hyperparameters_are_checked(name, kwargs):
    with pytest.raises(ConfigError, match=next(iter(kwargs))):
        harness.make_objective(name, **kwargs)
