"""The CPU convolution equals that of lax in every derivative, dtype, loop and sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from distill_jax.models import convolution
from distill_jax.models.convolution import _conv, conv2d

CASES = [
    (3, 1, 6, 5),
    (3, 2, 6, 5),
    (3, 2, 7, 8),
    (1, 2, 6, 5),
    (5, 3, 8, 7),
    (5, 2, 9, 6),
    (7, 2, 8, 8),
    (3, 4, 9, 7),
    (1, 1, 6, 5),
    (5, 1, 4, 6),
    (5, 2, 2, 3),
]


def arrays(size, h, w, b=6, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = ((b, h, w, 3), (size, size, 3, 4), (b, h, w, 3), (size, size, 3, 4))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def nonlinear(conv, d):
    """A map of an image and a kernel, and what its gradient is along `d`, as functions."""

    def f(*a):
        return jnp.tanh(conv(*a)).sum((1, 2, 3))

    grads = jax.grad(lambda *a: (f(*a) ** 2).sum(), argnums=(0, 1))

    def along(*a):
        return sum((g * t).sum() for g, t in zip(grads(*a), d, strict=True))

    return f, grads, along


def everything(conv, x, kernel, *d):
    """Values, both gradients, products and second derivatives, each in two modes."""
    a = (x, kernel)
    f, grads, along = nonlinear(conv, d)
    value, linear = jax.linearize(f, *a)
    reverse_over_reverse = jax.grad(along, argnums=(0, 1))(*a)
    forward_over_reverse = jax.jvp(grads, a, d)
    products = jax.jvp(f, a, d)[1], linear(*d)
    return conv(*a), value, products, forward_over_reverse, reverse_over_reverse


def once(conv, x, kernel, *d):
    """The same, where the modes are taken to agree."""
    a = (x, kernel)
    f, grads, _ = nonlinear(conv, d)
    value, product = jax.jvp(f, a, d)
    gradients, changes = jax.jvp(grads, a, d)
    return conv(*a), value, (product, product), (gradients, changes), changes


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_derivatives_equal_those_of_lax(case, devices, monkeypatch):
    size, stride, h, w = case
    # Four images of the eight at a time, or fewer where patches are larger.
    monkeypatch.setattr(convolution, "_PATCH_BYTES", 4 * 8 * 30 * 9 * 3)
    monkeypatch.setattr(
        convolution, "_GRADIENT_BYTES", 4 * 8 * -(-h // stride) * -(-w // stride) * 4
    )
    monkeypatch.setattr(convolution, "_FEW", 0)
    monkeypatch.setattr(convolution, "_MIN_CHANNELS", 5)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    with jax.enable_x64(True):
        args = arrays(size, h, w, b=8, dtype=np.float64)
        ours, theirs = (
            jax.jit(
                functools.partial(compute, functools.partial(conv, stride=stride)),
            )(*args)
            for compute, conv in ((everything, conv2d), (once, _conv))
        )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-11), ours, theirs
    )


def test_float32_gradients_agree_to_rounding_and_have_no_convolution_over_the_image():
    x, kernel, *_ = arrays(5, 8, 8, b=8)

    def grad(conv):
        return jax.jit(jax.grad(lambda k: (conv(x, k, stride=1) ** 2).sum()))

    exact = grad(_conv)(kernel)
    np.testing.assert_allclose(grad(conv2d)(kernel), exact, rtol=1e-5, atol=1e-3)  # of 1e3
    assert grad(conv2d).lower(kernel).as_text().count("stablehlo.convolution") == 1
    assert grad(_conv).lower(kernel).as_text().count("stablehlo.convolution") == 2


@pytest.mark.parametrize("channels", [(1, 4), (3, 16), (16, 16), (5, 32), (2, 3)], ids=str)
def test_few_channels_are_widened_without_a_change(channels):
    c, d = channels
    rng = np.random.default_rng(0)
    for width in (1, 7, 12):
        x = jnp.asarray(rng.normal(size=(2, 9, width, c)), np.float32)
        for size in ((3, 3), (1, 5), (5, 1)):
            kernel = jnp.asarray(rng.normal(size=(*size, c, d)), np.float32)
            want = _conv(x, kernel, stride=1)
            np.testing.assert_allclose(conv2d(x, kernel), want, rtol=1e-5, atol=1e-4)


def test_the_kernel_gradient_on_one_device_is_a_convolution_of_images_as_channels(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(32, 10, 10, n)), np.float32) for n in (16, 32))
    assert convolution._images_as_channels(x, g, (3, 3)) == 16

    def gradient(form):
        return jax.jit(functools.partial(form, stride=1, size=(3, 3)))

    ours, theirs = (
        gradient(form)
        for form in (convolution._kernel_gradient, convolution._kernel_gradient_by_lax)
    )
    np.testing.assert_allclose(ours(x, g), theirs(x, g), rtol=1e-4, atol=1e-3)
    text = ours.lower(x, g).as_text()
    assert "stablehlo.while" in text and "stablehlo.convolution" in text


def test_bfloat16_stays_bfloat16():
    x, kernel, *_ = arrays(3, 6, 6, dtype=jnp.bfloat16)
    gx, gk = jax.grad(lambda *a: conv2d(*a).sum().astype(jnp.float32), argnums=(0, 1))(x, kernel)
    assert gx.dtype == gk.dtype == conv2d(x, kernel).dtype == jnp.bfloat16


def test_inside_a_scan_and_per_example_by_vmap():
    x, kernel, *_ = arrays(3, 6, 6)

    def loss(conv, k, x):
        return (conv(x, k, stride=1) ** 2).sum()

    def scanned(conv):
        def step(k, _):
            return k - 1e-3 * jax.grad(functools.partial(loss, conv))(k, x), None

        return jax.jit(lambda k: jax.lax.scan(step, k, length=2)[0])(kernel)

    np.testing.assert_allclose(scanned(conv2d), scanned(_conv), rtol=1e-5, atol=1e-5)
    each = [
        jax.jit(jax.vmap(jax.grad(functools.partial(loss, conv)), in_axes=(None, 0)))(
            kernel, x[:, None]
        )
        for conv in (conv2d, _conv)
    ]
    np.testing.assert_allclose(*each, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("b", "devices", "parts"), [(128, 1, 8), (100, 1, 5), (1024, 16, 16), (96, 6, 6), (100, 16, 10)]
)
def test_parts_of_a_batch_do_not_cross_devices(b, devices, parts):
    assert convolution._parts_of_batch(b, devices) == parts


@pytest.mark.parametrize("images", [16, 4])
def test_a_sharded_batch_has_the_same_gradient_and_one_reduction(images, monkeypatch):
    monkeypatch.setattr(convolution, "_PATCH_BYTES", images * 4 * 8 * 6 * (3 * 3 + 3 * 4))
    x, kernel, *_ = arrays(3, 6, 6, b=16)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    whole = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec()))
    grad = jax.jit(jax.grad(lambda k, x: (conv2d(x, k) ** 2).sum()))
    text = grad.lower(whole, split).compile().as_text()
    assert ("while(" in text) == (images < 16)
    assert "all-gather" not in text and "all-to-all" not in text
    assert "collective-permute" not in text
    assert text.count(" all-reduce(") == text.partition("ENTRY")[2].count(" all-reduce(") == 1
    np.testing.assert_allclose(grad(whole, split), grad(kernel, x), rtol=1e-5, atol=1e-4)
