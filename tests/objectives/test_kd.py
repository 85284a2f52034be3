"""Distillation against a NumPy transcription of Hinton et al. 2015, section 2.1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core import state
from distill_jax.core.errors import ArgumentError, ConfigError
from distill_jax.losses.classification import (
    cross_entropy,
    distillation_kl,
    soft_cross_entropy,
    softmax_cross_entropy,
)
from distill_jax.losses.logits import teacher_cross_entropy
from distill_jax.objectives import kd
from tests import harness
from tests.reference import softmax

STUDENT = np.array([[2.0, -1.0, 0.5], [0.1, 0.2, -3.0], [-1.0, 4.0, 1.0]])
TEACHER = np.array([[1.0, 0.0, -0.5], [3.0, -0.2, 1.0], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distillation_kl(temperature):
    p, q = softmax(TEACHER / temperature), softmax(STUDENT / temperature)
    want = temperature**2 * (p * np.log(p / q)).sum(1)
    got = distillation_kl(jnp.asarray(STUDENT), jnp.asarray(TEACHER), temperature=temperature)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_gradient_is_the_difference_of_probabilities():
    """At T = 1, d KL / d student logits = softmax(student) - softmax(teacher)."""
    grad = jax.grad(lambda s: distillation_kl(s, jnp.asarray(TEACHER), temperature=1.0).sum())
    want = softmax(STUDENT) - softmax(TEACHER)
    np.testing.assert_allclose(grad(jnp.asarray(STUDENT)), want, atol=1e-6)


def plain_cross_entropy(z):
    return -jax.nn.log_softmax(z)[np.arange(3), np.array([2, 0, 1])]


def plain_soft_cross_entropy(z, w):
    return -(w * jax.nn.log_softmax(z)).sum(-1)


def plain_smoothed_cross_entropy(z):
    return 0.8 * plain_cross_entropy(z) - 0.2 * jax.nn.log_softmax(z).mean(-1)


@pytest.mark.parametrize("order", ["reverse", "forward over reverse", "reverse over reverse"])
@pytest.mark.parametrize(
    ("loss", "plain"),
    [
        (
            lambda p, q: cross_entropy(p, jnp.array([2, 0, 1])) * q.sum(1),
            lambda p, q: plain_cross_entropy(p) * q.sum(1),
        ),
        (softmax_cross_entropy, plain_soft_cross_entropy),
        (
            lambda p, q: softmax_cross_entropy(p, jnp.asarray(STUDENT)) * q.sum(1),
            lambda p, q: plain_soft_cross_entropy(p, STUDENT) * q.sum(1),
        ),
        (
            lambda p, q: softmax_cross_entropy(jnp.asarray(TEACHER), q) * p.sum(1),
            lambda p, q: plain_soft_cross_entropy(TEACHER, q) * p.sum(1),
        ),
        (
            lambda p, q: cross_entropy(p, jnp.array([2, 0, 1]), smoothing=0.2) * q.sum(1),
            lambda p, q: plain_smoothed_cross_entropy(p) * q.sum(1),
        ),
        (
            lambda p, q: teacher_cross_entropy(q, p, temperature=3.0),
            lambda p, q: 9 * plain_soft_cross_entropy(q / 3, jax.nn.softmax(p / 3)),
        ),
    ],
    ids=[
        "labels",
        "soft labels",
        "logits of soft labels",
        "soft labels alone",
        "smoothing",
        "teacher",
    ],
)
def test_written_derivatives_are_those_of_autodiff(loss, plain, order):
    at = jnp.asarray(TEACHER, jnp.float32), jnp.asarray(STUDENT, jnp.float32)
    along = jnp.cos(at[0]), jnp.sin(3 * at[1])
    weights = jnp.array([0.5, -1.0, 2.0])

    def derivative(f):
        total = lambda p, q: (weights * f(p, q)).sum()  # noqa: E731
        gradient = jax.grad(total, (0, 1))
        if order == "reverse":
            return gradient(*at)
        if order == "forward over reverse":
            return jax.jvp(gradient, at, along)[1]
        return jax.grad(
            lambda p, q: sum((g * v).sum() for g, v in zip(gradient(p, q), along, strict=True)),
            (0, 1),
        )(*at)

    for got, want in zip(derivative(loss), derivative(plain), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


def labelled(p, q):
    return cross_entropy(p, jnp.array([0, 4, 2, 1]).reshape(p.shape[:-1])) * q.sum(-1)


@pytest.mark.parametrize("loss", [softmax_cross_entropy, labelled])
def test_derivatives_do_not_depend_on_the_axes_before_the_classes(loss):
    p, q = (jax.random.normal(jax.random.key(i), (2, 2, 5)) for i in range(2))
    gradient = jax.grad(lambda p, q: loss(p, q).sum(), (0, 1))
    for got, want in zip(gradient(p, q), gradient(*(x.reshape(4, 5) for x in (p, q))), strict=True):
        np.testing.assert_allclose(got.reshape(4, 5), want, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "copies"),
    [
        (lambda z, t, y: cross_entropy(z, y), 1),
        (lambda z, t, y: cross_entropy(z, y, smoothing=0.1), 1),
        (lambda z, t, y: soft_cross_entropy(z, t), 2),
        (lambda z, t, y: soft_cross_entropy(z, t, smoothing=0.1), 2),
        (lambda z, t, y: teacher_cross_entropy(z, t, temperature=4.0), 2),
        (lambda z, t, y: distillation_kl(z, t, temperature=4.0), 2),
    ],
    ids=["labels", "smoothing", "soft labels", "smoothed soft labels", "teacher", "divergence"],
)
def test_gradient_has_no_array_of_the_logits_beside_their_casts(loss, copies):
    assert harness.copies_of_logits(loss) < copies + 0.1


def test_extreme_logits_stay_finite():
    far = jnp.array([[1e4, -1e4, 0.0]])
    value, grad = jax.value_and_grad(lambda s: distillation_kl(s, -far, temperature=1.0).sum())(far)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


def test_soft_cross_entropy_does_not_lose_digits_far_from_zero():
    z, w = jnp.asarray(STUDENT, jnp.float32), jax.nn.softmax(jnp.asarray(TEACHER, jnp.float32))
    far = z + 2.0**13
    near = far - 2.0**13  # rounded as they are
    np.testing.assert_allclose(soft_cross_entropy(far, w), soft_cross_entropy(near, w), rtol=1e-6)


def test_ratio_and_temperature():
    made = harness.setup("kd")
    objective = kd.make(alpha=0.3, temperature=2.0)
    batch = harness.make_batch()
    current = made.init(jax.random.key(0))
    model = harness.role_model("student")
    s = model.apply(current.params["student"], {}, batch["input"], train=True, rngs={})[0]
    t = model.apply(*made.frozen["teacher"], batch["input"], train=False, rngs={})[0]

    def nets(role, *inputs, train=False, stop_gradient_params=False):
        del inputs, train, stop_gradient_params
        return (s, {}) if role == "student" else (t, {})

    terms = objective.loss(nets, batch, {}, jnp.int32(0))
    loss = sum(terms.coef[k] * v.mean() for k, v in terms.values.items())
    zs, zt = np.asarray(s["logits"], np.float64), np.asarray(t["logits"], np.float64)
    ce = -np.log(softmax(zs)[np.arange(16), np.asarray(batch["label"])])
    p, q = softmax(zt / 2), softmax(zs / 2)
    want = 0.7 * ce.mean() + 0.3 * 4 * (p * np.log(p / q)).sum(1).mean()
    np.testing.assert_allclose(loss, want, rtol=1e-5)


@pytest.mark.parametrize(
    "kwargs", [{"alpha": 1.5}, {"temperature": 0.0}, {"label_smoothing": -1.0}]
)
def test_hyperparameters_are_checked(kwargs):
    with pytest.raises(ConfigError, match=next(iter(kwargs))):
        kd.make(**kwargs)


def test_class_mismatch_is_refused_on_shapes():
    def narrow():
        model = harness.tiny_model()

        def apply(params, st, x, *, train, rngs):
            out, st = model.apply(params, st, x, train=train, rngs=rngs)
            return {"logits": out["logits"][:, :3]}, st

        return model._replace(apply=apply)

    models = {"student": harness.tiny_model(), "teacher": narrow()}
    with pytest.raises(ConfigError, match="teacher has 3 classes and the student 5"):
        state.infer_shapes(kd.make(), models, harness.make_batch())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda x: distillation_kl(x, x, temperature=0.0), "temperature: temperature is 0.0"),
        (lambda x: distillation_kl(x, x[:, :2], temperature=1.0), "teacher has 2 classes"),
        (lambda x: cross_entropy(x, x[:, 0]), "label: label has type float32"),
    ],
)
def test_wrong_arguments_of_losses_are_named(loss, message):
    with pytest.raises(ArgumentError, match=message):
        loss(np.zeros((4, 3), np.float32))
