"""Random evidence, the same in NumPy, and networks that a test can look into."""

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core.api import Evidence
from tests.reference import softmax

B, K = 6, 4


def draw(*, s=2, k=K, mixed=False, seed=0):
    """Returns evidence of six examples, the last of them padding, as float64 NumPy arrays."""
    r = np.random.RandomState(seed)
    label = np.eye(k)[r.randint(0, k, B)]
    return Evidence(
        loss_terms={f"signal{j}": r.rand(B) * 3 for j in range(s)},
        logits={"student": 2 * r.randn(B, k), "teacher": 3 * r.randn(B, k)},
        label_probs=softmax(r.randn(B, k)) if mixed else label,
        class_means=softmax(2 * r.randn(k, k) + np.eye(k)),
        mask=np.append(np.ones(B - 1), 0.0),
    )


def on_device(evidence):
    """Returns the evidence as JAX arrays, in float64 where that is enabled."""
    return jax.tree.map(jnp.asarray, evidence)


def no_nets(role, *inputs, train=False):
    raise AssertionError(f"{role} was called")


class Nets:
    """One network with its parameters."""

    def __init__(self, model, params):
        self.model, self.params = model, params

    def __call__(self, role, *inputs, train=False):
        assert role == "weighting" and not train
        return self.model.apply(self.params, {}, *inputs, train=train, rngs={})


def giving(shape):
    """Returns networks whose logits are zeros of a shape."""
    return lambda role, *inputs, train=False: ({"logits": jnp.zeros(shape)}, {})


def weights(weighting, evidence, nets=no_nets, step=0):
    found = jax.jit(lambda e, step: weighting(nets, e, step))(on_device(evidence), jnp.int32(step))
    return np.asarray(found)


def refused(weighting, evidence, nets=no_nets):
    """Traces shapes alone: a config that does not fit must be refused before anything runs."""
    return jax.eval_shape(lambda e: weighting(nets, e, jnp.int32(0)), on_device(evidence))
