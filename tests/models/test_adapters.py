"""Linen and NNX networks behave alike behind `Model`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distill_jax.core.errors import ConfigError
from distill_jax.models import mlp
from distill_jax.models.adapters import as_model, from_linen, from_nnx

X = jax.random.normal(jax.random.key(1), (4, 6))


class Linen(nn.Module):
    width: int = 8

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(self.width)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic: bool):
        return nn.Dense(3)(nn.Dropout(0.5)(x, deterministic=deterministic))


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


class Nnx(nnx.Module):
    def __init__(self, width: int = 8, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(6, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.List([nnx.Linear(width, 3, rngs=rngs)])

    def __call__(self, x):
        x = self.drop(nnx.relu(self.norm(self.first(x))))
        for layer in self.last:
            x = layer(x)
        return x


def leaves(tree):
    return {
        jax.tree_util.keystr(p, simple=True, separator="/")
        for p, _ in jax.tree.leaves_with_path(tree)
    }


@pytest.mark.parametrize("model", [from_linen(Linen()), from_nnx(Nnx)], ids=["linen", "nnx"])
def test_both_kinds_train_drop_and_evaluate(model):
    params, state = jax.jit(model.init)(jax.random.key(0), X)
    assert jax.tree.structure((params, state)) == jax.tree.structure(
        jax.eval_shape(model.init, jax.random.key(0), X)
    )

    @jax.jit
    def evaluate(params, state):
        outputs, same = model.apply(params, state, X)
        assert same is state
        return outputs["logits"]

    logits = evaluate(params, state)
    assert logits.shape == (4, 3)

    @functools.partial(jax.jit, static_argnames="train")
    def run(params, key, train=True):
        outputs, new = model.apply(params, state, X, train=train, rngs={"dropout": key})
        return outputs["logits"], new

    first, new = run(params, jax.random.key(0))
    np.testing.assert_array_equal(first, run(params, jax.random.key(0))[0])
    assert bool((first != run(params, jax.random.key(1))[0]).any())
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), state, new)))
    np.testing.assert_allclose(
        run(params, jax.random.key(0), train=False)[0], logits, rtol=1e-5, atol=1e-6
    )
    grads = jax.jit(jax.grad(lambda p: (run(p, jax.random.key(0))[0] ** 2).sum()))(params)
    for path, leaf in jax.tree.leaves_with_path(grads):
        if "first" not in str(path) and "Dense_0" not in str(path):
            assert bool(jnp.any(leaf != 0)), path
    with pytest.raises(ConfigError, match=r"no key[\s\S]*dropout"):
        model.apply(params, state, X, train=True)


def test_layouts_are_plain_dicts_with_string_keys():
    params, state = from_nnx(Nnx).init(jax.random.key(0), X)
    assert leaves(params) == {
        "first/kernel",
        "first/bias",
        "norm/scale",
        "norm/bias",
        "last/0/kernel",
        "last/0/bias",
    }
    assert leaves(state) == {"norm/mean", "norm/var"}
    params, state = from_linen(Linen()).init(jax.random.key(0), X)
    assert leaves(state) == {"batch_stats/BatchNorm_0/mean", "batch_stats/BatchNorm_0/var"}
    assert all(type(leaf) is dict for leaf in (params, state, params["Dense_0"]))


def test_nnx_equals_linen_on_the_same_parameters():
    linen, other = from_linen(Linen()), from_nnx(Nnx)
    p, s = other.init(jax.random.key(0), X)
    q = {"Dense_0": p["first"], "BatchNorm_0": p["norm"], "Dense_1": p["last"]["0"]}
    ours, _ = linen.apply(q, {"batch_stats": {"BatchNorm_0": s["norm"]}}, X)
    np.testing.assert_allclose(ours["logits"], other.apply(p, s, X)[0]["logits"], rtol=1e-6)


def test_a_built_nnx_module_keeps_its_values():
    net = Nnx(rngs=nnx.Rngs(7))
    params, _ = from_nnx(net).init(jax.random.key(0), X)
    np.testing.assert_array_equal(params["first"]["kernel"], net.first.kernel[...])


def test_modes_are_found_by_their_names():
    model = from_linen(Deterministic())
    params, state = model.init(jax.random.key(0), X)
    a = model.apply(params, state, X, train=True, rngs={"dropout": jax.random.key(0)})[0]
    assert bool((a["logits"] != model.apply(params, state, X)[0]["logits"]).any())


@pytest.mark.parametrize(
    ("obj", "kwargs"),
    [
        (mlp.make(num_classes=3), {}),
        (mlp.make, {"num_classes": 3}),
        (Plain(), {}),
        (Linen, {"width": 4}),
        (Nnx, {"width": 4}),
        (Nnx(rngs=nnx.Rngs(0)), {}),
        (lambda *, rngs: Nnx(4, rngs=rngs), {}),
        (lambda width: Linen(width), {"width": 4}),
    ],
)
def test_as_model_accepts_what_a_config_may_name(obj, kwargs):
    model = as_model(obj, **kwargs)
    outputs, _ = jax.eval_shape(lambda key: model.apply(*model.init(key, X), X), jax.random.key(0))
    assert outputs["logits"].shape == (4, 3)


@pytest.mark.parametrize(
    ("obj", "kwargs"), [(3, {}), (lambda: 3, {}), (Plain(), {"width": 3}), (nnx.Rngs(0), {"a": 1})]
)
def test_as_model_refuses_the_rest(obj, kwargs):
    with pytest.raises((ConfigError, TypeError)):
        as_model(obj, **kwargs)


def test_weights_for_inputs_of_another_size_are_refused():
    model = mlp.make(num_classes=3, hidden=(4,))
    params, state = model.init(jax.random.key(0), jnp.zeros((2, 8, 8, 1)))
    with pytest.raises(ConfigError, match=r"do not fit inputs of shape \(4, 4, 1\)"):
        model.apply(params, state, jnp.zeros((2, 4, 4, 1)))
