"""Labels of three tasks: read, checked, split, and as batches carry them."""

import numpy as np
import pytest

from distill_jax.core.api import Dataset, Provenance
from distill_jax.core.errors import ConfigError, DataUnavailable
from distill_jax.data import (
    adult,
    adult_labels,
    checks,
    corruption,
    diabetes,
    labels,
    loader,
    npz_file,
    source,
)

X = np.linspace(0, 1, 12, dtype=np.float32).reshape(6, 2)
BITS = np.array([[0, 1], [1, 1], [0, 0], [1, 0], [0, 1], [1, 1]])


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.bool_, np.float32, np.float64])
def test_several_labels_are_float32(dtype):
    found, labelled = labels.read_labels(BITS.astype(dtype), task="multilabel")
    assert found.dtype == np.float32 and labelled is None
    np.testing.assert_array_equal(found, BITS)


@pytest.mark.parametrize("dtype", [np.int16, np.float64])
@pytest.mark.parametrize("shape", [(6,), (6, 1), (3, 2)])
def test_targets_are_columns_of_float32(dtype, shape):
    values = np.arange(6).reshape(shape).astype(dtype)
    found, _ = labels.read_labels(values, task="regression")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, values.reshape(len(values), -1))


@pytest.mark.parametrize("ignore", [-1, "-1", np.nan, "nan"])
@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_unknown_values_are_marked_one_by_one(task, ignore):
    given = BITS.astype(np.float64)
    given[0, 1] = given[3, 0] = float(ignore)
    found, labelled = labels.read_labels(given, task=task, ignore_label=ignore)
    assert labelled is not None
    known = np.ones_like(BITS)
    known[0, 1] = known[3, 0] = 0
    np.testing.assert_array_equal(labelled, known)
    np.testing.assert_array_equal(found, BITS * known)


def test_unknown_classes_are_marked_and_the_others_count_more():
    found, labelled = labels.read_labels([2, -1, 1, -1], ignore_label=-1)
    assert labelled is not None and found.dtype == np.int32
    np.testing.assert_array_equal(found, [2, 0, 1, 0])
    np.testing.assert_allclose(labelled, [2, 0, 2, 0])


@pytest.mark.parametrize(
    ("given", "arguments", "message"),
    [
        ([[0, 2]], {"task": "multilabel"}, r"2 at \[0, 1\] is neither 0 nor 1"),
        ([[0, -1]], {"task": "multilabel"}, "ignore_label names a value"),
        ([0, 1], {"task": "multilabel"}, r"0 or 1 of shape \[n, k\]"),
        ([0.0, np.nan], {"task": "regression"}, r"nan at \[1, 0\] is not finite"),
        ([1e39], {"task": "regression"}, r"1e\+39 at \[0, 0\] is not finite"),
        (["1.5"], {"task": "regression"}, "real numbers"),
        (np.zeros((2, 2, 2)), {"task": "regression"}, r"\[n\] or \[n, m\]"),
        ([-1, -1], {"ignore_label": -1}, "all labels are -1"),
        ([[0, 1]], {"task": "multi-label"}, "did you mean 'multilabel'"),
        ([0, 1], {"ignore_label": "none"}, "a number such as -1, or nan"),
    ],
)
def test_labels_of_another_kind_are_refused(given, arguments, message):
    with pytest.raises((ConfigError, DataUnavailable), match=message):
        labels.read_labels(given, **arguments)


def test_soft_labels_are_distributions():
    found = labels.read_label_probs([[0.25, 0.75], [1, 0]], n=2)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[0.25, 0.75], [1, 0]])
    for probs, message in (
        ([[0.5, 0.6]], "row 0 is no distribution: it sums to 1.1"),
        ([[1.5, -0.5]], "row 0"),
        ([[np.nan, 1]], "row 0"),
        ([[1.0, 0], [1, 0]], "of 1 examples"),
    ):
        with pytest.raises(DataUnavailable, match=message):
            labels.read_label_probs(probs, n=1)


def write(folder, **arrays):
    parts = {"x_train": X, "x_test": X + 2, **arrays}
    np.savez(folder / "data.npz", **parts)  # pyright: ignore[reportArgumentType]
    return str(folder / "data.npz")


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_a_file_tells_its_task(tmp_path, task):
    path = write(tmp_path, y_train=BITS, y_test=1 - BITS)
    made = npz_file.make(path=path, task=task, held_out=1 / 3, classes="a,b")
    dataset, report = checks.open_dataset(made)
    assert (dataset.task, dataset.classes, report.warnings) == (task, ("a", "b"), ())
    assert (len(dataset.train), len(dataset.held_out)) == (4, 2)  # all rows are one stratum
    assert npz_file.make(path=path, task=task).classes[1] in ("label 1", "target 1")
    batch = next(loader.eval_batches(dataset.test, batch_size=4))
    np.testing.assert_array_equal(batch["label"], (1 - BITS)[:4])
    resident = loader.ResidentLoader(dataset.train, batch_size=2, seed=0)
    ids = source.example_ids(dataset.train)
    np.testing.assert_array_equal(resident.data["label"], BITS[ids])


def test_unknown_and_soft_labels_of_a_file_travel_in_all_parts(tmp_path):
    soft = np.eye(3)[[0, 1, 2, 0, 1, 2]] * 0.7 + 0.1
    path = write(tmp_path, y_train=[0, 1, 2, 0, 1, -1], y_test=[0, 1, 2, 0, 1, 2], p_train=soft)
    dataset, _ = checks.open_dataset(npz_file.make(path=path, held_out=0.25, ignore_label=-1))
    every = dataset.train.read(np.arange(len(dataset.train)))
    ids = source.example_ids(dataset.train)
    np.testing.assert_allclose(every["label_probs"], soft[ids], rtol=1e-6)
    np.testing.assert_array_equal(every["labelled"] > 0, ids != 5)
    for part in (dataset.held_out, dataset.test):
        assert part.read(np.arange(1)).keys() == every.keys()
    with pytest.raises(ConfigError, match="leave p_train out"):
        npz_file.make(path=path, task="regression")
    with pytest.raises(DataUnavailable, match="ignore_label=-1"):
        npz_file.make(path=path)


def part(values, task):
    n = len(values)
    return source.ArraySource(X[:n], values, Provenance("x", "here", n, ""), task=task)


def test_parts_agree_and_constant_columns_are_noticed():
    train = part(np.array([[0.0, 1], [0, 0]]), "multilabel")
    whole = Dataset(train, train, train, ("never", "sometimes"), task="multilabel")
    assert checks.open_dataset(whole)[1].warnings == (
        "data: all training examples have 0 for 'never': there is nothing to learn",
    )
    real = part(np.array([[0.5, 1], [0, 0]]), "regression")
    with pytest.raises(DataUnavailable, match="neither 0 nor 1"):
        checks.open_dataset(whole._replace(test=real))
    with pytest.raises(DataUnavailable, match="2 columns of labels and there are 3 names"):
        checks.open_dataset(whole._replace(classes=("a", "b", "c")))
    with pytest.raises(ConfigError, match="did you mean 'regression'"):
        checks.open_dataset(whole._replace(task="regresion"))


@pytest.mark.parametrize(
    "fault", [{"label_noise": 0.1}, {"teacher_damage": 0.1}, {"imbalance": 2.0}, {"outliers": 0.5}]
)
def test_faults_of_classes_are_refused_elsewhere(fault):
    bits = part(BITS, "multilabel")
    whole = Dataset(bits, bits, bits, ("a", "b"), task="multilabel")
    with pytest.raises(ConfigError, match=f"{next(iter(fault))} is of data with one class"):
        corruption.corrupt(whole, **fault)
    some = source.ArraySource(
        X[:2], np.array([-1, 1]), bits.provenance._replace(n=2), ignore_label=-1
    )
    whole = Dataset(some, some, some, ("a", "b"))
    with pytest.raises(ConfigError, match="some are unknown"):
        corruption.corrupt(whole, **fault)


def test_training_on_the_held_out_part_needs_no_classes():
    bits = part(BITS, "multilabel")
    whole = Dataset(bits, bits, bits, ("a", "b"), task="multilabel")
    assert len(corruption.corrupt(whole, train_on_held_out=0.5).train) == 3


def test_adult_has_five_labels_and_none_of_their_columns():
    data, report = checks.open_dataset(adult_labels.make(held_out=0.1))
    assert (len(data.train), len(data.held_out), len(data.test)) == (35167, 3907, 9768)
    assert (data.task, data.classes, report.warnings) == ("multilabel", adult_labels.LABELS, ())
    whole, income = adult_labels.make(held_out=0), adult.make(held_out=0)
    for part, other in ((whole.train, income.train), (whole.test, income.test)):
        found, like = source.example_labels(part), other.read(np.arange(len(other)))
        np.testing.assert_array_equal(found[:, 0], source.example_labels(other))
        # Ids of genders follow their sorted names, of which "Female" is the first.
        gender = like["input"]["categorical"][:, adult.CATEGORICAL.index("gender")]
        np.testing.assert_array_equal(found[:, 2], gender == 1)
        rows = part.read(np.arange(len(part)))["input"]
        kept = [adult.CATEGORICAL.index(name) for name in adult_labels.CATEGORICAL]
        np.testing.assert_array_equal(rows["categorical"], like["input"]["categorical"][:, kept])
        kept = [adult.NUMERIC.index(name) for name in adult_labels.NUMERIC]
        np.testing.assert_array_equal(rows["numeric"], like["input"]["numeric"][:, kept])
    shares = source.example_labels(whole.train).mean(0)
    assert ((shares > 0.2) & (shares < 0.8)).all()


def test_diabetes_is_split_and_scaled_by_its_training_part():
    pytest.importorskip("sklearn")
    data, report = checks.open_dataset(diabetes.make(held_out=0.2))
    assert (len(data.train), len(data.held_out), len(data.test)) == (283, 71, 88)
    assert (data.task, data.classes, report.warnings) == ("regression", ("progression",), ())
    train = diabetes.make(held_out=0).train
    rows = train.read(np.arange(354))
    for values in (rows["input"], rows["label"]):
        np.testing.assert_allclose(values.mean(0), 0, atol=1e-6)
        np.testing.assert_allclose(values.std(0), 1, rtol=1e-5)
    raw = diabetes.make(held_out=0, standardize=False)
    values = np.concatenate([source.example_labels(part) for part in (raw.train, raw.test)])
    assert (values.min(), values.max()) == (25, 346)


def test_scales_and_counts_leave_out_what_is_unknown():
    values, known = np.array([[1.0, 9], [3, 9], [7, 9]]), np.array([[1, 1], [1, 1], [0, 1]])
    np.testing.assert_allclose(labels.label_scale(values, known), [1.0, 1.0])
    np.testing.assert_allclose(labels.label_scale(values, None)[0], values[:, 0].std())
    np.testing.assert_array_equal(labels.label_counts(BITS, BITS, k=2), BITS.sum(0))
    some = labels.label_counts(np.array([0, 2, 2, 0]), np.array([1.0, 1, 1, 0]), k=4)
    np.testing.assert_array_equal(some, [1, 0, 2, 0])


def test_several_labels_are_stratified():
    """Each label, a rare one too, and each example without one keeps its share."""
    r = np.random.default_rng(0)
    y = (r.random((2000, 4)) < [0.4, 0.2, 0.05, 0.01]).astype(np.float32)
    y[:, 3] *= y[:, 0]
    for fraction in (0.1, 0.5):
        held = labels.stratified(y > 0, fraction=fraction, seed=0)
        assert abs(held.sum() - fraction * len(y)) <= 1
        assert (abs(y[held].sum(0) - fraction * y.sum(0)) <= 2).all()
    assert (labels.stratified(y > 0, fraction=0.5, seed=0) == held).all()
    assert (labels.stratified(y > 0, fraction=0.5, seed=1) != held).any()
    made = source.make_array_source(y, y, name="y", origin="here", task="multilabel")
    train, part = source.split_held_out(made, fraction=0.1, seed=0)
    np.testing.assert_allclose(
        source.example_labels(part).mean(0), source.example_labels(train).mean(0), atol=0.012
    )
    random = r.permutation(len(y))[:200]  # what a split without strata does to the rare label
    assert abs(y[random].sum(0) - 0.1 * y.sum(0)).max() > 2
