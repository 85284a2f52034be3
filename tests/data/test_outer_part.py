"""The held-out part in two: what a weighting learns from, and what chooses."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.data import checks, source, synthetic
from distill_jax.data.corruption import corrupt
from distill_jax.run import config as config_lib
from distill_jax.run import flags, old_configs
from distill_jax.run.build import data as data_lib
from distill_jax.run.preflight import data as preflight
from distill_jax.run.train.result import of_experiment
from distill_jax.run.workdir.continuation import data_checksums

SIZES = {"n_train": 400, "n_test": 40, "image_size": 4, "num_classes": 4, "held_out": 0.2}
TGEO = "configs/bilevel/tgeo_kd.py:smoke"


def split(share=0.5, seed=0):
    return source.split_outer(synthetic.make(**SIZES), share=share, seed=seed)


def ids(part):
    return set(source.example_ids(part).tolist())


def test_the_held_out_part_is_split_by_class_and_seed():
    whole, data = synthetic.make(**SIZES), split()
    assert ids(data.outer_part) | ids(data.held_out) == ids(whole.held_out)
    assert not ids(data.outer_part) & ids(data.held_out) and ids(data.train) == ids(whole.train)
    counts = [
        np.bincount(source.example_labels(p), minlength=4) for p in (data.outer_part, data.held_out)
    ]
    assert abs(counts[0] - counts[1]).max() <= 1 and counts[0].min() > 0
    assert ids(split().outer_part) == ids(data.outer_part) != ids(split(seed=1).outer_part)
    assert len(split(share=0.25).outer_part) < len(data.outer_part)
    assert source.split_outer(whole, share=0, seed=0) == whole
    assert whole.outer_part is whole.held_out and data.outer_part is data.outer
    assert list(data.parts) == ["train", "held_out", "outer", "test"]


@pytest.mark.parametrize("share, held_out", [(1.0, 0.2), (-0.1, 0.2), (0.5, 0.0), (0.01, 0.2)])
def test_wrong_shares_are_refused(share, held_out):
    with pytest.raises(ConfigError, match="outer"):
        source.split_outer(synthetic.make(**SIZES | {"held_out": held_out}), share=share, seed=0)


def test_provenance_and_checksums_have_the_part():
    data = split()
    found = data_checksums(data)
    assert found["outer"]["n"] == len(data.outer_part)
    assert len({part["sha256"] for part in found.values()}) == 4
    assert found["outer"]["origin"] == found["train"]["origin"]
    assert data_checksums(split(seed=1))["outer"] != found["outer"]

    @dataclasses.dataclass
    class Shown:
        dataset: object
        data: object
        overlaps: dict
        shapes: object

    shown: Any = Shown(data, checks.Report(), {}, type("Shapes", (), {"roles": {}}))
    assert of_experiment(shown)["provenance"]["outer"]["n"] == len(data.outer_part)


def test_parts_that_share_examples_are_found():
    assert not list(preflight.of_parts(split()))
    data = split()
    shared = data._replace(outer=data.held_out)
    texts = [finding.what for finding in preflight.of_parts(shared)]
    assert any("in the held_out and in the outer part" in text for text in texts)


@pytest.mark.parametrize("use", ["added", "alone"])
def test_a_baseline_can_train_on_the_outer_part(use):
    data = split()
    noisy = corrupt(data, label_noise=0.5, train_on_outer=use)
    want = ids(data.outer_part) | (ids(data.train) if use == "added" else set())
    assert ids(noisy.train) == want and ids(noisy.held_out) == ids(data.held_out)
    assert len(noisy.outer_part) == 0  # so that nothing can learn from it in another way
    rows = noisy.train.read(np.arange(len(noisy.train)))
    clean = dict(zip(*(f(data.outer_part).tolist() for f in OF_EXAMPLES), strict=True))
    for i, label, flag in zip(
        source.example_ids(noisy.train).tolist(), rows["label"], rows["label_noisy"], strict=True
    ):
        assert i not in clean or (clean[i] == label and flag == 0)
    assert rows["label_noisy"].any() == (use == "added")
    np.testing.assert_array_equal(rows["label"], source.example_labels(noisy.train))


OF_EXAMPLES = source.example_ids, source.example_labels


def test_joined_sources_give_the_rows_of_both():
    data = split()
    both = source.Joined(data.train, data.outer_part)
    n = len(data.train)
    at = np.array([n + 3, 0, n - 1, n, 5])
    rows = both.read(at)
    for j, i in enumerate(at):
        one = data.train.read(np.array([i])) if i < n else data.outer_part.read(np.array([i - n]))
        np.testing.assert_array_equal(rows["input"][j], one["input"][0])
        assert rows["label"][j] == one["label"][0]
    assert len(both) == both.provenance.n == n + len(data.outer_part)
    assert both.provenance.sha256 != data.train.provenance.sha256


@pytest.mark.parametrize(
    "outer, use, word", [(0.5, "addded", "did you mean 'added'"), (0.0, "added", "data.outer")]
)
def test_wrong_uses_are_refused(outer, use, word):
    with pytest.raises(ConfigError, match=word):
        corrupt(split(outer), train_on_outer=use)


@pytest.mark.parametrize(
    "overrides, share",
    [
        ({}, 0.5),
        ({"data.outer": 0.25}, 0.25),
        ({"data.outer": 0.0}, 0.0),
        ({"weighting.control": "shuffled"}, 0.5),
        ({"weighting.control": "joint"}, 0.0),
        ({"weighting.control": "frozen"}, 0.0),
        ({"weighting.name": "wsl", "roles.weighting": None}, 0.0),
        ({"weighting.name": "reweight", "roles.weighting": None}, 0.5),
    ],
)
def test_a_share_is_taken_where_a_weighting_learns(overrides, share):
    config = config_lib.override(flags.load(TGEO), overrides)
    data = data_lib.load_dataset(config, shapes_only=True)
    whole = data_lib.load_dataset(config_lib.override(config, {"data.outer": 0.0}))
    n = 0 if data.outer is None else len(data.outer_part)
    assert n == pytest.approx(share * len(whole.held_out), abs=4) and bool(n) == bool(share)


def test_stored_configs_without_the_key_keep_one_part():
    stored = {"data": {"held_out": 0.1}, "study": {"arms": {"a": {"data": {"held_out": 0.2}}}}}
    found = old_configs.convert(stored)
    assert found["data"]["outer"] == 0.0
    assert found["study"]["arms"]["a"]["data"] == {"held_out": 0.2}
    assert old_configs.convert({"data": {"outer": None}})["data"]["outer"] is None
