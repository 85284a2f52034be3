"""Products on a part of a batch: the rows of the whole batch's, without a forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from distill_jax.core import replay
from distill_jax.models import layers, mlp, vit
from distill_jax.models.convolution import conv2d

B, M = 8, 4


def take(x, axis, *, first):
    """Every fourth of B rows, by indexes."""
    n = x.shape[axis] // B
    rows = np.concatenate([np.arange(i * n, (i + 1) * n) for i in range(first, B, M)])
    return x.take(rows, axis)


def like(tree, seed, scale=1.0):
    """Normal draws in the shapes of a tree."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (scale * draw.normal(size=x.shape)).astype(x.dtype), tree)


def drawn(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(jnp.result_type(float))


def both(fn, params, batch, *, first=0):
    """Returns rows of the whole batch's values and product, those of the replay, and the plan."""
    tangent = like(params, 5)
    rows = jax.tree.map(lambda x: take(x, 0, first=first), batch)
    plan = replay.make_plan(fn, params, batch, rows)
    assert plan is not None

    @jax.jit
    def compute(params, tangent, batch, rows):
        whole, known = plan.record(params, batch)
        pick = functools.partial(take, first=first)
        again = lambda p: plan.replay(p, rows, known, pick)  # noqa: E731
        want = jax.jvp(lambda p: fn(p, batch), (params,), (tangent,))
        return whole, want, jax.jvp(again, (params,), (tangent,))

    whole, want, got = compute(params, tangent, batch, rows)
    np.testing.assert_allclose(whole, want[0], rtol=1e-12)
    return [take(np.asarray(x), 0, first=first) for x in want], got, plan


def of_model(make, shape):
    x = drawn(B, *shape)
    params, state = jax.eval_shape(make.init, jax.random.key(1), x)
    assert not jax.tree.leaves(state)
    params = like(params, 1, scale=0.3)

    def fn(params, batch):
        found, _ = make.apply(params, state, batch["input"], train=True, rngs={})
        return found["logits"]

    return fn, params, {"input": x}


def convolutions():
    """Convolutions, pooling, and axes that are moved, merged and cut."""
    x = drawn(B, 6, 6, 2)
    params = like(
        {
            "a": drawn(3, 3, 2, 4),
            "b": drawn(3, 3, 4, 4),
            "c": drawn(6, 6),
            "d": drawn(16, 5),
        },
        1,
    )

    def fn(p, batch):
        h = jax.nn.relu(conv2d(batch["input"], p["a"], stride=2))
        h = lax.conv_general_dilated(
            jnp.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0))),
            p["b"],
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        h = jnp.concatenate([h, h[:, ::-1]], 1).transpose(1, 0, 2, 3)  # [6, b, 3, 4]
        h = jax.nn.gelu(jnp.tensordot(p["c"], h, 1))
        h = lax.reduce_window(h, -jnp.inf, lax.max, (3, 1, 1, 1), (3, 1, 1, 1), "VALID")
        h = h.transpose(1, 0, 2, 3).reshape(B if h.shape[1] == B else B // M, -1)  # [b, 24]
        return jax.nn.log_softmax(h[:, :16] @ p["d"])

    return fn, params, {"input": x}


def merged():
    """Rows next to each other, which are those of a batch, and views one after the other."""
    x = drawn(B, 3, 4)
    params = like({"a": drawn(4, 4), "b": drawn(4, 4)}, 1)

    def fn(p, batch):
        x = batch["input"]
        x = (x.reshape(-1, 4) @ p["a"]).reshape(x.shape)
        views = jnp.concatenate([x, jnp.tanh(x)]) @ p["b"]  # [2b, 3, 4]
        return views[: len(x)] + views[len(x) :]

    return fn, params, {"input": x}


CASES = {
    "mlp": (lambda: of_model(mlp.make(num_classes=3, hidden=(7, 5)), (6, 6, 1)), 3),
    # Patches; projections, scores, values, output and two layers of a block; logits.
    "vit": (
        lambda: of_model(
            vit.make(num_classes=3, width=8, depth=1, heads=2, patch_size=4), (8, 8, 1)
        ),
        8,
    ),
    "convolutions": (convolutions, 4),
    "merged": (merged, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_without_ties_are_those_of_the_whole_batch(name):
    make, products = CASES[name]
    with jax.enable_x64(True):
        want, got, plan = both(*make(), first=3)
        for one, other in zip(want, got, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6 if name == "vit" else 1e-10)
    assert [k.axis is None for k in plan.kept if k] == [False] * products


def test_only_the_product_is_left_to_compute():
    fn, params, batch = CASES["mlp"][0]()
    rows = {"input": take(batch["input"], 0, first=0)}
    plan = replay.make_plan(fn, params, batch, rows)
    _, known = jax.eval_shape(plan.record, params, batch)

    def push(p, t, known):
        pick = functools.partial(take, first=0)
        return jax.jvp(lambda p: plan.replay(p, rows, known, pick), (p,), (t,))[1]

    # Of a first layer the input's product with its change, of others two, and no value.
    text = jax.jit(push).lower(params, params, known).compile().as_text()
    assert text is not None and text.count(" dot(") == 1 + 2 + 2


@pytest.mark.parametrize("sides", [(), (5, 4)], ids=["vectors", "maps"])
def test_batch_norm_has_the_whole_batch_for_its_values_and_the_part_for_their_changes(sides):
    with jax.enable_x64(True):
        x = drawn(B, *sides, 6)
        axes = tuple(range(1 + len(sides)))
        params = like({"first": drawn(6, 5), "last": drawn(5, 3)}, 1)
        norm = layers.BatchNorm(affine=False)
        stats = jax.eval_shape(lambda: norm.init(jax.random.key(0), jnp.zeros((2, 5)), train=True))
        stats = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), stats)  # not used in training

        def fn(p, batch):
            h, _ = norm.apply(stats, batch["input"] @ p["first"], train=True, mutable=True)
            return jnp.tanh(h) @ p["last"]

        want, (values, changes), _ = both(fn, params, {"input": x}, first=2)
        np.testing.assert_allclose(values, want[0], rtol=1e-12)

        part = x[[2, 6]]
        v = jax.tree.map(np.asarray, like(params, 5))
        w1, w2 = (np.asarray(params[n]) for n in ("first", "last"))
        h_all, h, dh = x @ w1, part @ w1, part @ v["first"]
        mean, var = h_all.mean(axes), h_all.var(axes)
        d_mean = dh.mean(axes)
        d_var = (2 * h * dh).mean(axes) - 2 * mean * d_mean
        gain = 1 / np.sqrt(var + norm.epsilon)
        y = (h - mean) * gain
        dy = (dh - d_mean) * gain - 0.5 * y * gain**2 * d_var
        expected = (1 - np.tanh(y) ** 2) * dy @ w2 + np.tanh(y) @ v["last"]
        np.testing.assert_allclose(changes, expected, rtol=1e-10)
        assert np.abs(changes - want[1]).max() > 1e-3  # an estimate


@pytest.mark.parametrize("name", ["dropout", "loop", "size"])
def test_what_cannot_be_followed_is_left_alone(name):
    def fn(w, batch):
        x = batch["input"]
        if name == "dropout":
            return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, x.shape), x, 0) @ w
        if name == "loop":
            return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w), x)
        return (x if len(x) == B else 2 * x) @ w

    w, batch = jnp.ones((4, 4)), {"input": jnp.ones((B, 4))}
    rows = {"input": jnp.ones((B // M, 4))}
    assert replay.make_plan(fn, w, batch, rows) is None
