"""Evaluators of click-through and imbalance equal scikit-learn and counts over all pairs."""

import math
import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

from distill_jax.core.errors import ConfigError, NonFiniteError
from distill_jax.evaluators import classification, ctr, imbalance
from tests.reference import softmax


def example(seed=0, n=301, k=2, *, rate=0.2, distinct=None):
    """Returns logits and labels; only so many rows of logits are `distinct`, the others tie."""
    rng = np.random.default_rng(seed)
    share = np.full(k, rate / max(1, k - 1))
    share[0] = 1 - share[1:].sum()
    labels = rng.choice(k, n, p=share).astype(np.int32)
    logits = rng.normal(size=(n, k)) * 1.5
    logits[np.arange(n), labels] += 1
    if distinct:
        logits = logits[rng.integers(distinct, size=n)]
    return logits.astype(np.float32), labels


def evaluate(evaluator, logits, labels):
    batch = {"label": labels, "index": np.arange(len(labels))}
    return evaluator({"student": {"logits": logits}}, batch)


@pytest.mark.parametrize("distinct", [None, 40, 5])
@pytest.mark.parametrize(("k", "positive"), [(2, 1), (2, 0), (5, 3)])
def test_ctr_equals_scikit_learn(k, positive, distinct):
    logits, labels = example(k + positive, k=k, distinct=distinct)
    got = evaluate(ctr.make(positive=positive), logits, labels)
    p, y = softmax(logits)[:, positive], labels == positive
    rate = y.mean()
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    want = {
        "auc": sk.roc_auc_score(y, p),
        "average_precision": sk.average_precision_score(y, p),
        "log_loss": sk.log_loss(y, p),
        "normalised_entropy": sk.log_loss(y, p) / entropy,
        "calibration_ratio": p.sum() / y.sum(),
    }
    assert got == pytest.approx(want, abs=1e-12)


def test_auc_counts_pairs():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 6, 80) / 4, rng.random(80) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert ctr.area_under_roc(scores, positive) == sum(pairs) / len(pairs)
    assert ctr.area_under_roc(-scores, positive) == pytest.approx(1 - sum(pairs) / len(pairs))
    assert ctr.area_under_roc(np.zeros(80), positive) == 0.5


def test_ranking_stays_exact_where_probabilities_are_one():
    logits, labels = np.array([[0.0, 40], [0, 50], [0, 60], [0, 70]]), np.array([0, 1, 0, 1])
    got = evaluate(ctr.make(), logits, labels)
    assert got["auc"] == 0.75
    assert got["average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    assert got["log_loss"] == pytest.approx((40 + 60) / 4)


def test_log_odds_equal_the_logarithm_of_odds():
    logits, _ = example(3, 50, 6)
    p = softmax(logits)
    np.testing.assert_allclose(ctr.log_odds(np.float64(logits)), np.log(p / (1 - p)), rtol=1e-10)


def test_predicting_the_base_rate_scores_one():
    labels = np.repeat([0, 1], [90, 10])
    logits = np.tile([[0.0, math.log(10 / 90)]], (100, 1))
    got = evaluate(ctr.make(), logits, labels)
    assert got["normalised_entropy"] == pytest.approx(1, abs=1e-12)
    assert got["calibration_ratio"] == pytest.approx(1, abs=1e-12)
    assert got["auc"] == 0.5
    assert got["average_precision"] == pytest.approx(0.1)
    doubled = evaluate(ctr.make(), logits + np.array([[0, math.log(20 / 80 * 9)]]), labels)
    assert doubled["calibration_ratio"] == pytest.approx(2, abs=1e-12)
    assert doubled["normalised_entropy"] > 1


@pytest.mark.parametrize(
    ("label", "left"),
    [(0, {"log_loss"}), (1, {"log_loss", "calibration_ratio", "average_precision"})],
)
def test_undefined_metrics_are_left_out(label, left):
    logits, _ = example(0, 9)
    got = evaluate(ctr.make(), logits, np.full(9, label))
    assert set(got) == left
    assert all(map(math.isfinite, got.values()))
    assert got["log_loss"] == pytest.approx(-np.log(softmax(logits)[:, label]).mean())


@pytest.mark.parametrize("distinct", [None, 50])
@pytest.mark.parametrize(("k", "n"), [(2, 90), (4, 400), (9, 250)])
def test_imbalance_equals_scikit_learn(k, n, distinct):
    logits, labels = example(k, n, k, rate=0.3, distinct=distinct)
    got = evaluate(imbalance.make(), logits, labels)
    p, top, every = softmax(logits), logits.argmax(1), list(range(k))
    assert set(every) == set(labels) == set(top)
    areas = [sk.roc_auc_score(labels == c, p[:, c]) for c in every]
    want = {
        "macro_f1": sk.f1_score(labels, top, average="macro"),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, top),
        "macro_auc": np.mean(areas),
    }
    arrays = {
        "recall": sk.recall_score(labels, top, average=None, labels=every),
        "precision": sk.precision_score(labels, top, average=None, labels=every),
    }
    assert set(got) == set(want) | set(arrays)
    assert {name: got[name] for name in want} == pytest.approx(want, abs=1e-12)
    for name, value in arrays.items():
        np.testing.assert_allclose(got[name], value, atol=1e-12)
    if k > 2:
        ovr = sk.roc_auc_score(labels, p, multi_class="ovr", average="macro")
        assert got["macro_auc"] == pytest.approx(ovr, abs=1e-12)
    known = evaluate(classification.make(), logits, labels)
    assert got["macro_f1"] == known["macro_f1"]


def test_classes_that_do_not_occur():
    logits, labels = example(1, 120, 3, rate=0.5)
    logits = np.column_stack([logits, np.full(120, -50.0)])  # the fourth class is never predicted
    got = evaluate(imbalance.make(), logits, labels)
    np.testing.assert_array_equal(np.isnan(got["recall"]), [False, False, False, True])
    np.testing.assert_array_equal(np.isnan(got["precision"]), [False, False, False, True])
    p = softmax(logits)
    areas = [sk.roc_auc_score(labels == c, p[:, c]) for c in range(3)]
    assert got["macro_auc"] == pytest.approx(np.mean(areas), abs=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scikit-learn, of the class without examples
        want = sk.balanced_accuracy_score(labels, logits.argmax(1))
    assert got["balanced_accuracy"] == pytest.approx(want, abs=1e-12)
    single = evaluate(imbalance.make(), logits, np.zeros(120, int))
    assert "macro_auc" not in single
    assert single["balanced_accuracy"] == np.mean(logits.argmax(1) == 0)


def test_nothing_depends_on_the_order_of_examples():
    logits, labels = example(5, 200, 3, rate=0.5, distinct=50)
    order = np.random.default_rng(0).permutation(200)
    for evaluator in (ctr.make(positive=2), imbalance.make()):
        first = evaluate(evaluator, logits, labels)
        second = evaluate(evaluator, logits[order], labels[order])
        for name, value in first.items():
            np.testing.assert_allclose(second[name], value, rtol=1e-13)


def test_roles_are_the_outputs_they_read():
    assert ctr.make(role="teacher").outputs == {"teacher": ("logits",)}
    assert imbalance.make(role="ema").outputs == {"ema": ("logits",)}


@pytest.mark.parametrize("module", [ctr, imbalance])
def test_logits_that_are_not_finite_are_refused(module):
    logits, labels = example()
    logits[5, 1] = np.nan
    with pytest.raises(NonFiniteError, match="first at position 5"):
        evaluate(module.make(), logits, labels)


def test_wrong_classes_are_refused():
    logits, labels = example()
    with pytest.raises(ConfigError, match="positive is -1"):
        ctr.make(positive=-1)
    with pytest.raises(ConfigError, match="class 2 against the rest, of 2 logits"):
        evaluate(ctr.make(positive=2), logits, labels)
    with pytest.raises(ConfigError, match="of 1 logits"):
        evaluate(ctr.make(positive=0), logits[:, :1], np.zeros(len(labels), int))
    with pytest.raises(ConfigError, match=r"labels span 0..1 "):
        evaluate(imbalance.make(), logits[:, :1], labels)
