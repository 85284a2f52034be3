"""Label sources and difficulties against transcriptions of their formulas in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ArgumentError
from distill_jax.data import attribute_digits, counting
from distill_jax.evaluators import attributes
from distill_jax.losses import item_response, targets
from tests.reference import difference, draw, softmax


def test_confidence_of_words_is_its_formula():
    random = np.random.default_rng(0)
    counts, labels, k = random.integers(0, 4, (30, 6)), np.arange(30) % 3, 3
    counts[:, 5] = 0
    made = counting.fit(counts, labels, num_classes=k, sanction=2.0)
    lv = np.zeros((6, k))
    for c in range(k):
        total = [int(counts[labels == c][:, w].sum()) for w in range(6)]
        for w in range(6):
            lv[w, c] = (total[w] / max(total)) ** 0.45 if total[w] else 0
    for w in range(5):
        middle = sorted(lv[w])[1]
        mad = sorted(abs(x - middle) for x in lv[w])[1]
        sg = [(math.tanh(4 * (x - middle) / (0.5 * mad) - 2) + 1) / 2 for x in lv[w]]
        for c in range(k):
            others = sum(sg) - sg[c]
            sn = ((k - 1 - others) / ((k - 1) * (others + 1))) ** 2
            assert np.isclose(made.confidence[w, c], lv[w, c] * sg[c] * sn), (w, c)
    np.testing.assert_array_equal(made.confidence[5], 0)
    np.testing.assert_allclose(made.scores(counts), counts @ made.confidence)


def test_posterior_of_answers_and_its_gradient():
    right, known = np.array([[1, 0, 1], [0, 0, 1.0]]), np.array([[1, 1, 0], [1, 1, 1.0]])
    theta, b, s = draw(2), draw(3, seed=1), draw(3, seed=2)

    def want(theta):
        value = (theta**2).sum() / 2 + (b**2).sum() / 2 + (s**2).sum() / 2 / 0.25
        for i, j in np.argwhere(known):
            p = 1 / (1 + math.exp(-math.exp(s[j]) * (theta[i] - b[j])))
            value -= math.log(p if right[i, j] else 1 - p)
        return value

    with jax.enable_x64(True):
        args = [jnp.asarray(x) for x in (theta, b, s, right, known)]
        value, gradient = jax.value_and_grad(item_response.negative_log_posterior)(*args)
    np.testing.assert_allclose(value, want(theta))
    np.testing.assert_allclose(gradient, difference(want, theta), rtol=1e-6)


@pytest.mark.parametrize("slopes", [False, True])
def test_difficulties_are_found_again(slopes):
    random = np.random.default_rng(0)
    theta, b = random.normal(size=60), random.normal(size=40)
    a = np.exp(0.5 * random.normal(size=40)) if slopes else np.ones(40)
    p = 1 / (1 + np.exp(-a * (theta[:, None] - b)))
    found = item_response.fit(random.random(p.shape) < p, slopes=slopes, steps=300)
    assert np.corrcoef(found.difficulty, b)[0, 1] > 0.9
    assert np.corrcoef(found.ability, theta)[0, 1] > 0.85
    if slopes:
        assert np.corrcoef(np.log(found.discrimination), np.log(a))[0, 1] > 0.3
    else:
        np.testing.assert_array_equal(found.discrimination, 1)


def test_debiased_labels():
    p, blank = softmax(draw(6, 3)), softmax(draw(3, seed=1))
    got = targets.debiased(jnp.asarray(p), jnp.asarray(blank))
    want = np.array([[max(x - y + 1 / 3, 0) for x, y in zip(row, blank, strict=True)] for row in p])
    np.testing.assert_allclose(got, want / want.sum(1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(targets.debiased(blank[None], jnp.asarray(blank)), [[1 / 3] * 3])


def test_digits_are_recognized_by_their_segments():
    digit = np.arange(40) % 10
    labels = attribute_digits.SIGNATURES[digit]
    assert len({tuple(row) for row in attribute_digits.SIGNATURES}) == 10
    logits, unseen = draw(40, 7) + 2 * labels - 1, np.isin(digit, (3, 8))
    batch = {"label": labels, "digit": digit, "unseen": unseen.astype(np.int32)}
    got = attributes.make()({"student": {"logits": logits}}, batch)
    p = 1 / (1 + np.exp(-logits))

    def named(row, among):
        bits = attribute_digits.SIGNATURES
        return max(among, key=lambda c: np.prod(np.where(bits[c] > 0, row, 1 - row)))

    hits = [named(p[i], (3, 8)) == digit[i] for i in np.flatnonzero(unseen)]
    assert np.isclose(got["zero_shot_accuracy"], np.mean(hits)) and got["zero_shot_chance"] == 0.5
    hits = [named(row, range(10)) == d for row, d in zip(p, digit, strict=True)]
    assert np.isclose(got["all_classes_accuracy"], np.mean(hits)) and 0 < np.mean(hits) < 1


def test_unseen_digits_are_in_the_test_part_alone():
    pytest.importorskip("sklearn")
    made = attribute_digits.make(unseen=3, split_seed=2)
    rows = {name: part.read(np.arange(len(part))) for name, part in made.parts.items()}
    assert not rows["train"]["unseen"].any() and not rows["held_out"]["unseen"].any()
    test = rows["test"]
    assert len(np.unique(test["digit"][test["unseen"] > 0])) == 3
    np.testing.assert_array_equal(test["label"], attribute_digits.SIGNATURES[test["digit"]])
    dealt = attribute_digits.make(unseen=3, split_seed=2, shuffled=True).test
    dealt = dealt.read(np.arange(len(dealt)))
    assert (dealt["label"] != test["label"]).any()


@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        (attribute_digits.make, {"unseen": 9}),
        (
            lambda **k: counting.fit(np.ones((2, 2)), np.arange(2), num_classes=2, **k),
            {"smoothness": 0},
        ),
        (lambda **k: item_response.fit(jnp.ones((2, 2)), **k), {"steps": 0}),
    ],
)
def test_wrong_arguments_are_named(make, kwargs):
    with pytest.raises(ArgumentError, match=next(iter(kwargs))):
        make(**kwargs)
