"""Divergences of softmaxes: values, and written derivatives against those of autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ArgumentError
from distill_jax.losses.divergences import DIVERGENCES, softmax_divergence
from distill_jax.losses.logits import decoupled_kl, jensen_shannon, reverse_kl
from tests import harness

SHARE = 0.2
TEACHER = np.array([[1.0, 0.0, -0.5], [3.0, -0.2, 1.0], [0.0, 0.0, 0.0]], np.float32)
STUDENT = np.array([[2.0, -1.0, 0.5], [0.1, 0.2, -3.0], [-1.0, 4.0, 1.0]], np.float32)


def entropy(log_p, log_q):
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def mean(log_p, log_q, share):
    return jnp.log((1 - share) * jnp.exp(log_p) + share * jnp.exp(log_q))


PLAIN = {
    "forward": entropy,
    "reverse": lambda p, q: entropy(q, p),
    "jeffreys": lambda p, q: (entropy(p, q) + entropy(q, p)) / 2,
    "skew_forward": lambda p, q: entropy(p, mean(q, p, SHARE)),
    "skew_reverse": lambda p, q: entropy(q, mean(p, q, SHARE)),
    "jensen_shannon": lambda p, q: (
        (1 - SHARE) * entropy(p, mean(p, q, SHARE)) + SHARE * entropy(q, mean(p, q, SHARE))
    ),
}


@pytest.mark.parametrize("order", ["reverse", "forward over reverse", "reverse over reverse"])
@pytest.mark.parametrize("changing", ["both", "teacher", "student"])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_written_derivatives_are_those_of_autodiff(kind, changing, order):
    pair = jnp.asarray(TEACHER), jnp.asarray(STUDENT)
    axes = {"both": (0, 1), "teacher": (0,), "student": (1,)}[changing]
    at = tuple(pair[axis] for axis in axes)
    along = tuple(jnp.sin(3 * x) for x in at)
    weights = jnp.array([0.5, -1.0, 2.0])

    def derivative(f):
        def total(*given):
            p, q = (given[axes.index(i)] if i in axes else pair[i] for i in (0, 1))
            return (weights * f(p, q)).sum()

        gradient = jax.grad(total, tuple(range(len(axes))))
        if order == "reverse":
            return gradient(*at)
        if order == "forward over reverse":
            return jax.jvp(gradient, at, along)[1]
        return jax.grad(
            lambda *x: sum((g * v).sum() for g, v in zip(gradient(*x), along, strict=True)),
            tuple(range(len(axes))),
        )(*at)

    got = derivative(lambda p, q: softmax_divergence(kind, p, q, share=SHARE))
    want = derivative(lambda p, q: PLAIN[kind](jax.nn.log_softmax(p), jax.nn.log_softmax(q)))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_axes_before_the_classes_do_not_matter(kind):
    p, q = (jax.random.normal(jax.random.key(i), (2, 2, 5)) for i in range(2))

    def found(p, q):
        def total(p, q):
            return softmax_divergence(kind, p, q, share=SHARE).sum()

        return jax.value_and_grad(total, (0, 1))(p, q)

    value, gradient = found(p, q)
    flat, want = found(*(x.reshape(4, 5) for x in (p, q)))
    np.testing.assert_allclose(value, flat, rtol=1e-6)
    for one, other in zip(gradient, want, strict=True):
        np.testing.assert_allclose(one.reshape(4, 5), other, atol=1e-6)


@pytest.mark.parametrize("mask", [-np.inf, -1e9, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_how_a_class_is_made_impossible_does_not_matter(kind, mask):
    student, far = jnp.array([[1.0, 0.0, 0.5]]), jnp.array([[1.0, 0.0, mask]])

    def loss(p, q):
        return softmax_divergence(kind, p, q, share=SHARE).sum()

    found = jax.value_and_grad(loss, (0, 1))(far, student)
    want = jax.value_and_grad(loss, (0, 1))(far.at[0, 2].set(-jnp.inf), student)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_impossible_classes_count_for_nothing(kind):
    impossible = jnp.array([[False, True, False]])

    def loss(p, q):
        return softmax_divergence(kind, p, q, share=SHARE).sum()

    p, q = (jnp.where(impossible, -jnp.inf, jnp.asarray(x)) for x in (TEACHER, STUDENT))
    value, gradient = jax.value_and_grad(loss, (0, 1))(p, q)
    kept = np.array([0, 2])
    want, slopes = jax.value_and_grad(loss, (0, 1))(p[:, kept], q[:, kept])
    np.testing.assert_allclose(value, want, rtol=1e-6)
    for one, other in zip(gradient, slopes, strict=True):
        np.testing.assert_allclose(one[:, kept], other, atol=1e-6)
        np.testing.assert_array_equal(one[:, 1], 0)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_equal_softmaxes_have_no_divergence_and_no_slope(kind):
    value, slope = jax.value_and_grad(
        lambda q: softmax_divergence(kind, jnp.asarray(TEACHER), q, share=SHARE).sum()
    )(jnp.asarray(TEACHER) + 5)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(slope, 0, atol=1e-6)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_logits_far_apart_have_finite_derivatives(kind):
    far = jnp.array([[1e4, -1e4, 0.0]])
    value, slopes = jax.value_and_grad(
        lambda p, q: softmax_divergence(kind, p, q, share=SHARE).sum(), (0, 1)
    )(far, -far)
    assert np.isfinite(value)
    assert np.isfinite(np.stack(slopes)).all()


def decoupled(z, t, y):
    return sum(decoupled_kl(z, t, y, temperature=4.0))


@pytest.mark.parametrize(
    ("loss", "copies"),
    [
        (lambda z, t, y: jensen_shannon(z, t, temperature=4.0), 2),
        (lambda z, t, y: reverse_kl(z, t, temperature=4.0), 2),
        (decoupled, 4),
        *(
            (
                lambda z, t, y, kind=kind: softmax_divergence(kind, t, z),
                2 + (kind == "skew_forward"),
            )
            for kind in DIVERGENCES
        ),
    ],
    ids=["js", "reverse", "dkd", *(f"softmax {kind}" for kind in DIVERGENCES)],
)
def test_gradient_has_few_arrays_of_the_size_of_the_logits(loss, copies):
    assert harness.copies_of_logits(loss) < copies + 0.1


@pytest.mark.parametrize(
    ("kind", "share", "where"), [("revers", 0.5, "kind"), ("skew_forward", 1.0, "share")]
)
def test_wrong_arguments(kind, share, where):
    with pytest.raises(ArgumentError) as error:
        softmax_divergence(kind, jnp.zeros((1, 1)), jnp.zeros((1, 1)), share=share)
    assert error.value.where == where
