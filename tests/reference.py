"""Transcriptions in NumPy, float64, that tests of several packages compare with."""

import numpy as np


def draw(*shape, seed=0):
    return np.random.RandomState(seed).randn(*shape)


def softmax(z, temperature=1.0):
    """Probabilities of logits `[..., k]`."""
    return np.exp(log_softmax(z, temperature))


def log_softmax(z, temperature=1.0):
    z = np.asarray(z, np.float64) / temperature
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def cross_entropy(z, label):
    """Cross-entropy `[...]` of logits `[..., k]` with classes `[...]`."""
    return -np.take_along_axis(log_softmax(z), np.asarray(label)[..., None], -1)[..., 0]


def kl(p, q):
    """Divergence of p from q `[...]`, probabilities `[..., k]` above zero."""
    return (np.asarray(p) * np.log(np.asarray(p) / np.asarray(q))).sum(-1)


def unit(x):
    """Vectors `[..., d]` of length 1; zero stays."""
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(length > 0, length, 1)


def difference(f, x, eps=1e-6):
    """Central differences of a scalar function, entry by entry."""
    grad = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = eps
        grad[i] = (f(x + step) - f(x - step)) / (2 * eps)
    return grad
