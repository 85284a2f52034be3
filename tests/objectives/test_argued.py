"""Arguments and ensembles of weak networks against transcriptions in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ArgumentError
from distill_jax.losses.arguments import arguments
from distill_jax.objectives import argued, argued_to_strong
from tests.reference import cross_entropy, draw, log_softmax, softmax

X, W = np.abs(draw(5, 4, 4, 1)), draw(16, 2, seed=1)


def logits_of(x):
    return x.reshape(x.shape[0], -1) @ W


def shown(x, column, pixels):
    """The pixels with the largest share in a linear logit; others are 0."""
    flat = x.reshape(len(x), -1)
    worth = flat * W[:, column].T
    kept = np.argsort(-worth, axis=1)[:, :pixels]
    out = np.zeros_like(flat)
    np.put_along_axis(out, kept, np.take_along_axis(flat, kept, 1), 1)
    return out.reshape(x.shape)


def test_arguments_are_the_pixels_that_speak_for_a_class():
    with jax.enable_x64(True):
        both = arguments(logits_of, jnp.asarray(X), pixels=3, sides="both")
        own = arguments(logits_of, jnp.asarray(X), pixels=3, sides="own")
        answer = arguments(logits_of, jnp.asarray(X), pixels=3, sides="answer")
        none = arguments(logits_of, jnp.asarray(X), pixels=3, sides="neither")
    want = [X, shown(X, 0, 3), shown(X, 1, 3)]
    np.testing.assert_allclose(both, np.concatenate(want, -1))
    top = logits_of(X).argmax(1)
    chosen = np.where(top[:, None, None, None] == 1, want[2], want[1])
    np.testing.assert_allclose(own, np.concatenate([X, chosen], -1))
    np.testing.assert_allclose(answer[:, 0, 3, 1:], softmax(logits_of(X)))
    np.testing.assert_array_equal(none, X)


def nets(role, x, train=False):
    if role == "teacher_arguer":
        return {"logits": logits_of(x)}, {}
    kernel = draw(x[0].size, 2, seed={"student": 2, "teacher": 3, "teacher2": 4}[role])
    return {"logits": x.reshape(x.shape[0], -1) @ kernel}, {}


def test_the_weak_network_learns_labels_from_arguments():
    label = np.arange(5) % 2
    batch = {"input": jnp.asarray(X), "label": label, "mask": np.ones(5)}
    with jax.enable_x64(True):
        got = argued.make(pixels=2).loss(nets, batch, {}, jnp.int32(0))
    seen = np.concatenate([X, shown(X, 0, 2), shown(X, 1, 2)], -1)
    want = cross_entropy(nets("student", seen)[0]["logits"], label)
    np.testing.assert_allclose(got.values["cross_entropy"], want, atol=1e-12)


def test_weak_labels_are_the_mean_of_the_teachers():
    made = argued_to_strong.make(teachers=("teacher", "teacher2"), pixels=(2, 5), alpha=0.0, ramp=0)

    def called(role, x, train=False):
        return nets(role, x) if role != "student" else ({"logits": jnp.asarray(draw(5, 2))}, {})

    batch = {"input": jnp.asarray(X), "label": np.zeros(5, int), "mask": np.ones(5)}
    with jax.enable_x64(True):
        got = made.loss(called, batch, {}, jnp.int32(0))
    seen = [np.concatenate([X, shown(X, 0, n), shown(X, 1, n)], -1) for n in (2, 5)]
    said = [
        softmax(nets(role, x)[0]["logits"]) for role, x in zip(made.teachers, seen, strict=True)
    ]
    want = -((said[0] + said[1]) / 2 * log_softmax(draw(5, 2))).sum(1)
    np.testing.assert_allclose(got.values["weak_labels"], want)


@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        (argued.make, {"sides": "mine"}),
        (argued_to_strong.make, {"sides": "mine", "ramp": 0}),
        (argued_to_strong.make, {"pixels": (1, 2), "ramp": 0}),
    ],
)
def test_wrong_arguments_are_named(make, kwargs):
    with pytest.raises(ArgumentError, match=next(iter(kwargs))):
        make(**kwargs)
