"""Data sets with domains or other shifts, and hidden labels."""

import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.data import (
    coloured_digits,
    corruption,
    digits,
    rotated_digits,
    shifted_signals,
    synthetic,
)
from distill_jax.data.source import example_ids


def rows(source):
    return source.read(np.arange(len(source)))


def shapes_of(dataset):
    return {
        part: {k: (v.shape[1:], v.dtype) for k, v in rows(getattr(dataset, part)).items()}
        for part in ("train", "held_out", "test")
    }


@pytest.mark.parametrize("module", [digits, coloured_digits, rotated_digits, shifted_signals])
def test_shapes_are_those_of_the_data(module):
    if module is not shifted_signals:
        pytest.importorskip("sklearn")
    made, spec = module.make(), module.spec()
    assert shapes_of(made) == shapes_of(spec)
    assert made.classes == spec.classes
    for part in ("train", "held_out", "test"):
        assert abs(len(getattr(made, part)) - len(getattr(spec, part))) <= 2


def test_colours_agree_as_often_as_they_should():
    pytest.importorskip("sklearn")
    made = coloured_digits.make(held_out=0.0)
    for part, rates in (("train", {0: 0.9, 1: 0.8}), ("test", {2: 0.1})):
        found = rows(getattr(made, part))
        colour = found["input"].sum((1, 2)).argmax(1)
        assert not found["input"].any((1, 2)).all(1).any(), "one colour an image"
        assert set(found["domain"]) == set(rates)
        for domain, rate in rates.items():
            agree = (colour == found["label"])[found["domain"] == domain]
            assert abs(agree.mean() - rate) < 4 * (rate * (1 - rate) / len(agree)) ** 0.5


def test_a_quarter_of_the_labels_does_not_follow_the_form():
    pytest.importorskip("sklearn")
    form = rows(digits.make(held_out=0.0).train)["label"] >= 5
    label = rows(coloured_digits.make(held_out=0.0).train)["label"]
    assert abs((form != label).mean() - 0.25) < 4 * (0.25 * 0.75 / len(label)) ** 0.5
    clean = rows(coloured_digits.make(held_out=0.0, wrong=0.0).train)["label"]
    np.testing.assert_array_equal(form, clean)


def test_domains_are_turned_by_their_angle():
    pytest.importorskip("sklearn")
    upright = digits.make(held_out=0.0)
    made = rotated_digits.make(angles=(0.0, 90.0), test_angles=(180.0,), held_out=0.0)
    plain, turned = rows(upright.train)["input"], rows(made.train)
    np.testing.assert_array_equal(turned["input"][::2], plain[::2])
    np.testing.assert_array_equal(turned["input"][1], np.rot90(plain[1]))
    np.testing.assert_array_equal(
        rows(made.test)["input"][0], rows(upright.test)["input"][0][::-1, ::-1]
    )
    assert set(rows(made.test)["domain"]) == {2}
    one = rotated_digits.make(keep=(1, 2))
    assert set(rows(one.train)["domain"]) == set(rows(one.held_out)["domain"]) == {1, 2}


def test_a_shift_is_a_roll_of_a_form():
    kwargs = {"noise": 0.0, "n_train": 40, "n_test": 40, "held_out": 0.0}
    made = shifted_signals.make(**kwargs)
    still = rows(shifted_signals.make(shifts=(0, 1), test_shifts=(0, 1), **kwargs).train)["input"]
    for part, allowed in (("train", range(30)), ("test", range(30, 40))):
        found = rows(getattr(made, part))
        for signal, label in zip(found["input"][:, 0, :, 0], found["label"], strict=True):
            form = still[label, 0, :, 0]  # labels go round, so that this is one of its class
            likeness = [np.corrcoef(np.roll(form, s), signal)[0, 1] for s in range(40)]
            assert int(np.argmax(likeness)) in allowed
            np.testing.assert_allclose(max(likeness), 1, atol=1e-5)


@pytest.mark.parametrize(
    "module, kwargs",
    [
        (coloured_digits, {"wrong": 1.5}),
        (coloured_digits, {"agree": ()}),
        (rotated_digits, {"keep": (8,)}),
        (rotated_digits, {"angles": ()}),
        (shifted_signals, {"shifts": (0, 41)}),
        (shifted_signals, {"length": 5, "shifts": (0, 2), "test_shifts": (2, 4)}),
    ],
)
def test_what_cannot_be_is_refused(module, kwargs):
    with pytest.raises(ConfigError):
        module.make(**kwargs)


def test_labels_are_hidden_class_by_class():
    dataset = synthetic.make(n_train=200, n_test=40, num_classes=4)
    few, more = (corruption.corrupt(dataset, labels_per_class=n, outliers=0.2) for n in (3, 7))
    found = rows(few.train)
    shown = found["labelled"] > 0
    assert np.bincount(found["label"][shown], minlength=4).tolist() == [3, 3, 3, 3]
    assert not found["outlier"][shown].any()
    np.testing.assert_allclose(found["labelled"].mean(), 1, rtol=1e-6)
    ids = [set(example_ids(d.train)[rows(d.train)["labelled"] > 0]) for d in (few, more)]
    assert ids[0] < ids[1]
    np.testing.assert_array_equal(found["label"][:180], rows(dataset.train)["label"])
    assert (rows(few.test)["labelled"] == 1).all() and (rows(few.held_out)["labelled"] == 1).all()
    assert few.train.provenance.sha256 != more.train.provenance.sha256


def test_all_labels_are_shown_where_there_are_no_more():
    dataset = corruption.corrupt(synthetic.make(n_train=40, n_test=8), labels_per_class=1000)
    np.testing.assert_array_equal(rows(dataset.train)["labelled"], 1)
    with pytest.raises(ConfigError, match="labels_per_class"):
        corruption.corrupt(synthetic.make(n_train=40, n_test=8), labels_per_class=-1)
