"""Selection by small loss (Han et al. 2018) and nested dropout (Chen et al. 2022), by loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.core.means import mean_loss
from distill_jax.losses.selection import nested_width, smallest, truncate
from distill_jax.models import mlp, projector
from tests import harness
from tests.contract import test_objectives as contract
from tests.reference import cross_entropy, softmax

K, D = harness.K, 6
kept_of = jax.jit(smallest)


@pytest.mark.parametrize("rate, n, kept", [(0.8, 20, 16), (0.5, 5, 3), (1.0, 7, 7), (0.3, 10, 3)])
def test_smallest_losses_are_kept(rate, n, kept):
    loss = np.random.RandomState(n).rand(n + 3)
    mask = np.ones(n + 3)
    mask[[0, 2, 5]] = 0
    got = kept_of(loss, mask, rate=rate)
    real = [i for i in range(n + 3) if mask[i]]
    chosen = sorted(real, key=lambda i: loss[i])[:kept]
    np.testing.assert_array_equal(got, np.isin(range(n + 3), chosen))


def test_ties_and_extreme_losses():
    loss = np.array([1.0, 1.0, np.inf, 1.0])
    np.testing.assert_allclose(kept_of(loss, np.ones(4), rate=0.5), [1, 1, 0, 0])
    assert not kept_of(loss, np.zeros(4), rate=0.5).any()


def test_widths_follow_the_density_and_truncation_keeps_a_prefix():
    def draw(i):
        return nested_width(jax.random.fold_in(jax.random.key(0), i), D, sigma=3.0)

    drawn = np.asarray(jax.jit(jax.vmap(draw))(np.arange(20000)))
    density = np.array([np.exp(-((k / 3) ** 2)) for k in range(1, D + 1)])
    share = np.array([(drawn == k).mean() for k in range(1, D + 1)])
    assert set(drawn) == set(range(1, D + 1))
    np.testing.assert_allclose(share, density / density.sum(), atol=0.015)
    np.testing.assert_array_equal(truncate(jnp.ones((1, D)), 2), [[1, 1, 0, 0, 0, 0]])


def call(made, networks, batch, step=0):
    """The terms of networks `{role: input -> output}`, and who was called how."""
    calls = []

    def nets(role, x, *, train=False, stop_gradient_params=False):
        calls.append((role, train))
        found = networks[role](x)
        return {"logits": found, "embedding": found, "output": found}, {}

    return made.loss(nets, batch, {}, jnp.int32(step)), calls


def batch_of(b=10, *, seed=0):
    rng = np.random.RandomState(seed)
    return {
        "input": rng.randn(b, K),
        "label": rng.randint(0, K, b),
        "mask": np.array([0.0] + [1.0] * (b - 1)),
        "label_noisy": rng.randint(0, 2, b),
    }


def two_networks():
    rng = np.random.RandomState(5)
    a, b = rng.randn(K, K), rng.randn(K, K)
    return {"student": lambda x: x @ a, "peer": lambda x: x @ b}


@pytest.mark.parametrize("split", [False, True])
def test_each_learns_from_what_the_other_kept(split):
    made = harness.make_objective("nested_coteaching", forget_rate=0.4, split=split)
    with jax.enable_x64(True):
        batch, networks, calls = batch_of(), two_networks(), []

        @jax.jit
        def of(batch):
            terms, found = call(made, networks, batch)
            calls.extend(found)
            return mean_loss(terms, batch["mask"])

        loss, metrics = jax.device_get(of(batch))
        x, y = batch["input"], batch["label"]
        logits = {role: net(x) for role, net in networks.items()}
    losses = {r: [cross_entropy(z[i], y[i]) for i in range(10)] for r, z in logits.items()}
    want, noise = 0.0, 0.0
    for me, other, half in (("student", "peer", 1), ("peer", "student", 0)):
        rows = [i for i in range(1, 10) if not split or i % 2 == half]
        kept = sorted(rows, key=lambda i: losses[other][i])[: int(np.ceil(0.6 * len(rows)))]
        want += np.mean([losses[me][i] for i in kept])
        if me == "student":
            noise = np.mean([int(batch["label_noisy"][i]) for i in kept])
    np.testing.assert_allclose(loss, want, rtol=1e-7)
    np.testing.assert_allclose(metrics["kept_noise"], noise, rtol=1e-7)
    assert len(calls) == (4 if split else 2)


def test_selection_has_no_gradient_and_the_kept_have_that_of_their_mean():
    made = harness.make_objective("nested_coteaching", forget_rate=0.4)
    with jax.enable_x64(True):
        batch, networks = batch_of(), two_networks()

        @jax.jit
        @jax.grad
        def gradient(student, batch):
            terms, _ = call(made, {**networks, "student": lambda x: student}, batch)
            return mean_loss(terms, batch["mask"])[0]

        z = networks["student"](batch["input"])
        grad = gradient(z, batch)
        peer = networks["peer"](batch["input"])
    y = batch["label"]
    kept = sorted(range(1, 10), key=lambda i: cross_entropy(peer[i], y[i]))[:6]
    want = np.zeros((10, K))
    for i in kept:
        p = softmax(z[i])
        want[i] = (p - np.eye(K)[y[i]]) / 6
    np.testing.assert_allclose(grad, want, rtol=1e-7, atol=1e-12)


def test_the_forget_rate_grows_by_epoch():
    made = harness.make_objective("nested_coteaching", forget_rate=0.4, ramp="2 epochs")
    rates = jax.jit(jax.vmap(made.rate))(np.array([0, 1, 2, 3, 4, 9]))
    np.testing.assert_allclose(rates, [1.0, 1.0, 0.8, 0.8, 0.6, 0.6], rtol=1e-6)


def test_nested_dropout_truncates_the_features_that_the_head_sees():
    made = harness.make_objective("nested_coteaching", peers=False, sigma=2.0, keep=2, seed=3)
    assert made.roles == ("student", "head")
    assert not made.couples_batch
    rng = np.random.RandomState(7)
    w, head = rng.randn(K, D), rng.randn(D, K)
    networks = {"student": lambda x: x @ w, "head": lambda x: x @ head}
    batch = batch_of()

    @jax.jit
    def of(batch, step):
        terms, calls = call(made, networks, batch, step)
        assert calls == [("student", True), ("head", True)]
        key = jax.random.fold_in(jax.random.key(3), step)
        return terms.values["cross_entropy"], nested_width(key, D, sigma=2.0)

    for step in range(3):
        values, k = jax.device_get(of(batch, step))
        for i in range(10):
            features = batch["input"][i] @ w
            features[k:] = 0
            want = cross_entropy(features @ head, batch["label"][i])
            np.testing.assert_allclose(values[i], want, rtol=1e-5)

    def nets(role, x, *, train=False, stop_gradient_params=False):
        assert not train
        found = networks[role](x)
        return {"embedding": found, "output": found}, {}

    predict = jax.jit(lambda batch: made.predictions(nets, batch, {}, jnp.int32(0)))
    features = batch["input"] @ w
    features[:, 2:] = 0
    got = predict(batch)["prediction"]["logits"]
    np.testing.assert_allclose(got, features @ head, rtol=1e-5, atol=1e-6)


def test_prediction_is_the_mean_of_the_two():
    made = harness.make_objective("nested_coteaching")
    batch, networks = batch_of(), two_networks()

    def nets(role, x, *, train=False, stop_gradient_params=False):
        return {"logits": networks[role](x)}, {}

    with jax.enable_x64(True):
        got = jax.jit(lambda batch: made.predictions(nets, batch, {}, jnp.int32(0)))(batch)
    want = sum(net(batch["input"]) for net in networks.values()) / 2
    np.testing.assert_allclose(got["prediction"]["logits"], want, rtol=1e-6)


NESTED = {"sigma": 4.0, "keep": 3, "split": True}


def test_both_together_keep_the_contract(monkeypatch):
    def role_model(role, **kwargs):
        del kwargs
        if "head" in role:
            return projector.make(features=K)
        return mlp.make(num_classes=0, hidden=(8,))

    monkeypatch.setattr(harness, "role_model", role_model)
    monkeypatch.setattr(harness, "setup", functools.partial(harness.setup, kwargs=NESTED))
    contract.case.cache_clear()
    contract.test_every_leaf_learns("nested_coteaching")
    contract.test_one_device_equals_a_mesh_of_eight("nested_coteaching")
    contract.test_one_compilation_donation_and_stable_types("nested_coteaching")
    contract.test_padding_and_accumulation_change_nothing("nested_coteaching")
    contract.case.cache_clear()


def test_mistakes_are_refused():
    make = functools.partial(harness.make_objective, "nested_coteaching")
    with pytest.raises(ConfigError, match="forget_rate is 1"):
        make(forget_rate=1.0)
    with pytest.raises(ConfigError, match="one network has no half"):
        make(peers=False, split=True)
    with pytest.raises(ConfigError, match="batch of 15 has no halves"):
        harness.setup("nested_coteaching", batch=harness.make_batch(15), kwargs={"split": True})
    made, features = make(sigma=1.0, keep=9), jnp.zeros((10, D))
    networks = dict.fromkeys(("student", "peer", "head", "peer_head"), lambda x: features)
    with pytest.raises(ConfigError, match="keep is 9 of 6 features"):
        call(made, networks, batch_of())
    with pytest.raises(ConfigError, match="head has 6 outputs"):
        call(make(sigma=1.0), networks, batch_of())
