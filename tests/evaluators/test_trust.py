"""The trust evaluator equals scikit-learn, SciPy and loops over its definitions."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from distill_jax.core.errors import ConfigError, NonFiniteError
from distill_jax.evaluators import trust
from tests.reference import softmax


def example(seed=0, n=240, k=5, *, s=2, levels=None):
    """Returns outputs and a batch with all flags; weights have so many `levels`, and tie."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n).astype(np.int32)
    student, teacher = (rng.normal(size=(n, k)).astype(np.float32) * 2 for _ in range(2))
    teacher[np.arange(n), labels] += 2
    weights = rng.uniform(0.1, 3, (n, s)).astype(np.float32)
    if levels:
        weights = np.stack([rng.integers(1, levels + 1, n) / levels] * s, axis=1)
        weights[:, -1] = 1 - weights[:, 0] / 2
    outputs = {"weights": weights, "student": student, "teacher": teacher}
    flags = {
        "teacher_shift": rng.integers(0, k, n).astype(np.int32) * (rng.random(n) < 0.5),
        "label_noisy": (rng.random(n) < 0.3).astype(np.int32),
        "outlier": (rng.random(n) < 0.1).astype(np.int32),
    }
    return outputs, {"label": labels, "index": np.arange(n), **flags}


def evaluate(outputs, batch, **kwargs):
    return trust.make(**kwargs)({"example_weights": outputs}, batch)


def by_hand(outputs, batch, quantile):
    """Every metric as its definition says, example by example."""
    weights, labels = outputs["weights"], batch["label"]
    n = len(labels)
    ratio = [float(w[-1]) / sum(map(float, w)) for w in weights]
    p, q = (softmax(outputs[r]) for r in ("student", "teacher"))
    wrong = [max(q[i]) > q[i][labels[i]] for i in range(n)]
    distance = [math.dist(p[i], q[i]) for i in range(n)]
    margin = [
        q[i][labels[i]] - max(v for c, v in enumerate(q[i]) if c != labels[i]) for i in range(n)
    ]
    groups = {"wrong": [], "right": [], "noisy": [], "clean": [], "outlier": [], "inlier": []}
    for i in range(n):
        groups["wrong" if wrong[i] else "right"].append(i)
        groups["noisy" if batch["label_noisy"][i] else "clean"].append(i)
        groups["outlier" if batch["outlier"][i] else "inlier"].append(i)
    for name in ("wrong", "right"):
        ordered = sorted(groups[name], key=lambda i: distance[i])
        m = round(quantile * len(ordered))
        groups |= {f"{name}_near": ordered[:m], f"{name}_far": ordered[-m:]}
    want = {f"ratio_{name}": math.fsum(ratio[i] for i in g) / len(g) for name, g in groups.items()}
    want["ratio_mean"] = math.fsum(ratio) / n
    want["ratio_std"] = math.sqrt(math.fsum((r - want["ratio_mean"]) ** 2 for r in ratio) / n)
    doubt = [1 - r for r in ratio]
    want["teacher_wrong_auc"] = sk.roc_auc_score(wrong, doubt)
    want["damaged_auc"] = sk.roc_auc_score(batch["teacher_shift"] != 0, doubt)
    want["ratio_margin_correlation"] = stats.spearmanr(ratio, margin).statistic
    return want


@pytest.mark.parametrize(
    ("k", "n", "s", "quantile"), [(5, 240, 2, 0.2), (2, 90, 3, 0.5), (12, 151, 2, 0.07)]
)
def test_metrics_equal_their_definitions(k, n, s, quantile):
    outputs, batch = example(k, n, k, s=s)
    got = evaluate(outputs, batch, quantile=quantile)
    assert got == pytest.approx(by_hand(outputs, batch, quantile), abs=1e-7)


@pytest.mark.parametrize("levels", [2, 5, 30])
def test_ties_count_one_half(levels):
    outputs, batch = example(levels, levels=levels)
    got = evaluate(outputs, batch)
    want = by_hand(outputs, batch, 0.2)
    for name in ("teacher_wrong_auc", "damaged_auc", "ratio_margin_correlation"):
        assert got[name] == pytest.approx(want[name], abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_a_constant_ratio_knows_nothing(value):
    outputs, batch = example()
    outputs["weights"] = np.tile(np.float32([[1 - value, value]]), (240, 1))
    got = evaluate(outputs, batch)
    assert got["teacher_wrong_auc"] == 0.5
    assert got["damaged_auc"] == 0.5
    assert "ratio_margin_correlation" not in got
    means = [v for name, v in got.items() if name.startswith("ratio_") and name != "ratio_std"]
    np.testing.assert_allclose(means, value, atol=1e-7)
    assert len(means) == 11


def test_a_ratio_that_knows_the_teachers_errors_is_perfect():
    outputs, batch = example()
    right = outputs["teacher"].argmax(1) == batch["label"]
    outputs["weights"] = np.stack([1.5 - right, right], axis=1)
    got = evaluate(outputs, batch)
    assert got["teacher_wrong_auc"] == 1
    assert got["ratio_wrong"] == got["ratio_wrong_far"] == got["ratio_wrong_near"] == 0
    outputs["weights"] = outputs["weights"][:, ::-1]
    assert evaluate(outputs, batch)["teacher_wrong_auc"] == 0


def test_margin_of_a_known_teacher():
    probs = np.array([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0.5, 0.5, 0.0]])
    with np.errstate(divide="ignore"):
        logits = np.maximum(np.log(probs), -1e9)
    np.testing.assert_allclose(
        trust.teacher_margin(logits, np.array([0, 2, 1])), [0.5, -0.6, 0.0], atol=1e-12
    )


def test_share_of_weights_that_do_not_count():
    weights = np.array([[0.0, 0.0], [3.0, 1.0], [0.0, 0.2]])
    np.testing.assert_allclose(trust.teacher_share(weights), [0, 0.25, 1])
    np.testing.assert_allclose(trust.teacher_share(weights[:, 1:]), [0, 1, 1])


def test_examples_that_tie_at_the_edge_of_a_group_all_count():
    teacher = np.tile([[2.0, 0.0]], (10, 1))
    student = np.concatenate([np.zeros((6, 2)), np.tile([[1.0, 0.0]], (4, 1))])
    labels = np.zeros(10, np.int64)
    groups = dict(trust.four_groups(student, teacher, labels, 0.1))
    assert list(groups) == ["right_far", "right_near"]
    np.testing.assert_array_equal(np.flatnonzero(groups["right_far"]), range(6))
    np.testing.assert_array_equal(np.flatnonzero(groups["right_near"]), range(6, 10))


def test_what_is_undefined_is_left_out():
    outputs, batch = example()
    bare = {"label": outputs["teacher"].argmax(1), "index": batch["index"]}
    ones = np.ones(240, np.int32)
    extremes = {"teacher_shift": ones, "label_noisy": 0 * ones, "outlier": ones}
    for more in ({}, extremes):
        got = evaluate(outputs, {**bare, **more})
        assert set(got) == {
            *("ratio_mean", "ratio_std", "ratio_right", "ratio_right_far", "ratio_right_near"),
            "ratio_margin_correlation",
        }
        assert all(type(v) is float and math.isfinite(v) for v in got.values())


def test_nothing_depends_on_the_order_of_examples():
    outputs, batch = example(levels=4)
    order = np.random.default_rng(1).permutation(240)
    got = evaluate(*({name: x[order] for name, x in part.items()} for part in (outputs, batch)))
    assert got == pytest.approx(evaluate(outputs, batch), rel=1e-12)


def test_what_does_not_fit_is_refused():
    outputs, batch = example()
    for quantile in (0, 0.6, -1):
        with pytest.raises(ConfigError, match=f"quantile is {quantile}"):
            trust.make(quantile=quantile)
    with pytest.raises(ConfigError, match=r"weights have shape \(240,\)"):
        evaluate({**outputs, "weights": outputs["weights"][:, 0]}, batch)
    with pytest.raises(ConfigError, match="the same two or more classes"):
        evaluate({**outputs, "student": outputs["student"][:, :4]}, batch)
    with pytest.raises(ConfigError, match="flags have shape"):
        evaluate(outputs, {**batch, "outlier": batch["outlier"][:, None]})
    with pytest.raises(ConfigError, match="no logits"):
        evaluate({name: x for name, x in outputs.items() if name != "teacher"}, batch)
    outputs["weights"][7, 1] = np.nan
    with pytest.raises(NonFiniteError, match=r"weights of 1 of 240 .* at position 7"):
        evaluate(outputs, batch)


def test_it_reads_what_the_weigher_gives():
    assert trust.make().outputs == {"example_weights": ("weights", "student", "teacher")}


def test_weights_of_tokens_are_refused():
    arrays = {name: np.zeros((4, 3, 2)) for name in ("weights", "student", "teacher")}
    with pytest.raises(ConfigError, match="weights are of tokens"):
        trust.make()({"example_weights": arrays}, {"label": np.zeros(4, int)})
