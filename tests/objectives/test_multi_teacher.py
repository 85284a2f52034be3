"""Several teachers against NumPy transcriptions, and CA-MKD's weights (Zhang et al. 2022)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.core.means import mean_loss
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.objectives import multi_teacher
from distill_jax.weighting import trilateral
from tests import harness
from tests.reference import softmax

K, B, TEACHERS = harness.K, 6, ("teacher1", "teacher2", "teacher3")
R = np.random.RandomState(0)
LABEL = R.randint(0, K, B)
SAID = {role: 2 * R.randn(B, K) for role in TEACHERS}
STUDENT = R.randn(B, K)
BATCH = {"input": None, "label": jnp.asarray(LABEL), "mask": jnp.ones(B)}


def value_and_grad(objective):
    def loss(student):
        said = {**{role: jnp.asarray(z) for role, z in SAID.items()}, "student": student}
        terms = objective.loss(
            lambda role, *_, **__: ({"logits": said[role]}, {}), BATCH, {}, jnp.int32(0)
        )
        return mean_loss(terms, BATCH["mask"])[0]

    return jax.device_get(jax.jit(jax.value_and_grad(loss))(STUDENT))


def transcription(weights_of, *, t, kd=1.0, label=1.0):
    """Loops over examples and teachers; the gradient of a KL is T (student_T - teacher_T)."""
    loss, grad = 0.0, np.zeros((B, K))
    for i in range(B):
        p, q = softmax(STUDENT[i]), softmax(STUDENT[i] / t)
        loss += label * -np.log(p[LABEL[i]]) / B
        grad[i] += label * (p - np.eye(K)[LABEL[i]]) / B
        for role, w in zip(TEACHERS, weights_of(i), strict=True):
            target = softmax(SAID[role][i] / t)
            loss += kd * w * t**2 * (target * np.log(target / q)).sum() / B
            grad[i] += kd * w * t * (q - target) / B
    return loss, grad


def check(objective, weights_of, **kwargs):
    with jax.enable_x64(True):
        got = value_and_grad(objective)
    for a, b in zip(got, transcription(weights_of, **kwargs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-12)


def test_fixed_weights():
    made = multi_teacher.make(
        teachers=TEACHERS, weights=(1, 3, 4), distillation_weight=0.7, temperature=2.0
    )
    check(made, lambda i: (0.125, 0.375, 0.5), t=2.0, kd=0.7)


def test_confidence_is_the_published_rule():
    def weights(i):
        losses = [-np.log(softmax(SAID[role][i])[LABEL[i]]) for role in TEACHERS]
        total = sum(np.exp(x) for x in losses)
        return [(1 - np.exp(x) / total) / 2 for x in losses]

    made = multi_teacher.make(teachers=TEACHERS, combination="confidence", label_weight=0.5)
    check(made, weights, t=4.0, label=0.5)


def test_equal_weights_have_the_gradient_of_the_mean_of_probabilities():
    with jax.enable_x64(True):
        made = multi_teacher.make(teachers=TEACHERS, label_weight=0.0, temperature=3.0)
        grad = value_and_grad(made)[1]
    for i in range(B):
        mean = sum(softmax(SAID[role][i] / 3) for role in TEACHERS) / 3
        want = 3 * (softmax(STUDENT[i] / 3) - mean) / B
        np.testing.assert_allclose(grad[i], want, rtol=1e-7, atol=1e-12)


def test_mean_of_logits():
    with jax.enable_x64(True):
        made = multi_teacher.make(
            teachers=TEACHERS, combination="logits", weights=(1, 1, 2), label_weight=0.0
        )
        loss, grad = value_and_grad(made)
    want = 0.0
    for i in range(B):
        mean = (SAID["teacher1"][i] + SAID["teacher2"][i] + 2 * SAID["teacher3"][i]) / 4
        p, q = softmax(mean / 4), softmax(STUDENT[i] / 4)
        want += 16 * (p * np.log(p / q)).sum() / B
        np.testing.assert_allclose(grad[i], 4 * (q - p) / B, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(loss, want, rtol=1e-7)


def test_a_weigher_can_weigh_each_teacher():
    objective = multi_teacher.make(combination="confidence")
    weighted = WeightedObjective(
        objective=objective,
        weighting=trilateral.make(blocks=("st", "tg")),
        loss_terms=("cross_entropy", "distillation/teacher1", "distillation/teacher2"),
        num_classes=K,
    )
    with pytest.raises(ConfigError, match="no loss term 'distillation/teacher3'"):
        bad = WeightedObjective(
            objective=objective, weighting=weighted.weighting, loss_terms=("distillation/teacher3",)
        )
        harness.state.infer_shapes(bad, _models(bad), harness.make_batch())
    terms = harness.state.infer_shapes(weighted, _models(weighted), harness.make_batch()).terms
    assert set(terms.weights) == set(weighted.loss_terms)
    assert not terms.coef


def _models(weighted):
    weighting = harness.importlib.import_module("distill_jax.models.ratio_mlp")
    made = {role: harness.role_model(role) for role in weighted.objective.roles}
    return {**made, "weighting": weighting.make(outputs=2, hidden=(4,))}


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"teachers": ("teacher1", "teacher1")}, "teachers are"),
        ({"teachers": ("teacher1",), "combination": "confidence"}, "teachers are"),
        ({"weights": (1.0,)}, "weights are"),
        ({"weights": (1.0, 2.0), "combination": "confidence"}, "weights are"),
        ({"combination": "confident"}, "unknown combination"),
    ],
)
def test_mistakes_are_refused(kwargs, match):
    with pytest.raises(ConfigError, match=match):
        multi_teacher.make(**kwargs)
