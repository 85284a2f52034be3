"""Weak-to-strong targets against NumPy transcriptions of Burns et al. 2023, section 4.3."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ArgumentError
from distill_jax.losses import targets
from distill_jax.objectives import weak_to_strong
from tests.reference import draw, log_softmax, softmax


def terms(made, student, teacher, step=99, **more):
    def nets(role, *_, **__):
        return {"logits": jnp.asarray({"student": student}.get(role, teacher))}, {}

    b = len(student)
    batch = {"input": None, "label": np.arange(b) % 2, "mask": np.ones(b), **more}
    return made.loss(nets, batch, {}, jnp.int32(step))


def of_class(z, positive):
    """One example's loss against a class: `-log p(class)`."""
    return -log_softmax(z)[np.arange(len(z)), positive.astype(int)]


def total(found):
    rows = sum(
        found.coef.get(n, 1) * np.asarray(found.weights.get(n, 1)) * np.asarray(v)
        for n, v in found.values.items()
    )
    return np.asarray(rows)


@pytest.mark.parametrize("step", [0, 9, 40])
@pytest.mark.parametrize("hard", [False, True])
def test_confidence_loss_of_two_classes(step, hard):
    with jax.enable_x64(True):
        made = weak_to_strong.make(alpha=0.6, ramp=20, hard=hard)
        student, teacher = draw(32, 2), 2 * draw(32, 2, seed=1) - [0.8, 0.0]
        got = total(terms(made, student, teacher, step))
    weak, p = softmax(teacher), softmax(student)[:, 1]
    weak = np.eye(2)[weak.argmax(1)] if hard else weak
    positive = p > np.quantile(p, 1 - weak[:, 1].mean())
    a = 0.6 * min(1, (step + 1) / 20)
    imitation = -(weak * log_softmax(student)).sum(1)
    np.testing.assert_allclose(got, (1 - a) * imitation + a * of_class(student, positive))
    assert abs(positive.mean() - weak[:, 1].mean()) < 1 / 32


def test_product_target():
    with jax.enable_x64(True):
        made = weak_to_strong.make(target="product", alpha=0.5, ramp=0)
        student, teacher = draw(8, 3), draw(8, 3, seed=1)
        got = terms(made, student, teacher)
    target = np.sqrt(softmax(student)) * softmax(teacher)
    target /= target.sum(1, keepdims=True)
    np.testing.assert_allclose(got.values["product"], -(target * log_softmax(student)).sum(1))


def test_three_classes_are_as_frequent_as_the_weak_labels_say():
    more = np.array([1.5, 0.0, -1.0])
    probs, weak = softmax(3 * draw(3000, 3)), softmax(draw(3000, 3, seed=1) + more)
    found = np.asarray(targets.hardened(*map(jnp.asarray, (probs, weak, np.ones(3000)))))
    assert set(found.sum(1)) == {1.0}
    np.testing.assert_allclose(found.mean(0), weak.mean(0), atol=0.05)
    plain = np.eye(3)[probs.argmax(1)].mean(0)
    assert np.abs(plain - weak.mean(0)).max() > 0.2


def test_padding_moves_no_quantile():
    x, real = draw(12), np.arange(12) < 7
    for share in (0.0, 0.37, 1.0):
        got = targets.masked_quantile(jnp.asarray(x), jnp.asarray(real), jnp.asarray(share))
        np.testing.assert_allclose(got, np.quantile(x[:7], share), rtol=1e-5)


def test_targets_have_no_gradient():
    def loss(z):
        found = terms(weak_to_strong.make(alpha=1.0, ramp=0), z, draw(6, 2, seed=1))
        return found.values["confidence"].sum()

    z = jnp.asarray(draw(6, 2), jnp.float32)
    own = targets.hardened(jax.nn.softmax(z), jax.nn.softmax(draw(6, 2, seed=1)), jnp.ones(6))
    np.testing.assert_allclose(jax.grad(loss)(z), jax.nn.softmax(z) - own, atol=1e-6)


def test_clean_labels_stand_beside_weak_ones():
    shown = np.arange(6) < 2
    made = weak_to_strong.make(alpha=0.0, ramp=0, label_weight=3.0)
    student, teacher = draw(6, 2), draw(6, 2, seed=1)
    got = total(terms(made, student, teacher, labelled=shown.astype(np.float32)))
    clean = 3 * of_class(student, np.arange(6) % 2)
    weak = -(softmax(teacher) * log_softmax(student)).sum(1)
    np.testing.assert_allclose(got, np.where(shown, clean, weak), rtol=1e-5)


@pytest.mark.parametrize(
    "kwargs", [{"target": "mean"}, {"alpha": 1.5}, {"ramp": "20 %", "total_steps": None}]
)
def test_wrong_arguments_are_named(kwargs):
    with pytest.raises(ArgumentError, match=next(iter(kwargs))):
        weak_to_strong.make(**{"ramp": 0, **kwargs})
