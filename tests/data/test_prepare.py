"""The preparation of images for a pretrained network, against Pillow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from distill_jax.core.errors import ArgumentError
from distill_jax.data import transforms

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def seen(images, **kwargs):
    transform = transforms.make_prepare(**kwargs)
    return np.asarray(transform(jax.random.key(0), {"input": jnp.asarray(images)}, 0)["input"])


def by_pillow(image, *, size, resized, interpolation):
    """Resizes the shorter side and crops the centre, as timm and torchvision do."""
    h, w = image.shape[:2]
    tall, wide = (n * resized // min(h, w) for n in (h, w))
    made = Image.fromarray(image).resize((wide, tall), FILTERS[interpolation])
    top, left = round((tall - size) / 2), round((wide - size) / 2)
    return np.asarray(made)[top : top + size, left : left + size] / 255


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(
    ("h", "w", "size", "crop"), [(41, 31, 16, 0.8), (12, 12, 28, 1.0), (9, 30, 16, 0.875)]
)
def test_images_are_prepared_as_pillow_does(interpolation, h, w, size, crop):
    # Pillow clips after the rows too, which such values do not show.
    images = np.random.default_rng(0).integers(64, 192, (2, h, w, 3), np.uint8)
    given = {"size": size, "interpolation": interpolation}
    found = seen(images, **given, crop=crop, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    want = np.stack([by_pillow(x, resized=round(size / crop), **given) for x in images])
    values = found * (0.5, 0.25, 2.0) + (0.5, 0.25, 0.0)
    # Pillow rounds twice to 1 / 255, after the rows and after the columns.
    np.testing.assert_allclose(values, want, atol=0 if interpolation == "nearest" else 1.2 / 255)


def test_channels_come_in_the_order_of_the_card():
    colours = np.zeros((1, 4, 4, 3), np.uint8)
    colours[..., 0] = 255
    plain = {"size": 4, "mean": (0.0,), "std": (1.0,)}
    np.testing.assert_allclose(seen(colours, **plain)[0, 0, 0], (1, 0, 0), atol=1e-6)
    bgr = seen(colours, **plain, channel_order="bgr")
    np.testing.assert_allclose(bgr[0, 0, 0], (0, 0, 1), atol=1e-6)
    grey = seen(colours, **plain, channel_order="grey")
    np.testing.assert_allclose(grey[0, 0, 0], (0.299,), atol=1e-6)
    repeated = seen(colours[..., :1], **plain)
    np.testing.assert_allclose(repeated[0, 0, 0], (1, 1, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "channels", "told"),
    [
        ({"size": 0}, 3, "size"),
        ({"size": 4, "crop": 1.5}, 3, "prepare.crop: crop is 1.5"),
        ({"size": 4, "interpolation": "cubic"}, 3, "did you mean 'bicubic'"),
        ({"size": 4, "channel_order": "gray"}, 3, "did you mean 'grey'"),
        ({"size": 4, "mean": (0.1, 0.2)}, 3, "prepare.mean: 2 numbers for 3 channels"),
        ({"size": 4, "std": (0.0,)}, 3, "prepare.std"),
        ({"size": 4}, 4, "1 or 3 channels, and these have 4"),
    ],
)
def test_what_cannot_be_prepared_is_refused(kwargs, channels, told):
    with pytest.raises(ArgumentError, match=told):
        seen(np.zeros((1, 8, 8, channels), np.uint8), **kwargs)
