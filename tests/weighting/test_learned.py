"""Weightings that ask a network: features and weights against NumPy, shapes, gradients, errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.models import ratio_attention, ratio_mlp
from distill_jax.weighting import meta_weight_net, trilateral
from tests.weighting.evidence import (
    B,
    K,
    Nets,
    draw,
    giving,
    on_device,
    refused,
    softmax,
    weights,
)

MODELS = {
    "mlp": functools.partial(ratio_mlp.make, hidden=(7,)),
    "attention": functools.partial(ratio_attention.make, width=8),
}


def corners(evidence):
    s, t = (softmax(evidence.logits[role]) for role in ("student", "teacher"))
    return s, t, evidence.label_probs @ evidence.class_means, evidence.label_probs


def equation_10(evidence, edge=lambda e: e):
    """`[b, 9, k]`, written out."""
    s, t, mean, g = corners(evidence)
    edges = [g - s, g - t, t - s, g - mean, mean - s]
    return np.stack([edge(e) for e in edges] + [s, t, mean, g], axis=1)


def features(rule, evidence):
    return np.asarray(jax.jit(rule.features)(on_device(evidence)))


@functools.cache
def fitted(model, shape, **kwargs):
    """Returns a ratio network for inputs of a shape, with parameters drawn by NumPy, none zero."""
    made, r = MODELS[model](**kwargs), np.random.RandomState(0)
    like, _ = jax.eval_shape(made.init, jax.random.key(0), jnp.zeros(shape))
    return Nets(made, jax.tree.map(lambda p: np.float32(0.3 * r.randn(*p.shape)), like))


def logits_of(nets, x):
    found = jax.jit(lambda x: nets("weighting", x)[0]["logits"])(jnp.asarray(x, jnp.float32))
    return np.asarray(found, np.float64)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(
    "mode, edge", [("signed", lambda e: e), ("squared", lambda e: e**2), ("abs", np.abs)]
)
def test_features_are_equation_10(mode, edge, mixed):
    evidence = draw(mixed=mixed)
    with jax.enable_x64(True):
        got = features(trilateral.make(edge_mode=mode), evidence)
    assert got.shape == (B, 9, K)
    np.testing.assert_allclose(got, equation_10(evidence, edge), rtol=1e-12, atol=1e-15)


def test_the_mean_of_a_label_is_its_row_of_the_table():
    evidence = draw()
    got = features(trilateral.make(blocks=("m",)), evidence)
    rows = evidence.class_means[evidence.label_probs.argmax(1)]
    np.testing.assert_allclose(got[:, 0], rows, rtol=1e-6)


@pytest.mark.parametrize("mode, edge", [("signed", lambda e: e), ("squared", lambda e: e**2)])
def test_compact_features(mode, edge):
    evidence = draw(k=30)
    want, own = np.zeros((B, 9, 3)), evidence.label_probs.argmax(1)
    for i, blocks in enumerate(equation_10(evidence, edge)):
        for j, x in enumerate(blocks):
            entropy = -sum(p * np.log(p) for p in x if p > 0) if j > 4 else None
            largest = x.max() if j > 4 else np.abs(x).max()
            want[i, j] = x[own[i]], largest, np.linalg.norm(x) if entropy is None else entropy
    with jax.enable_x64(True):
        got = features(trilateral.make(edge_mode=mode, compact=True), evidence)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_compact_features_have_finite_gradients_at_equal_corners():
    """A student that equals its teacher, with evidence that is not stopped."""
    evidence, rule = on_device(draw()), trilateral.make(compact=True)

    def total(student):
        logits = {"student": student, "teacher": evidence.logits["student"]}
        return rule.features(dataclasses.replace(evidence, logits=logits)).sum()

    assert np.isfinite(jax.jit(jax.grad(total))(evidence.logits["student"])).all()


@pytest.mark.parametrize("block", trilateral.BLOCKS)
def test_every_block_can_be_left_out_or_left_alone(block):
    evidence, at = draw(), trilateral.BLOCKS.index(block)
    others = tuple(b for b in trilateral.BLOCKS if b != block)
    want = equation_10(evidence)
    alone = trilateral.make(blocks=(block,))
    left = trilateral.make(blocks=others[::-1])  # the order in which they are named is nothing
    assert alone.needs == (("class_means",) if "m" in block else ())
    np.testing.assert_allclose(features(alone, evidence), want[:, [at]], atol=1e-6)
    got = features(left, evidence)
    np.testing.assert_allclose(got, np.delete(want, at, axis=1), atol=1e-6)


def test_without_class_means_none_are_needed():
    rule = trilateral.make(blocks=("sg", "tg", "st", "s", "t", "g"))
    without = dataclasses.replace(draw(), class_means=None)
    assert rule.needs == ()
    assert features(rule, without).shape == (B, 6, K)
    with pytest.raises(ConfigError, match="class means"):
        refused(trilateral.make(), without)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ratio", [0.5, 0.2])
def test_two_signals_start_at_the_ratio(model, ratio):
    made = MODELS[model](ratio=ratio)
    params, _ = jax.jit(made.init)(jax.random.key(0), jnp.zeros((B, 9, K)))
    nets = Nets(made, params)
    got = weights(trilateral.make(), draw(), nets)
    np.testing.assert_allclose(got, np.full((B, 2), (1 - ratio, ratio)), rtol=1e-6)
    if ratio == 0.5:
        assert (got == 0.5).all()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("s", [2, 3])
def test_weights_are_a_softmax_with_a_zero_for_the_first(model, s):
    nets, evidence = fitted(model, (B, 9, K), outputs=s - 1), draw(s=s)
    got = weights(trilateral.make(), evidence, nets)
    logits = logits_of(nets, equation_10(evidence))
    want = softmax(np.concatenate([np.zeros((B, 1)), logits], 1))
    assert logits.std(0).min() > 1e-3  # examples differ
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(got.sum(1), 1.0, rtol=1e-6)
    if s == 2:
        np.testing.assert_allclose(got[:, 1:], 1 / (1 + np.exp(-logits)), rtol=1e-5)


def test_meta_weight_net_with_one_signal_is_the_papers():
    """Shu et al. 2019: a sigmoid of one hidden ReLU layer of 100 units, of the loss alone."""
    made = ratio_mlp.make(hidden=(100,), zero_init=False)
    params, _ = jax.jit(made.init)(jax.random.key(1), jnp.zeros((B, 1)))
    params = jax.tree.map(lambda x: x + 0.1, params)  # biases start at zero
    evidence = draw(s=1)
    first, last = (jax.tree.map(np.float64, params[f"Dense_{i}"]) for i in (0, 1))
    hidden = np.maximum(
        evidence.loss_terms["signal0"][:, None] * first["kernel"] + first["bias"], 0
    )
    logits = hidden @ last["kernel"] + last["bias"]
    got = weights(meta_weight_net.make(), evidence, Nets(made, params))
    np.testing.assert_allclose(got, 1 / (1 + np.exp(-logits)), rtol=1e-5)


@pytest.mark.parametrize("s", [1, 2, 3])
def test_meta_weight_net_gives_a_sigmoid_for_each_signal(s):
    nets, evidence = fitted("mlp", (B, s), outputs=s), draw(s=s)
    got = weights(meta_weight_net.make(), evidence, nets)
    losses = np.stack([*evidence.loss_terms.values()], 1)
    want = 1 / (1 + np.exp(-logits_of(nets, losses)))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    normal = weights(meta_weight_net.make(normalize=True), evidence, nets)
    real = evidence.mask > 0
    np.testing.assert_allclose(normal, want / want[real].mean(0), rtol=1e-5)


def test_normalized_weights_of_padding_alone_are_finite():
    nets = fitted("mlp", (B, 2), outputs=2)
    evidence = dataclasses.replace(draw(), mask=np.zeros(B))
    assert np.isfinite(weights(meta_weight_net.make(normalize=True), evidence, nets)).all()


@pytest.mark.parametrize("model", MODELS)
def test_permuting_examples_permutes_weights(model):
    evidence, order = draw(mixed=True), np.random.RandomState(3).permutation(B)
    table, each = evidence.class_means, dataclasses.replace(evidence, class_means=None)
    moved = dataclasses.replace(jax.tree.map(lambda x: x[order], each), class_means=table)
    nets = fitted(model, (B, 9, K))
    want = weights(trilateral.make(), evidence, nets)
    assert np.ptp(want[:, 1]) > 1e-3
    np.testing.assert_allclose(weights(trilateral.make(), moved, nets), want[order], rtol=1e-5)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_every_leaf_of_the_network_has_a_gradient(model, compact):
    evidence, rule = on_device(draw(k=5)), trilateral.make(compact=compact)
    nets = fitted(model, (B, 9, 3 if compact else 5))

    def teachers_share(params):
        share = rule(Nets(nets.model, params), evidence, jnp.int32(0))[:, 1]
        return (evidence.loss_terms["signal1"] * share).sum()

    grads = jax.jit(jax.grad(teachers_share))(nets.params)
    assert all(np.abs(g).max() > 1e-6 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    "rule, s, shape, right",
    [
        (trilateral.make(), 2, (B,), 1),  # would broadcast to all pairs of examples
        (trilateral.make(), 2, (B, 2), 1),
        (trilateral.make(), 3, (B, 1), 2),
        (meta_weight_net.make(), 2, (B, 1), 2),
        (meta_weight_net.make(), 2, (B,), 2),
        (meta_weight_net.make(), 1, (B,), 1),
    ],
)
def test_logits_that_do_not_fit_the_signals_are_refused(rule, s, shape, right):
    with pytest.raises(ConfigError, match=r"^weighting\.outputs: ") as caught:
        refused(rule, draw(s=s), giving(shape))
    assert f"set it to {right}" in str(caught.value)


def test_one_signal_leaves_no_ratio():
    with pytest.raises(ConfigError, match="loss_terms: "):
        refused(trilateral.make(), draw(s=1), giving((B, 1)))


@pytest.mark.parametrize(
    "absent, word", [({"logits": {}}, "logits of"), ({"label_probs": None}, "no classes")]
)
def test_absent_evidence_is_refused(absent, word):
    with pytest.raises(ConfigError, match=word):
        refused(trilateral.make(), dataclasses.replace(draw(), **absent), giving((B, 1)))


@pytest.mark.parametrize(
    "kwargs, name",
    [
        ({"edge_mode": "sign"}, "edge_mode"),
        ({"blocks": ("sg", "gs")}, "blocks"),
        ({"blocks": ()}, "blocks"),
        ({"blocks": ("s", "s")}, "blocks"),
        ({"centre": 1.1}, "centre"),
    ],
)
def test_hyperparameters_are_checked(kwargs, name):
    with pytest.raises(ConfigError, match=f"^{name}: "):
        trilateral.make(**kwargs)


def test_centred_ratios_keep_their_mean_logit():
    evidence, made = draw(), trilateral.make(centre=0.2)
    nets = fitted("mlp", (B, 9, K))
    logit = logits_of(nets, features(made, evidence))[:, 0]
    mean = (evidence.mask * logit).sum() / evidence.mask.sum()
    wanted = 1 / (1 + np.exp(mean - logit) * 4)
    np.testing.assert_allclose(weights(made, evidence, nets)[:, 1], wanted, rtol=1e-5)
