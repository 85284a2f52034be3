"""The network over bytes: size, what it sees, and its refusals."""

import jax
import numpy as np
import pytest

from distill_jax.core import partition
from distill_jax.core.errors import ArgumentError
from distill_jax.models import byte_convnet

X = np.random.default_rng(0).integers(0, 257, (3, 64), dtype=np.int32)


@pytest.fixture(scope="module")
def network():
    model = byte_convnet.make(num_classes=5, embedding_dim=4, widths=(6, 8), hidden=10)
    return model, *model.init(jax.random.key(0), X)


def logits(network, x):
    model, params, state = network
    return np.asarray(model.apply(params, state, x, train=False, rngs={})[0]["logits"])


def test_outputs_and_sizes(network):
    model, params, state = network
    outputs = model.apply(params, state, X, train=False, rngs={})[0]
    shapes = {name: x.shape for name, x in outputs.items()}
    wanted = {"stage1": (3, 16, 6), "stage2": (3, 8, 8), "embedding": (3, 10), "logits": (3, 5)}
    assert shapes == wanted
    count = lambda made: sum(  # noqa: E731
        x.size for x in partition.named_leaves(made.init(jax.random.key(0), X)[0]).values()
    )
    assert count(byte_convnet.make(num_classes=214)) == 70878


def test_every_byte_counts_once_it_is_in_a_window(network):
    before = logits(network, X)
    changed = [
        np.abs(logits(network, np.where(np.arange(64) == i, 256 - X, X)) - before).max() > 0
        for i in range(64)
    ]
    assert np.mean(changed) > 0.5 and changed[0]
    outside = X.copy()
    outside[:, 0] = 999
    np.testing.assert_array_equal(
        logits(network, outside), logits(network, np.where(np.arange(64) == 0, 256, X))
    )


@pytest.mark.parametrize("x", [X[:, :60], X.astype(np.float32), X[:, :, None]])
def test_other_inputs_are_refused(network, x):
    with pytest.raises(ArgumentError, match="are needed"):
        logits(network, x)


@pytest.mark.parametrize("kwargs", [{"hidden": 0}, {"widths": (3,)}, {"dropout": 1.0}])
def test_other_sizes_are_refused(kwargs):
    with pytest.raises(ArgumentError):
        byte_convnet.make(num_classes=5, **kwargs)
