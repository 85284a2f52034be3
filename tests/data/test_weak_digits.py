"""The stages of weak-to-strong training share no image, and hide the labels that they should."""

import numpy as np
import pytest

from distill_jax.core.errors import ArgumentError
from distill_jax.data import weak_digits

pytest.importorskip("sklearn")


def rows(source):
    return source.read(np.arange(len(source)))


def test_stages_are_a_division_of_the_images():
    made = {stage: weak_digits.make(stage=stage, split_seed=3) for stage in weak_digits.SIZES}
    sources = [d.train for d in made.values()] + [made["weak"].held_out, made["weak"].test]
    assert [len(s) for s in sources] == [500, 250, 550, 100, 397]
    images = np.concatenate([rows(s)["input"].reshape(len(s), -1) for s in sources])
    whole = weak_digits.digits.make(held_out=0.0)
    every = np.concatenate(
        [rows(s)["input"].reshape(len(s), -1) for s in (whole.train, whole.test)]
    )
    assert sorted(map(bytes, images)) == sorted(map(bytes, every))
    test = {stage: rows(d.test)["input"] for stage, d in made.items()}
    np.testing.assert_array_equal(test["pretrain"], test["student"])
    other = rows(weak_digits.make(split_seed=4).test)["input"]
    assert not np.array_equal(test["student"], other)


def test_tasks_are_of_the_digit():
    digit = rows(weak_digits.make(task="digit").train)["label"]
    parity = rows(weak_digits.make(task="parity").train)
    np.testing.assert_array_equal(parity["label"], digit % 2)
    np.testing.assert_array_equal(parity["conflict"], digit >= 5)
    assert "labelled" not in parity


def test_labels_are_hidden_behind_the_first_ones():
    made = weak_digits.make(examples=30, labels=4)
    np.testing.assert_array_equal(rows(made.train)["labelled"], np.arange(30) < 4)
    assert rows(made.held_out)["labelled"].all() and rows(made.test)["labelled"].all()


@pytest.mark.parametrize(
    "kwargs", [{"stage": "weka"}, {"task": "odd"}, {"examples": 551}, {"labels": -1}]
)
def test_wrong_arguments_are_named(kwargs):
    with pytest.raises(ArgumentError, match=next(iter(kwargs))):
        weak_digits.make(**kwargs)
