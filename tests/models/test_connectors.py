"""Connectors between feature maps: shapes, equations against NumPy and PyTorch, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.models import linear_head, paraphraser, regressor, review_fusion, translator


def draw(*shape, seed=0):
    return jnp.asarray(np.random.RandomState(seed).randn(*shape))


def randomized(params, seed=5):
    """Parameters without the zeros and ones that they start from."""
    rng = np.random.RandomState(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.randn(*x.shape) / 2, x.dtype), params)


def test_a_regressor_is_a_linear_map_of_channels():
    model = regressor.make()
    maps = draw(2, 3, 3, 4), draw(2, 5, 5, 2), draw(2, 3, 3, 6), draw(2, 5, 5, 7)
    params, state = model.init(jax.random.key(0), *maps)
    params = randomized(params)
    outputs, _ = model.apply(params, state, *maps, train=True, rngs={})
    assert list(outputs) == ["output1", "output2"]
    for i in (1, 2):
        layer = params[f"ConvUnit_{i - 1}"]
        want = np.asarray(maps[i - 1]) @ np.asarray(layer["Conv_0"]["kernel"][0, 0])
        np.testing.assert_allclose(
            outputs[f"output{i}"], want + np.asarray(layer["bias"]), rtol=1e-4
        )


def test_published_stacks():
    """Hidden widths are reduced; batch norm replaces biases; a ReLU comes last where asked."""
    model = regressor.make(kernel_sizes=(1, 3, 1), reduction=2, batch_norm=True, relu=True)
    maps = draw(4, 3, 3, 4), draw(4, 3, 3, 6)
    params, state = model.init(jax.random.key(0), *maps)
    kernels = [params[f"ConvUnit_{i}"]["Conv_0"]["kernel"].shape for i in range(3)]
    assert kernels == [(1, 1, 4, 3), (3, 3, 3, 3), (1, 1, 3, 6)]
    assert not any("bias" in params[f"ConvUnit_{i}"] for i in range(3))
    outputs, new = model.apply(params, state, *maps, train=True, rngs={})
    assert (outputs["output1"] >= 0).all()
    assert (outputs["output1"] > 0).any()
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state, new)
    assert all(jax.tree.leaves(moved))


def test_a_variance_starts_where_asked_and_stays_positive():
    model = regressor.make(variance=5.0)
    maps = draw(2, 3, 3, 4), draw(2, 3, 3, 6)
    params, state = model.init(jax.random.key(0), *maps)
    outputs, _ = model.apply(params, state, *maps, train=True, rngs={})
    np.testing.assert_allclose(outputs["variance1"], np.full((1, 1, 1, 6), 5.0), rtol=1e-5)
    low = {**params, "variance1": jnp.full(6, -50.0)}
    outputs, _ = model.apply(low, state, *maps, train=True, rngs={})
    assert (outputs["variance1"] > 0).all()


@pytest.mark.parametrize(
    "depth, encoder, decoder", [(1, [4], [8]), (2, [4, 4], [8, 8]), (3, [8, 4, 4], [4, 8, 8])]
)
def test_a_paraphraser_narrows_and_restores(depth, encoder, decoder):
    model = paraphraser.make(depth=depth)
    x = draw(2, 3, 3, 8)
    params, state = jax.eval_shape(model.init, jax.random.key(0), x)
    widths = [
        [half[f"ConvUnit_{i}"]["Conv_0"]["kernel"].shape[-1] for i in range(depth)]
        for half in (params["LeakyConvs_0"], params["LeakyConvs_1"])
    ]
    assert widths == [encoder, decoder]
    train = functools.partial(model.apply, train=True, rngs={})
    outputs, _ = jax.eval_shape(train, params, state, x)
    assert outputs["factor"].shape == (2, 3, 3, 4)
    assert outputs["output"].shape == x.shape
    student = translator.make(depth=depth)
    params, state = jax.eval_shape(
        student.init, jax.random.key(0), draw(2, 3, 3, 5), outputs["factor"]
    )
    train = functools.partial(student.apply, train=True, rngs={})
    found, _ = jax.eval_shape(train, params, state, draw(2, 3, 3, 5), outputs["factor"])
    assert found["output1"].shape == (2, 3, 3, 4)


def test_slope_of_the_leaky_activation():
    model = translator.make(depth=1, batch_norm=False)
    x, like = draw(2, 1, 1, 3), draw(2, 1, 1, 4)
    params, state = model.init(jax.random.key(0), x, like)
    found, _ = model.apply(params, state, x, like, train=True, rngs={})
    kernel = params["LeakyConvs_0"]["ConvUnit_0"]["Conv_0"]["kernel"][1, 1]
    pre = np.asarray(x[:, 0, 0]) @ np.asarray(kernel)
    np.testing.assert_allclose(
        found["output1"][:, 0, 0], np.where(pre > 0, pre, 0.1 * pre), rtol=1e-4, atol=1e-6
    )


SIZES = ((4, 3), (2, 5), (1, 6))
TEACHER = ((8, 4), (2, 7), (1, 9))


def fused(batch_norm=False):
    """A fusion of three stages with parameters at random, and its inputs."""
    model = review_fusion.make(width=5, batch_norm=batch_norm)
    students = [draw(2, n, n, c, seed=i) for i, (n, c) in enumerate(SIZES)]
    teachers = [jnp.zeros((2, n, n, c)) for n, c in TEACHER]
    params, state = jax.eval_shape(model.init, jax.random.key(0), *students, *teachers)
    return model, randomized(params), state, students, teachers


def test_a_fusion_returns_the_teachers_shapes():
    model, params, state, students, teachers = fused(batch_norm=True)
    outputs, _ = jax.eval_shape(
        functools.partial(model.apply, train=True, rngs={}), params, state, *students, *teachers
    )
    for i, like in enumerate(teachers, start=1):
        assert outputs[f"output{i}"].shape == like.shape


def test_a_fusion_against_pytorch():
    """Deep to shallow: 1x1, gates of both, nearest resize, 3x3; values and input gradients."""
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    with jax.enable_x64(True):
        model, params, state, students, teachers = fused()

    def conv(x, unit):
        kernel = torch.tensor(np.asarray(unit["Conv_0"]["kernel"], np.float64)).permute(3, 2, 0, 1)
        bias = torch.tensor(np.asarray(unit["bias"], np.float64))
        return F.conv2d(x, kernel, bias, padding=kernel.shape[-1] // 2)

    units = (params[f"ConvUnit_{i}"] for i in range(len(params)))
    inputs = [torch.tensor(np.asarray(x)).permute(0, 3, 1, 2) for x in students]
    for x in inputs:
        x.requires_grad_(True)
    deeper, want = None, []
    for x, (size, _) in zip(inputs[::-1], TEACHER[::-1], strict=True):
        x = conv(x, next(units))
        if deeper is not None:
            deeper = F.interpolate(deeper, size=x.shape[2:], mode="nearest")
            gate = torch.sigmoid(conv(torch.cat([x, deeper], 1), next(units)))
            x = x * gate[:, :1] + deeper * gate[:, 1:]
        deeper = F.interpolate(x, size=(size, size), mode="nearest")
        want.append(conv(deeper, next(units)))
    sum((y**2).sum() for y in want).backward()

    def run(students):
        outputs, _ = model.apply(params, state, *students, *teachers, train=True, rngs={})
        return sum((y**2).sum() for y in outputs.values()), outputs

    with jax.enable_x64(True):
        grads, got = jax.jit(jax.grad(run, has_aux=True))(students)
    for i, y in enumerate(want[::-1], start=1):
        np.testing.assert_allclose(
            got[f"output{i}"], y.detach().permute(0, 2, 3, 1).numpy(), rtol=1e-5, atol=1e-6
        )
    for grad, x in zip(grads, inputs, strict=True):
        want_grad = x.grad.permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(grad, want_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("n", "m", "rows"),
    [
        # torch.nn.functional.interpolate(mode="nearest") of PyTorch 2.13.0.
        (4, 2, [0, 2]),
        (5, 3, [0, 1, 3]),
        (3, 5, [0, 0, 1, 1, 2]),
        (7, 2, [0, 3]),
        (2, 4, [0, 0, 1, 1]),
        (3, 3, [0, 1, 2]),
    ],
)
def test_nearest_rows_are_those_of_pytorch(n, m, rows):
    x = jnp.arange(n * 6.0).reshape(1, n, 6, 1)
    resized = jax.jit(review_fusion.nearest_resize, static_argnums=1)
    np.testing.assert_array_equal(resized(x, (m, 6))[0, :, 0, 0], np.array(rows) * 6)
    found = resized(x.swapaxes(1, 2), (6, m))[0, 0, :, 0]
    np.testing.assert_array_equal(found, np.array(rows) * 6)


def test_a_shallow_stage_hears_of_deeper_ones():
    """The output of a stage depends on its own and deeper stages, never on shallower ones."""
    model, params, state, students, teachers = fused()

    def run(students):
        outputs, _ = model.apply(params, state, *students, *teachers, train=True, rngs={})
        return [(outputs[f"output{i}"] ** 2).sum() for i in (1, 2, 3)]

    for i, grads in enumerate(jax.jit(jax.jacrev(run))(students)):
        assert [bool(np.any(g)) for g in grads] == [j >= i for j in range(3)]


def test_nearest_sizes():
    x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(
        review_fusion.nearest_resize(x, (4, 2))[0, :, :, 0], [[0, 1], [0, 1], [2, 3], [2, 3]]
    )
    np.testing.assert_array_equal(
        review_fusion.nearest_resize(x, (3, 3))[0, :, :, 0], [[0, 0, 1], [0, 0, 1], [2, 2, 3]]
    )


def test_a_head_is_a_linear_layer():
    model, x = linear_head.make(num_classes=3), draw(2, 4)
    params, state = model.init(jax.random.key(0), x)
    params = randomized(params)
    assert set(params) == {"kernel", "bias"}
    outputs, _ = model.apply(params, state, x, train=False, rngs={})
    want = np.asarray(x) @ np.asarray(params["kernel"]) + np.asarray(params["bias"])
    np.testing.assert_allclose(outputs["logits"], want, rtol=1e-5)


@pytest.mark.parametrize(
    "make, kwargs",
    [
        (regressor.make, {"kernel_sizes": ()}),
        (regressor.make, {"kernel_sizes": (2,)}),
        (regressor.make, {"reduction": 0}),
        (regressor.make, {"variance": -1.0}),
        (paraphraser.make, {"rate": 0.0}),
        (paraphraser.make, {"depth": 0}),
        (translator.make, {"depth": 0}),
        (review_fusion.make, {"width": -1}),
        (linear_head.make, {"num_classes": 0}),
    ],
)
def test_arguments_are_checked(make, kwargs):
    with pytest.raises(ConfigError, match=next(iter(kwargs))):
        make(**kwargs)
