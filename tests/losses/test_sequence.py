"""Divergences per token against NumPy in float64, over all tokens and over the most probable."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.losses import sequence

SHARE = 0.3


def entropy(p, q):
    """KL(p || q) over the last axis, 0 log 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * (np.log(p) - np.log(q)), 0).sum(-1)


ORACLES = {
    "forward": entropy,
    "reverse": lambda p, q: entropy(q, p),
    "jeffreys": lambda p, q: ((p - q) * (np.log(p) - np.log(q))).sum(-1) / 2,
    "skew_forward": lambda p, q: entropy(p, SHARE * p + (1 - SHARE) * q),
    "skew_reverse": lambda p, q: entropy(q, SHARE * q + (1 - SHARE) * p),
    "jensen_shannon": lambda p, q: (
        (1 - SHARE) * entropy(p, (1 - SHARE) * p + SHARE * q)
        + SHARE * entropy(q, (1 - SHARE) * p + SHARE * q)
    ),
}


def drawn(v=12, scale=2.0):
    """Logits of two networks `[2, 3, v]` and their softmaxes in float64."""
    logits = np.random.default_rng(0).normal(size=(2, 2, 3, v)) * scale
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return logits.astype(np.float32), p


def coarse(p, index):
    """Probabilities of some tokens, and of the rest."""
    kept = np.take_along_axis(p, index, -1)
    return np.concatenate([kept, 1 - kept.sum(-1, keepdims=True)], -1)


def test_every_divergence_has_an_oracle():
    assert set(ORACLES) == set(sequence.DIVERGENCES)


@functools.cache
def found():
    """All divergences over all tokens, over 4 of 12, over 4 of 5, and their sure gradients."""

    def sparse(logits, kind, student=None):
        teacher = sequence.top_log_probs(logits[0], 4)
        student = logits[1] if student is None else student
        asked = jnp.take_along_axis(jax.nn.log_softmax(student), teacher.index, -1)
        return sequence.sparse_divergence(kind, teacher, asked, share=SHARE)

    def dense(logits, kind):
        return sequence.token_divergence(kind, *jax.nn.log_softmax(logits), share=SHARE)

    def sure(logits, kind):
        return jax.value_and_grad(lambda s: sparse(logits, kind, s).sum())(logits[1])

    @jax.jit
    def every(many, few, certain):
        return {
            kind: (
                dense(many, kind),
                sparse(many, kind),
                dense(few, kind),
                sparse(few, kind),
                sure(certain, kind),
            )
            for kind in ORACLES
        }

    certain = jnp.array([[[[60.0, 0, 0, 0, 0, 0]]], [[[80.0, 0, -1, 0, 0, 0]]]])
    return every(drawn()[0], drawn(v=5, scale=1.0)[0], certain)


@pytest.mark.parametrize("kind", ORACLES)
def test_a_divergence_is_its_equation(kind):
    """Over all tokens, and over the k most probable and the rest as one more."""
    _, (p, q) = drawn()
    dense, sparse, *_ = found()[kind]
    np.testing.assert_allclose(dense, ORACLES[kind](p, q), rtol=2e-5)
    index = np.argsort(-p, -1)[..., :4]
    np.testing.assert_allclose(sparse, ORACLES[kind](coarse(p, index), coarse(q, index)), rtol=1e-4)
    assert (sparse <= dense + 1e-6).all() and (sparse < 0.99 * dense).any()


@pytest.mark.parametrize("kind", ORACLES)
def test_all_but_one_of_the_tokens_tell_all(kind):
    *_, dense, sparse, _ = found()[kind]
    np.testing.assert_allclose(sparse, dense, rtol=1e-4)


@pytest.mark.parametrize("kind", ORACLES)
def test_certain_networks_give_finite_values_and_gradients(kind):
    """A teacher that leaves nothing to the tail, and a student that is as sure."""
    value, gradient = found()[kind][-1]
    assert abs(value) < 1e-4 and np.isfinite(gradient).all()


def test_no_token_is_left():
    """With k = v the tail is empty: log 0."""
    logits, (p, q) = drawn(v=6)
    teacher = sequence.top_log_probs(logits[0], 6)
    assert np.isneginf(teacher.tail).all()
    asked = jnp.take_along_axis(jax.nn.log_softmax(logits[1]), teacher.index, -1)
    found = sequence.sparse_divergence("forward", teacher, asked)
    np.testing.assert_allclose(found, entropy(p, q), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "share", "where"), [("revers", 0.5, "kind"), ("skew_forward", 1.0, "share")]
)
def test_wrong_arguments(kind, share, where):
    with pytest.raises(ConfigError) as error:
        sequence.token_divergence(kind, jnp.zeros((1, 1)), jnp.zeros((1, 1)), share=share)
    assert error.value.where == where


def test_sparse_distillation_needs_less_than_half_the_memory():
    """Temporaries of a step of teacher and student, dense and by the most probable tokens."""
    b, t, d, v, k = 4, 64, 32, 16_384, 8
    x = jax.ShapeDtypeStruct((b, t, d), jnp.float32)
    table = jax.ShapeDtypeStruct((v, d), jnp.float32)

    def dense(x, teacher, student):
        p, q = (jnp.einsum("btd,vd->btv", x, table) for table in (teacher, student))
        return sequence.softmax_divergence("forward", p, q).mean()

    def sparse(x, teacher, student):
        top = sequence.top_log_probs_of(x, teacher, k, chunk=16)
        top = jax.lax.stop_gradient(top)
        q = sequence.log_probs_of(x, student, top.index, chunk=16)
        return sequence.sparse_divergence("forward", top, q).mean()

    def temporaries(f):
        step = jax.jit(jax.value_and_grad(f, argnums=2))
        analysis = step.lower(x, table, table).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    assert temporaries(sparse) <= 0.5 * temporaries(dense)
