"""PS-KD against a NumPy transcription of Kim et al. 2021, eqs. 5 and 7, one example at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.losses.classification import cross_entropy
from tests import harness
from tests.reference import softmax

K, N = harness.K, harness.PROVIDED["num_examples"]


def objective(**kwargs):
    return harness.make_objective("ps_kd", **kwargs)


def total(made, logits, batch, memory, step):
    """The sum over real examples, and the memory after."""
    terms = made.loss(
        lambda role, *_, **__: ({"logits": logits}, {}), batch, memory, jnp.int32(step)
    )
    loss = sum(terms.coef[name] * (batch["mask"] * v).sum() for name, v in terms.values.items())
    return loss, terms.memory


@functools.partial(jax.jit, static_argnums=0)
def gradient(made, logits, batch, memory, step):
    fn = jax.value_and_grad(lambda z: total(made, z, batch, memory, step), has_aux=True)
    (loss, memory), grad = fn(logits)
    return loss, grad, memory


def batch_of(index, label, mask=None):
    return {
        "input": None,
        "index": np.array(index, np.int32),
        "label": np.array(label, np.int32),
        "mask": np.ones(len(index), np.float32) if mask is None else np.array(mask),
    }


def test_three_epochs_equal_the_transcription():
    """10 steps, 2 an epoch: alpha_t = 0.8 (t + 1) / 5; a row that is padding is never written."""
    with jax.enable_x64(True):
        made, rng = objective(alpha=0.8), np.random.RandomState(0)
        memory, table = made.memory(jax.random.key(0), {}), {}
        for step in range(6):
            index = [3, 9, 20] if step % 2 == 0 else [9, 40, 63]
            label, mask = [1, 4, 0], [1.0, 1.0, float(step != 1)]
            logits = rng.randn(3, K) * 2
            batch = batch_of(index, label, mask)
            loss, grad, memory = gradient(made, logits, batch, memory, step)
            alpha, want, want_grad = 0.8 * (step // 2 + 1) / 5, 0.0, np.zeros((3, K))
            for b in range(3):
                y, p = np.eye(K)[label[b]], softmax(logits[b])
                target = (1 - alpha) * y + alpha * table.get(index[b], y)
                want += mask[b] * -(target * np.log(p)).sum()
                want_grad[b] = mask[b] * (p - target)
            for b in range(3):
                if mask[b]:
                    table[index[b]] = softmax(logits[b])
            np.testing.assert_allclose(loss, want, rtol=1e-6)
            np.testing.assert_allclose(grad, want_grad, rtol=1e-5, atol=1e-7)
        assert memory["past"].dtype == jnp.float32
        expected = np.zeros((N, K))
        for i, row in table.items():
            expected[i] = row
        np.testing.assert_allclose(memory["past"], expected, rtol=1e-6)


def test_an_example_twice_in_a_batch_is_written_once_the_later():
    made = objective()
    logits = np.random.RandomState(1).randn(3, K).astype(np.float32)
    batch = batch_of([7, 5, 7], [0, 1, 0], [1.0, 1.0, 1.0])
    start = made.memory(jax.random.key(0), {})
    _, _, memory = gradient(made, logits, batch, start, 0)
    np.testing.assert_allclose(memory["past"][7], softmax(logits[2]), rtol=1e-5)
    padded = {**batch, "mask": np.array([1.0, 1.0, 0.0])}
    _, _, memory = gradient(made, logits, padded, start, 0)
    np.testing.assert_allclose(memory["past"][7], softmax(logits[0]), rtol=1e-5)


@pytest.mark.parametrize("table", ["label", "uniform"])
def test_controls_are_cross_entropy_and_label_smoothing_with_a_ramp(table):
    with jax.enable_x64(True):
        made, rng = objective(alpha=0.6, table=table), np.random.RandomState(2)
        batch = batch_of([0, 1, 2, 3], [2, 0, 4, 4])
        assert made.memory(jax.random.key(0), batch) == {}

        @functools.partial(jax.jit, static_argnums=1)
        @jax.value_and_grad
        def plain(z, smoothing):
            return cross_entropy(z, batch["label"], smoothing=smoothing).sum()

        for step in (0, 3, 9):
            logits = rng.randn(4, K)
            loss, grad, _ = gradient(made, logits, batch, {}, step)
            smoothing = 0.0 if table == "label" else 0.6 * (step // 2 + 1) / 5
            want, want_grad = plain(logits, smoothing)
            np.testing.assert_allclose(loss, want, rtol=1e-6 if table == "uniform" else 1e-7)
            np.testing.assert_allclose(grad, want_grad, rtol=1e-6, atol=1e-7)


def test_the_share_grows_by_epoch_and_ends_at_alpha():
    made = objective(alpha=0.5, total_steps=281, steps_per_epoch=4500 / 128)
    share = np.asarray(jax.jit(jax.vmap(made.share))(np.arange(281)))
    np.testing.assert_allclose(share[[0, 35, 36, 280]], [0.5 / 8, 0.5 / 8, 0.5 / 4, 0.5])
    assert len(np.unique(share)) == 8


def test_mistakes_are_refused():
    with pytest.raises(ConfigError, match="mixed example"):
        harness.setup("ps_kd", batch=harness.make_batch(mixed=True))
    with pytest.raises(ConfigError, match="alpha is 2"):
        objective(alpha=2.0)
    with pytest.raises(ConfigError, match="unknown table 'labels'"):
        objective(table="labels")
