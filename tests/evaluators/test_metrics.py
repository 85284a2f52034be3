"""Evaluators equal scikit-learn and brute-force transcriptions of their definitions."""

import math

import numpy as np
import pytest
from sklearn import metrics as sk

from distill_jax.core.errors import ConfigError, NonFiniteError
from distill_jax.evaluators import agreement, calibration, classification, gap_recovered
from distill_jax.evaluators._directions import direction
from tests.reference import softmax


def example(seed=0, n=203, k=7, *, scale=2.0, classes=None):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes or k, n).astype(np.int32)
    logits = rng.normal(size=(n, k)) * scale
    logits[np.arange(n), labels] += 1.5
    return logits.astype(np.float32), labels


def evaluate(evaluator, logits, labels, **others):
    outputs = {"student": {"logits": logits}, **{r: {"logits": v} for r, v in others.items()}}
    return evaluator(outputs, {"label": labels, "index": np.arange(len(labels))})


@pytest.mark.parametrize(
    ("k", "n", "classes"), [(7, 203, None), (2, 50, None), (10, 31, 6), (6, 1, None), (120, 64, 9)]
)
def test_classification_equals_scikit_learn(k, n, classes):
    logits, labels = example(k, n, k, classes=classes)
    got = evaluate(classification.make(), logits, labels)
    p = softmax(logits)
    top1 = p.argmax(axis=1)
    every = list(range(k))
    want = {
        "accuracy": sk.accuracy_score(labels, top1),
        "nll": sk.log_loss(labels, p, labels=every),
        "macro_f1": sk.f1_score(labels, top1, average="macro"),
        "balanced_accuracy": np.mean([np.mean(top1[labels == c] == c) for c in np.unique(labels)]),
        "brier": np.mean([sum((p[i, c] - (labels[i] == c)) ** 2 for c in every) for i in range(n)]),
    }
    if k > 5:
        want["top5"] = sk.top_k_accuracy_score(labels, p, k=5, labels=every)
    arrays = {"recall", "confusion", "right"}
    assert {name: v for name, v in got.items() if name not in arrays} == pytest.approx(
        want, abs=1e-6
    )
    np.testing.assert_array_equal(got["confusion"], sk.confusion_matrix(labels, top1, labels=every))
    assert got["right"].shape == labels.shape and got["right"].mean() == got["accuracy"]
    present = np.isin(every, labels)
    np.testing.assert_array_equal(np.isnan(got["recall"]), ~present)
    assert np.mean(got["recall"][present]) == pytest.approx(got["balanced_accuracy"])


def test_balanced_accuracy_equals_scikit_learn():
    logits, labels = example(3)
    got = evaluate(classification.make(), logits, labels)["balanced_accuracy"]
    assert got == pytest.approx(sk.balanced_accuracy_score(labels, logits.argmax(1)), abs=1e-6)


def test_brier_of_two_classes_is_twice_the_one_class_form():
    logits, labels = example(1, 40, 2)
    p = softmax(logits)[:, 1]
    got = evaluate(classification.make(), logits, labels)["brier"]
    assert got == pytest.approx(2 * sk.brier_score_loss(labels, p), abs=1e-6)


def test_ties_go_to_the_lower_class():
    logits = np.zeros((8, 8), np.float32)
    got = evaluate(classification.make(), logits, np.arange(8))
    assert got["accuracy"] == 1 / 8
    assert got["top5"] == 5 / 8
    assert got["nll"] == pytest.approx(math.log(8))


def test_large_logits_stay_exact():
    logits = np.array([[1e4, 0.0], [0.0, 1e4]])
    got = evaluate(classification.make(), logits, np.array([0, 0]))
    assert got["nll"] == 5000.0
    assert got["brier"] == 1.0


def ece_loop(confidence, correct, bins):
    total = 0.0
    for b in range(bins):
        inside = [
            i for i, c in enumerate(confidence) if (b / bins < c or b == 0) and c <= (b + 1) / bins
        ]
        if inside:
            gap = sum(correct[i] for i in inside) - sum(confidence[i] for i in inside)
            total += abs(gap)
    return total / len(confidence)


def adaptive_ece_loop(confidence, correct, bins):
    order = sorted(range(len(confidence)), key=lambda i: -confidence[i])
    small, extra = divmod(len(order), bins)
    total, start = 0.0, 0
    for b in range(bins):
        part = order[start : start + small + (b < extra)]
        start += len(part)
        total += abs(sum(correct[i] - confidence[i] for i in part))
    return total / len(order)


def aurc_loop(confidence, correct):
    order = sorted(range(len(confidence)), key=lambda i: -confidence[i])
    risks = [sum(1 - correct[i] for i in order[: m + 1]) / (m + 1) for m in range(len(confidence))]
    return sum(risks) / len(risks)


@pytest.mark.parametrize(("k", "n", "bins"), [(7, 203, 15), (2, 97, 10), (5, 15, 15), (3, 1, 15)])
def test_calibration_equals_brute_force(k, n, bins):
    logits, labels = example(n, n, k)
    got = evaluate(calibration.make(bins=bins), logits, labels)
    probs = softmax(logits)
    confidence = [max(p) for p in probs]
    correct = [float(p.argmax() == y) for p, y in zip(probs, labels, strict=True)]
    assert got["ece"] == pytest.approx(ece_loop(confidence, correct, bins), abs=1e-9)
    assert got["ece_adaptive"] == pytest.approx(
        adaptive_ece_loop(confidence, correct, min(bins, n)), abs=1e-9
    )
    assert got["aurc"] == pytest.approx(aurc_loop(confidence, correct), abs=1e-9)
    table = got["reliability"]
    assert table.shape == (bins, 5)
    assert table[:, 2].sum() == n
    filled = table[table[:, 2] > 0]
    assert (filled[:, 3] > filled[:, 0]).all()
    assert (filled[:, 3] <= filled[:, 1]).all()


def test_confidence_on_an_edge_belongs_to_the_lower_bin():
    table = calibration.reliability_table(np.array([0.5, 0.5, 1.0]), np.array([1.0, 0, 1]), 2)
    np.testing.assert_allclose(table, [[0, 0.5, 2, 0.5, 0.5], [0.5, 1, 1, 1, 1]])


def test_ties_do_not_depend_on_the_order_of_examples():
    logits = np.tile([[1.0, 0.0]], (6, 1))
    labels = np.array([0, 0, 0, 1, 1, 1])
    first = evaluate(calibration.make(bins=3), logits, labels)
    second = evaluate(calibration.make(bins=3), logits, labels[::-1])
    for name in ("ece", "ece_adaptive", "aurc"):
        assert first[name] == second[name]
    assert first["aurc"] == pytest.approx(0.5)
    rng = np.random.default_rng(0)
    orders = [rng.permutation(labels) for _ in range(4000)]
    expected = np.mean([aurc_loop([0.7] * 6, 1 - order) for order in orders])
    assert first["aurc"] == pytest.approx(expected, abs=0.02)


def test_perfect_predictions():
    labels = np.arange(6) % 3
    logits = 1e3 * np.eye(3)[labels]
    result = evaluate(classification.make(), logits, labels)
    assert result["accuracy"] == result["macro_f1"] == result["balanced_accuracy"] == 1.0
    assert result["nll"] == result["brier"] == 0.0
    result = evaluate(calibration.make(), logits, labels)
    assert result["ece"] == result["ece_adaptive"] == result["aurc"] == 0.0


def test_confidently_wrong_has_the_largest_calibration_error():
    result = evaluate(calibration.make(), np.array([[1e3, 0.0]]), np.array([1]))
    assert result["ece"] == result["ece_adaptive"] == result["aurc"] == 1.0


def test_agreement_equals_brute_force():
    logits, labels = example(0)
    teacher, _ = example(1)
    got = evaluate(agreement.make(), logits, labels, teacher=teacher)
    kl, same, right, wrong = 0.0, [], [], []
    for a, b, y in zip(logits, teacher, labels, strict=True):
        q, p = softmax(a), softmax(b)
        kl += sum(pi * math.log(pi / qi) for pi, qi in zip(p, q, strict=True))
        same.append(q.argmax() == p.argmax())
        (right if p.argmax() == y else wrong).append(same[-1])
    assert got == pytest.approx(
        {
            "agreement": np.mean(same),
            "kl": kl / len(labels),
            "agreement_reference_right": np.mean(right),
            "agreement_reference_wrong": np.mean(wrong),
        },
        abs=1e-9,
    )


def test_agreement_with_itself_and_a_perfect_reference():
    labels = np.arange(6) % 3
    logits = 5.0 * np.eye(3)[labels]
    got = evaluate(agreement.make(reference="ema"), logits, labels, ema=logits)
    assert got == {"agreement": 1.0, "kl": 0.0, "agreement_reference_right": 1.0}


def test_agreement_counts_examples_without_a_known_class():
    logits, teacher = 5.0 * np.eye(3)[[0, 1, 2, 0]], 5.0 * np.eye(3)[[0, 1, 2, 1]]
    outputs = {"student": {"logits": logits}, "teacher": {"logits": teacher}}
    batch = {"label": np.array([0, 0, 0, 0]), "labelled": np.array([2.0, 2.0, 0, 0])}
    got = agreement.make()(outputs, batch)
    assert got.pop("kl") > 0
    assert got == {
        "agreement": 0.75,
        "agreement_reference_right": 1.0,
        "agreement_reference_wrong": 1.0,
    }


def test_roles_are_the_outputs_they_read():
    assert classification.make(role="online").outputs == {"online": ("logits",)}
    assert calibration.make(role="ema").outputs == {"ema": ("logits",)}
    assert set(agreement.make().outputs) == {"student", "teacher"}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("module", [classification, calibration])
def test_logits_that_are_not_finite_are_refused(module, bad):
    logits, labels = example()
    logits[5, 2] = bad
    with pytest.raises(NonFiniteError, match=r"1 of 203 examples.*first at position 5"):
        evaluate(module.make(), logits, labels)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((0, 3)), np.zeros(0, int), "shape"),
        (np.zeros(3), np.zeros(3, int), "shape"),
        (np.zeros((2, 3)), np.array([0, 3]), "labels span 0..3"),
        (np.zeros((2, 3)), np.array([-1, 2]), "labels span -1..2"),
        (np.zeros((2, 3)), np.zeros(3, int), "labels have shape"),
        (np.zeros((2, 3)), np.zeros(2), "float64"),
    ],
)
def test_wrong_shapes_and_labels_are_refused(logits, labels, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(classification.make(), logits, labels)


def test_wrong_roles_and_bins_are_refused():
    logits, labels = example()
    with pytest.raises(ConfigError, match="'online'"):
        evaluate(classification.make(role="online"), logits, labels)
    with pytest.raises(ConfigError, match="over the same classes"):
        evaluate(agreement.make(), logits, labels, teacher=logits[:, :3])
    with pytest.raises(ConfigError, match="different roles"):
        agreement.make(reference="student")
    with pytest.raises(ConfigError, match="bins is 0"):
        calibration.make(bins=0)


def test_which_end_of_a_metric_is_better():
    ends = {
        "min": "nll brier ece_adaptive kl uniformity log_loss test/nll_raw held_out/ece_teacher "
        "test/bits_per_byte bits_per_token",
        "max": "accuracy knn20_accuracy test/probe_balanced_accuracy_raw macro_auc rankme_initial "
        "few_label_accuracy_5_per_class agreement_reference_wrong damaged_auc",
    }
    for end, names in ends.items():
        assert {direction(name) for name in names.split()} == {end}
    for name in ("alpha_req", "few_label_se_5_per_class", "held_out/mine", "nll_gap", ""):
        assert direction(name) is None


def test_gap_recovered_is_a_share_of_the_gap():
    labels = np.arange(10) % 2
    logits = {}
    for role, right in (("student", 7), ("teacher", 6), ("ceiling", 9)):
        said = np.where(np.arange(10) < right, labels, 1 - labels)
        logits[role] = np.eye(2)[said]
    found = evaluate(gap_recovered.make(), labels=labels, logits=logits.pop("student"), **logits)
    assert math.isclose(found["gap_recovered"], 1 / 3)
    assert found["accuracy_where_weak_wrong"] == 0.25
    logits["ceiling"] = logits["teacher"]
    found = evaluate(gap_recovered.make(), labels=labels, logits=logits["teacher"], **logits)
    assert "gap_recovered" not in found and direction("test/gap_recovered") == "max"
