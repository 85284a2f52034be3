"""Lists of digits: parts are disjoint by image, relevance by class, the first stage's fit."""

import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.data import digit_lists, digits

SMALL = {"lists": 40, "measured": 30, "candidates": 6}


@pytest.fixture(scope="module")
def made():
    return digit_lists.make(split_seed=3, **SMALL)


def test_parts_share_no_image(made):
    used = [set(part.rows.ravel().tolist()) for part in (made.train, made.held_out, made.test)]
    assert not used[0] & used[1] and not used[0] & used[2] and not used[1] & used[2]
    assert all(len(set(row)) == 7 for row in made.train.rows.tolist())
    assert [len(part) for part in made.parts.values()] == [40, 30, 30]


def test_relevance_is_nearness_of_the_classes(made):
    whole = digits.make(held_out=0.0)
    rows = [part.read(np.arange(len(part))) for part in (whole.train, whole.test)]
    digit = np.concatenate([row["label"] for row in rows])
    images = np.concatenate([row["input"] for row in rows]).reshape(-1, 64) / 255
    read = made.test.read(np.array([4, 1]))
    for i, row in zip((0, 1), made.test.rows[[4, 1]], strict=True):
        wanted = [max(0, 3 - abs(int(digit[row[0]]) - int(digit[c]))) for c in row[1:]]
        np.testing.assert_array_equal(read["label"][i], wanted)
        np.testing.assert_allclose(read["input"]["query"][i], images[row[0]], rtol=1e-6)
        np.testing.assert_allclose(read["input"]["candidates"][i], images[row[1:]], rtol=1e-6)
    assert read["input"]["candidates"].dtype == np.float32 and made.task == "regression"


def test_the_first_stage_is_the_least_squares_form():
    r = np.random.default_rng(0)
    images, digit = r.integers(0, 256, (40, 8, 8, 1)), r.integers(0, 10, 40)
    x = digits.pooled(images)
    target = np.maximum(0, 3 - np.abs(digit[:, None] - digit[None])).ravel()
    pairs = np.einsum("ip,jq->ijpq", x, x).reshape(1600, 256)
    wanted = np.linalg.lstsq(pairs, target, rcond=None)[0].reshape(16, 16)
    found = digit_lists.first_stage(images, digit, ridge=0.0)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-8)


def test_seeds_and_arguments(made):
    again = digit_lists.make(split_seed=3, **SMALL)
    assert again.train.provenance == made.train.provenance
    other = digit_lists.make(split_seed=4, **SMALL)
    assert other.train.provenance.sha256 != made.train.provenance.sha256
    for name, value in {"lists": 0, "measured": -1, "candidates": 1, "split_seed": -1}.items():
        with pytest.raises(ConfigError, match=f"{name} is {value}"):
            digit_lists.make(**{name: value})
