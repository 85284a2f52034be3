"""Evaluators of several labels and of real values, equal to scikit-learn and SciPy."""

import numpy as np
import pytest
from scipy import stats

from distill_jax.core.errors import ArgumentError, NonFiniteError
from distill_jax.evaluators import classification, multilabel, regression
from distill_jax.evaluators._directions import direction

metrics = pytest.importorskip("sklearn.metrics")

N, K = 60, 3
R = np.random.RandomState(3)
BITS = (R.rand(N, K) < [0.2, 0.5, 0.8]).astype(np.float32)
LOGITS = np.round(2 * R.randn(N, K) + 2 * BITS - 1, 1)  # with ties
TARGETS = R.randn(N, K).astype(np.float32)
VALUES = np.round(TARGETS + R.randn(N, K), 1)
KNOWN = (R.rand(N, K) < 0.8).astype(np.float32)


def measure(evaluator, outputs, **batch):
    return evaluator.make()({"student": {"logits": outputs}}, batch)


def test_several_labels_equal_scikit_learn():
    found = measure(multilabel, LOGITS, label=BITS)
    p, yes = 1 / (1 + np.exp(-LOGITS)), LOGITS > 0
    want = {
        "mean_average_precision": metrics.average_precision_score(BITS, p, average="macro"),
        "macro_auc": metrics.roc_auc_score(BITS, p, average="macro"),
        "macro_f1": metrics.f1_score(BITS, yes, average="macro"),
        "micro_f1": metrics.f1_score(BITS, yes, average="micro"),
        "subset_accuracy": metrics.accuracy_score(BITS, yes),
        "binary_accuracy": 1 - metrics.hamming_loss(BITS, yes),
        "nll": np.mean([metrics.log_loss(BITS[:, i], p[:, i]) for i in range(K)]),
        "brier": np.mean([metrics.brier_score_loss(BITS[:, i], p[:, i]) for i in range(K)]),
    }
    assert {name for name, value in found.items() if np.ndim(value) == 0} == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
        assert direction(f"test/{name}") == ("min" if name in ("nll", "brier") else "max")
    for name, score in (
        ("average_precision_by_label", metrics.average_precision_score),
        ("auc_by_label", metrics.roc_auc_score),
    ):
        np.testing.assert_allclose(found[name], score(BITS, p, average=None), rtol=1e-6)


def test_real_values_equal_scikit_learn_and_scipy():
    found = measure(regression, VALUES, label=TARGETS)
    columns = [(VALUES[:, i], TARGETS[:, i]) for i in range(K)]
    want = {
        "rmse": metrics.root_mean_squared_error(TARGETS, VALUES),
        "mae": metrics.mean_absolute_error(TARGETS, VALUES),
        "r2": metrics.r2_score(TARGETS, VALUES),
        "pearson": np.mean([stats.pearsonr(x, y)[0] for x, y in columns]),
        "spearman": np.mean([stats.spearmanr(x, y)[0] for x, y in columns]),
    }
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
        assert direction(f"held_out/{name}") == ("min" if name in ("rmse", "mae") else "max")
        assert found[f"{name}_by_target"].shape == (K,)
    one = measure(regression, VALUES[:, :1], label=TARGETS[:, :1])
    assert set(one) == set(want)
    np.testing.assert_allclose(one["r2"], metrics.r2_score(TARGETS[:, 0], VALUES[:, 0]))


@pytest.mark.parametrize(
    ("evaluator", "outputs", "labels"),
    [(multilabel, LOGITS, BITS), (regression, VALUES, TARGETS)],
)
def test_unknown_labels_count_in_no_metric(evaluator, outputs, labels):
    def found(labels):
        measured = measure(evaluator, outputs, label=labels, labelled=KNOWN)
        return {name: np.asarray(value) for name, value in measured.items()}

    masked, other = found(labels * KNOWN), found(np.where(KNOWN, labels, 1 - labels))
    for name, value in masked.items():
        np.testing.assert_array_equal(value, other[name])
    rows = KNOWN[:, 0] > 0
    alone = measure(evaluator, outputs[rows][:, :1], label=labels[rows][:, :1])
    key = "auc_by_label" if evaluator is multilabel else "rmse_by_target"
    name = "macro_auc" if evaluator is multilabel else "rmse"
    np.testing.assert_allclose(masked[key][0], alone[name])


def test_what_is_not_defined_is_left_out():
    found = measure(multilabel, LOGITS[:, :2] - 100, label=np.zeros((N, 2)))
    assert not {"mean_average_precision", "macro_auc", "macro_f1", "micro_f1"} & set(found)
    half = measure(multilabel, LOGITS, label=BITS * [0, 1, 1])
    np.testing.assert_allclose(half["macro_auc"], np.nanmean(half["auc_by_label"]))
    assert np.isnan(half["auc_by_label"]).tolist() == [True, False, False]
    flat = measure(regression, VALUES[:, :1], label=np.ones((N, 1)))
    assert set(flat) == {"rmse", "mae"}


@pytest.mark.parametrize(
    ("evaluator", "labels", "message"),
    [
        (multilabel, BITS[:, :2], "one column of labels for each output"),
        (regression, TARGETS[:, 0], "one column of labels for each output"),
        (classification, BITS, "integers of shape"),
    ],
)
def test_labels_of_another_kind_are_refused(evaluator, labels, message):
    with pytest.raises(ArgumentError, match=message):
        measure(evaluator, LOGITS, label=labels)


@pytest.mark.parametrize("evaluator", [multilabel, regression])
def test_outputs_that_are_not_finite_are_refused(evaluator):
    with pytest.raises(NonFiniteError, match="1 of 60 examples"):
        measure(evaluator, np.where(np.arange(N)[:, None] == 4, np.nan, LOGITS), label=BITS)
