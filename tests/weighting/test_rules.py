"""Weightings without a network against NumPy transcriptions of their papers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.weighting import annealed, constant, reweight, teacher_margin, wsl
from tests.reference import softmax
from tests.weighting.evidence import B, K, draw, on_device, refused, weights

RULES = {
    "constant": constant.make(ratio=0.3),
    "annealed": annealed.make(total_steps=10),
    "margin_of_class": teacher_margin.make(),
    "margin_of_sample": teacher_margin.make(granularity="sample"),
    "wsl": wsl.make(),
}


def cross_entropy(label, logits):
    return -(label * np.log(softmax(logits))).sum(1)


@pytest.mark.parametrize("kwargs, row", [({"ratio": 0.3}, (0.7, 0.3)), ({}, (0.5, 0.5))])
def test_constant_ratio(kwargs, row):
    got = weights(constant.make(**kwargs), draw())
    np.testing.assert_allclose(got, np.broadcast_to(row, (B, 2)), rtol=1e-6)


@pytest.mark.parametrize("row", [(2.0,), (0.0, 1.5), (1.0, 0.5, 3.0)])
def test_constant_weights_fit_any_number_of_signals(row):
    got = weights(constant.make(weights=row), draw(s=len(row)))
    np.testing.assert_array_equal(got, np.broadcast_to(row, (B, len(row))))


@pytest.mark.parametrize("step, teacher", [(0, 1.0), (25, 0.75), (100, 0.0), (150, 0.0)])
@pytest.mark.parametrize("s", [2, 3])
def test_annealing_is_linear_and_stays_at_its_end(step, teacher, s):
    rest = (1 - teacher) / (s - 1)
    got = weights(annealed.make(total_steps=100), draw(s=s), step=step)
    want = np.broadcast_to([rest] * (s - 1) + [teacher], (B, s))
    np.testing.assert_allclose(got, want, atol=1e-7)


def test_annealing_between_other_ratios():
    rule = annealed.make(total_steps=10, start=0.2, end=0.6)
    np.testing.assert_allclose(weights(rule, draw(), step=5), np.full((B, 2), (0.6, 0.4)), 1e-6)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("granularity", teacher_margin.GRANULARITIES)
def test_teacher_margin(granularity, mixed):
    """One class at a time: a mixed label gets the mean of the ratios that its classes would."""
    evidence = draw(mixed=mixed)
    teacher = softmax(evidence.logits["teacher"])
    ratio, clipped = np.zeros(B), 0
    for i in range(B):
        for c in range(K):
            p = evidence.class_means[c] if granularity == "class" else teacher[i]
            margin = p[c] - np.mean(np.delete(p, c))
            clipped += margin < 0 < evidence.label_probs[i, c]
            ratio[i] += evidence.label_probs[i, c] * max(0.0, margin)
    assert clipped and ratio.any()  # both sides of the hinge are seen
    with jax.enable_x64(True):
        got = weights(teacher_margin.make(granularity=granularity), evidence)
    np.testing.assert_allclose(got, np.stack([1 - ratio, ratio], 1), rtol=1e-12, atol=1e-12)


def test_the_margin_of_the_class_means_is_the_mean_margin_of_a_class():
    """What lets one table serve the class-wise rule, whose definition averages margins."""
    teacher = softmax(np.random.RandomState(1).randn(20, K))
    teacher[:, 2] += 1.0
    teacher /= teacher.sum(1, keepdims=True)
    margins = [p[2] - np.mean(np.delete(p, 2)) for p in teacher]
    means = np.full((K, K), 1 / K)
    means[2] = teacher.mean(0)
    label = np.eye(K)[np.full(B, 2)]
    evidence = dataclasses.replace(draw(), class_means=means, label_probs=label)
    with jax.enable_x64(True):
        got = weights(teacher_margin.make(), evidence)
    np.testing.assert_allclose(got[:, 1], np.mean(margins), rtol=1e-12)


def test_only_the_class_wise_margin_needs_class_means():
    assert teacher_margin.make(granularity="class").needs == ("class_means",)
    assert teacher_margin.make(granularity="sample").needs == ()
    without = dataclasses.replace(draw(), class_means=None)
    assert weights(teacher_margin.make(granularity="sample"), without).shape == (B, 2)
    with pytest.raises(ConfigError, match="class means"):
        refused(teacher_margin.make(), without)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("scale", [2.5, 1.0])
def test_wsl(scale, mixed):
    evidence = draw(mixed=mixed)
    student = cross_entropy(evidence.label_probs, evidence.logits["student"])
    teacher = cross_entropy(evidence.label_probs, evidence.logits["teacher"])
    w = 1 - np.exp(-student / (teacher + 1e-7))
    with jax.enable_x64(True):
        got = weights(wsl.make(scale=scale), evidence)
    np.testing.assert_allclose(got, np.stack([np.ones(B), scale * w], 1), rtol=1e-12)


def test_wsl_is_detached_and_finite_for_a_perfect_teacher():
    evidence = on_device(draw())
    sure = {"student": evidence.logits["student"], "teacher": 1e4 * evidence.label_probs}

    def total(student):
        logits = {"student": student, "teacher": evidence.logits["teacher"]}
        return wsl.make()(None, dataclasses.replace(evidence, logits=logits), 0).sum()

    assert not jax.grad(total)(evidence.logits["student"]).any()
    got = weights(wsl.make(), dataclasses.replace(evidence, logits=sure))
    np.testing.assert_allclose(got, np.broadcast_to([1.0, 2.5], (B, 2)))


@pytest.mark.parametrize("name", RULES)
def test_permuting_examples_permutes_weights(name):
    evidence, order = draw(mixed=True), np.random.RandomState(3).permutation(B)
    table, each = evidence.class_means, dataclasses.replace(evidence, class_means=None)
    moved = dataclasses.replace(jax.tree.map(lambda x: x[order], each), class_means=table)
    want = weights(RULES[name], evidence, step=3)[order]
    np.testing.assert_allclose(weights(RULES[name], moved, step=3), want, rtol=1e-5)


def test_reweighting_starts_at_zero():
    for s in (1, 2, 3):
        np.testing.assert_array_equal(weights(reweight.make(), draw(s=s)), np.zeros((B, s)))
    assert reweight.make().by_gradient


FLOORS = (None, 0.0, 0.02)


@functools.cache
def from_gradients(s):
    """Returns a gradient, a mask and, for each normalization and floor, their weights."""
    gradient, mask = np.random.RandomState(s).randn(B, s), draw().mask
    gradient[0] = 1.0  # nothing helps the first example
    ways = [(normalize, floor) for normalize in reweight.NORMALIZE for floor in FLOORS]
    rules = [reweight.make(normalize=normalize, floor=floor) for normalize, floor in ways]
    with jax.enable_x64(True):
        found = jax.jit(lambda *a: [rule.from_gradient(*a) for rule in rules])(gradient, mask)
    return gradient, mask, dict(zip(ways, found, strict=True))


@pytest.mark.parametrize("s", [1, 2, 3])
@pytest.mark.parametrize("normalize", reweight.NORMALIZE)
@pytest.mark.parametrize("floor", FLOORS)
def test_weights_from_a_gradient(normalize, floor, s):
    """Ren et al. 2018, algorithm 1, lines 9-10, and Lu et al. 2021, algorithm 1."""
    gradient, mask, found = from_gradients(s)
    delta = {None: {"batch": 0.0, "loss_terms": 1e-8}[normalize]}.get(floor, floor)
    want = np.zeros((B, s))
    for i in range(B):
        for j in range(s):
            want[i, j] = max(-gradient[i, j], delta) if mask[i] else 0.0
        if normalize == "loss_terms" and want[i].sum() > 0:
            want[i] /= want[i].sum()
    if normalize == "batch":
        want *= mask.sum() / want.sum()
        assert np.isclose(want.sum(), B - 1)  # the mean loss has unit weight
    np.testing.assert_allclose(found[normalize, floor], want, rtol=1e-12)


@pytest.mark.parametrize("normalize, first", [("batch", 0.0), ("loss_terms", 0.5)])
def test_where_nothing_helps(normalize, first):
    """L2RW then skips the batch; RW-KD's floor makes the signals of an example equal."""
    want = np.full((B, 2), first) * draw().mask[:, None]
    got = reweight.make(normalize=normalize).from_gradient(
        jnp.ones((B, 2)), jnp.asarray(draw().mask, jnp.float32)
    )
    np.testing.assert_allclose(got, want)


@pytest.mark.parametrize("normalize", reweight.NORMALIZE)
def test_the_scale_of_a_gradient_does_not_matter(normalize):
    """It contains the learning rate over the batch size: weights must not."""
    gradient = jnp.asarray(np.random.RandomState(0).randn(B, 2), jnp.float32)
    rule, mask = reweight.make(normalize=normalize, floor=0.0), jnp.ones(B)
    want = rule.from_gradient(gradient, mask)
    np.testing.assert_allclose(rule.from_gradient(1e-12 * gradient, mask), want, rtol=1e-5)


WRONG = [
    (constant.make, {"ratio": 1.1}, "ratio"),
    (constant.make, {"ratio": float("nan")}, "ratio"),
    (constant.make, {"weights": (1.0, -1.0)}, "weights"),
    (constant.make, {"weights": (1.0, float("inf"))}, "weights"),
    (annealed.make, {"total_steps": 0}, "total_steps"),
    (annealed.make, {"total_steps": 1, "start": 2.0}, "start"),
    (annealed.make, {"total_steps": 1, "end": -1.0}, "end"),
    (teacher_margin.make, {"granularity": "clas"}, "granularity"),
    (wsl.make, {"scale": 0.0}, "scale"),
    (reweight.make, {"normalize": "signal"}, "normalize"),
    (reweight.make, {"floor": -1e-8}, "floor"),
    (reweight.make, {"floor": float("inf")}, "floor"),
]


@pytest.mark.parametrize("make, kwargs, name", WRONG)
def test_hyperparameters_are_checked(make, kwargs, name):
    with pytest.raises(ConfigError, match=f"^{name}: "):
        make(**kwargs)


@pytest.mark.parametrize(
    "rule, s, where",
    [
        (constant.make(), 3, "weights"),
        (constant.make(weights=(1.0,)), 2, "weights"),
        (annealed.make(total_steps=1), 1, "loss_terms"),
        (teacher_margin.make(), 3, "loss_terms"),
        (teacher_margin.make(granularity="sample"), 1, "loss_terms"),
        (wsl.make(), 3, "loss_terms"),
    ],
)
def test_a_number_of_signals_that_does_not_fit_is_refused(rule, s, where):
    with pytest.raises(ConfigError, match=f"^{where}: "):
        refused(rule, draw(s=s))


@pytest.mark.parametrize("rule", [wsl.make(), teacher_margin.make(granularity="sample")])
@pytest.mark.parametrize(
    "absent, word", [({"logits": {}}, "logits of"), ({"label_probs": None}, "no classes")]
)
def test_absent_evidence_is_refused(rule, absent, word):
    with pytest.raises(ConfigError, match=word):
        refused(rule, dataclasses.replace(draw(), **absent))
