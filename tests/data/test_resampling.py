"""Scaled crops against `jax.image`, which antialiases, and against what PIL gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.image import ResizeMethod

from distill_jax.data import transforms

WHOLE = jnp.array([[0.0, 0.0, 1.0, 1.0]])
SAME = jnp.zeros(1, bool)


def scaled(image, box=WHOLE, flip=SAME, size=None):
    crop = jax.jit(transforms.resized_crop, static_argnames="size")
    return np.asarray(crop(jnp.asarray(image, jnp.float32)[None], box, flip, size=size)[0])


@pytest.mark.parametrize("size", [(96, 96), (28, 40), (64, 64), (80, 90), (1, 1)])
def test_a_whole_image_is_resized_as_by_jax_image(size):
    image = np.random.default_rng(0).random((64, 64, 3))
    want = jax.image.resize(image, (*size, 3), "linear", antialias=True, precision="highest")
    np.testing.assert_allclose(scaled(image, size=size), want, atol=2e-6)


@pytest.mark.parametrize(
    "box", [(0.1, 0.2, 0.8, 0.7), (0.0, 0.5, 0.3, 0.5), (0.31, 0.0, 0.05, 1.0)], ids=str
)
def test_a_box_is_scaled_as_by_jax_image(box):
    h, w, m = 48, 40, 20
    image = np.random.default_rng(1).random((h, w, 1)).astype(np.float32)
    top, left, height, width = box
    scale = jnp.array([m / (height * h), m / (width * w)])
    shift = -jnp.array([top * h, left * w]) * scale
    want = jax.image.scale_and_translate(
        image, (m, m, 1), (0, 1), scale, shift, ResizeMethod.LINEAR, precision="highest"
    )
    got = scaled(image, jnp.array([box]), size=(m, m))
    np.testing.assert_allclose(got, want, atol=1e-5)
    mirrored = scaled(image, jnp.array([box]), ~SAME, size=(m, m))
    np.testing.assert_allclose(mirrored, got[:, ::-1], atol=1e-6)


def test_pillow_gives_the_same():
    # PIL.Image.fromarray(row of float32, "F").resize((4, 1), BILINEAR) with Pillow 13.0.0.
    row = np.array([1, 5, 2, 8, 3, 9, 4, 7, 6, 0], np.float32)
    image = np.repeat(row[None, :, None], 4, axis=0)
    want = [3.1818182, 5.4, 5.96, 4.2272725]
    np.testing.assert_allclose(scaled(image, size=(4, 4))[0, :, 0], want, rtol=1e-5)


def test_noise_and_stripes_lose_what_the_smaller_size_cannot_show():
    noise = np.random.default_rng(0).random((224, 224, 1))
    assert scaled(noise, size=(96, 96)).std() == pytest.approx(0.084, abs=0.002)
    stripes = np.broadcast_to((np.arange(64) % 2)[None, :, None], (64, 64, 1))
    got = scaled(stripes, size=(28, 28))
    assert got.min() > 0.4 and got.max() < 0.6
    # Enlarged, nothing is lost: the range of neighbours two pixels apart stays.
    large = scaled(stripes, size=(128, 128))
    assert large.min() < 0.1 and large.max() > 0.9
