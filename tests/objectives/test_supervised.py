"""Supervised loss against a NumPy transcription."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.losses.classification import cross_entropy, soft_cross_entropy
from distill_jax.objectives import supervised
from tests import harness
from tests.reference import log_softmax

LOGITS = np.array([[2.0, -1.0, 0.5], [0.1, 0.2, -3.0], [-1.0, 4.0, 1.0], [0.0, 0.0, 0.0]])
LABEL = np.array([0, 2, 1, 1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy(smoothing):
    target = (1 - smoothing) * np.eye(3)[LABEL] + smoothing / 3
    want = -(target * log_softmax(LOGITS)).sum(1)
    got = cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABEL), smoothing=smoothing)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_mixed_labels():
    probs = np.array([[0.7, 0.3, 0.0], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0], [0.2, 0.2, 0.6]])
    want = -((0.9 * probs + 0.1 / 3) * log_softmax(LOGITS)).sum(1)
    got = soft_cross_entropy(jnp.asarray(LOGITS), jnp.asarray(probs), smoothing=0.1)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_mixed_labels_replace_class_ids():
    batch = harness.make_batch(mixed=True)
    made = harness.setup("supervised", batch=batch)
    model = harness.role_model("student")

    @jax.jit
    def step(batch):
        state = made.init(jax.random.key(0))
        outputs, _ = model.apply(state.params["student"], {}, batch["input"], train=True, rngs={})
        return outputs["logits"], made.step(state, {}, batch, jax.random.key(0))[1]

    logits, metrics = jax.device_get(step(batch))
    want = -(np.asarray(batch["label_probs"]) * log_softmax(logits)).sum(1).mean()
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)


def test_smoothing_is_checked():
    with pytest.raises(ConfigError, match=r"label_smoothing is 1\.5"):
        supervised.make(label_smoothing=1.5)
