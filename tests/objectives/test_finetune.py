"""Fine-tuning from a middle layer of a projector, and distillation of what came of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core import steps
from distill_jax.core.errors import ConfigError
from distill_jax.models import linear_head, projector
from tests import harness
from tests.reference import softmax


def network(params):
    """The tiny encoder, a layer of a projector and a head, in NumPy."""

    def apply(x):
        stage = x.reshape(-1, 3, 2, 3, 2, 1).swapaxes(2, 3).reshape(-1, 3, 3, 4)
        for layer in ("first", "second"):
            p = params["encoder"][layer]
            stage = np.tanh(stage @ p["kernel"] + p["bias"])
        x = stage.mean((1, 2))
        middle = params["projector"]["Dense_0"]
        x = np.maximum(x @ middle["kernel"] + middle["bias"], 0)
        return x @ params["head"]["kernel"] + params["head"]["bias"]

    return apply


def build():
    encoder = harness.tiny_convnet(head=False)
    middle, head = projector.make(features=0, hidden=(7,)), linear_head.make(num_classes=harness.K)
    batch, keys = harness.make_batch(), jax.random.split(jax.random.key(5), 3)
    params = {"encoder": encoder.init(keys[0], batch["input"])[0]}
    params["projector"] = middle.init(keys[1], jnp.zeros((1, 16)))[0]
    params["head"] = head.init(keys[2], jnp.zeros((1, 7)))[0]
    return {"encoder": encoder, "projector": middle, "head": head}, params, batch


def bind(models, params, names):
    models = {role: models[part] for role, part in names.items()}
    params = {role: params[part] for role, part in names.items()}
    return steps.BoundNets(models, params, {role: {} for role in names}, key=jax.random.key(0))


def test_finetuning_is_cross_entropy_behind_a_part_of_the_projector():
    models, params, batch = build()
    nets = bind(models, params, {"student": "encoder", "projector": "projector", "head": "head"})
    objective = harness.make_objective("finetune", projector=True)
    logits = network(jax.device_get(params))(np.asarray(batch["input"]))
    want = -np.log(softmax(logits)[np.arange(16), batch["label"]])
    terms = objective.loss(nets, batch, {}, jnp.int32(0))
    np.testing.assert_allclose(terms.values["cross_entropy"], want, rtol=1e-4)
    found = objective.predictions(nets, batch, {}, jnp.int32(0))["prediction"]["logits"]
    np.testing.assert_allclose(found, logits, atol=1e-5)


@pytest.mark.parametrize(("alpha", "temperature"), [(1.0, 1.0), (0.3, 2.0)])
def test_the_student_learns_from_the_chain(alpha, temperature):
    models, params, batch = build()
    models["student"] = harness.tiny_convnet()
    params["student"] = models["student"].init(jax.random.key(8), batch["input"])[0]
    names = {"teacher": "encoder", "teacher_projector": "projector", "teacher_head": "head"}
    nets = bind(models, params, {"student": "student", **names})
    objective = harness.make_objective(
        "simclr_v2", alpha=alpha, temperature=temperature, projector=True
    )
    terms = objective.loss(nets, batch, {}, jnp.int32(0))
    student = np.asarray(nets("student", batch["input"])[0]["logits"])
    teacher = network(jax.device_get(params))(np.asarray(batch["input"]))
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    want = temperature**2 * (p * np.log(p / q)).sum(1)
    np.testing.assert_allclose(terms.values["distillation"], want, rtol=1e-4, atol=1e-6)
    assert terms.coef["distillation"] == alpha
    assert ("cross_entropy" in terms.values) == (alpha < 1)


def test_mistakes_are_refused():
    with pytest.raises(ConfigError, match="alpha"):
        harness.make_objective("simclr_v2", alpha=0.0)
    with pytest.raises(ConfigError, match="width"):
        projector.make(features=0)
