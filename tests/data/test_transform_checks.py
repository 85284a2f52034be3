"""Transforms that do not fit the data are found before training."""

import jax
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.data import checks, moments, transforms
from distill_jax.data.transforms import registry
from tests.data.test_checks import dataset, floats, images, part

# Normalization.


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_statistics_are_those_of_the_training_part_by_channel(dtype, monkeypatch):
    monkeypatch.setattr(checks, "CHUNK_BYTES", 7 * 8 * 8 * 3 * np.dtype(dtype).itemsize)
    x = images(dtype=dtype, seed=4)
    x[..., 1] = x[..., 1] / 4
    x[..., 2] = 1
    unit = x / 255 if dtype == np.uint8 else x.astype(np.float64)
    mean, std = moments.statistics(part(x))
    np.testing.assert_allclose(mean, unit.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, [*unit.std((0, 1, 2))[:2], 1], rtol=1e-12)


def test_normalize_without_numbers_takes_those_of_the_training_part():
    make = transforms.make_normalize(statistics=lambda: moments.statistics(part(images())))
    out = np.asarray(make(None, {"input": images()}, None)["input"])
    np.testing.assert_allclose(out.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(out.std((0, 1, 2)), 1, atol=1e-5)
    with pytest.raises(ConfigError, match="mean and std are not set"):
        transforms.make_normalize()
    with pytest.raises(ConfigError, match="one of mean and std"):
        transforms.make_normalize(mean=0.5)


def test_normalize_takes_a_number_for_each_channel():
    three = transforms.make_normalize(mean=(0.1, 0.2, 0.3), std=(0.2, 0.2, 0.2))
    assert three(None, {"input": images()}, None)["input"].shape == (24, 8, 8, 3)
    with pytest.raises(ConfigError, match=r"normalize\.mean: 3 numbers for images of 1 channels"):
        three(None, {"input": images(shape=(8, 8, 1))}, None)
    with pytest.raises(ConfigError, match="the input is a table"):
        three(None, {"input": {"numeric": np.zeros((3, 2))}}, None)


@pytest.mark.parametrize("name", ["random_crop", "horizontal_flip", "rotation", "random_erasing"])
def test_geometry_takes_images_alone(name):
    whole = transforms.compose({name: registry.resolve(name)()})
    for x, word in ((np.zeros((4, 13)), r"inputs are \[b, 13\]"), ({"numeric": 0}, "a table")):
        with pytest.raises(ConfigError, match=f"^{name}: .*{word}"):
            whole(jax.random.key(0), {"input": x, "index": np.arange(4)}, np.int32(0))


def look(x):
    _, report = checks.open_dataset(dataset(part(x), part(x)))
    assert report.values is not None
    return report.values


def test_statistics_of_other_data_are_told_with_those_of_these():
    rgb = np.clip(np.random.default_rng(0).normal(0.47, 0.25, (24, 8, 8, 3)), 0, 1)
    values = look(np.round(255 * rgb).astype(np.uint8))
    own = values.mean / 255, values.std / 255
    told = moments.odd_statistics(values, (0.286,), (0.353,))  # those of Fashion-MNIST
    assert "mean (0.286,) and std (0.353,) are not of these data, which have (0.4" in told
    assert moments.odd_statistics(values, *own) == ""
    assert moments.odd_statistics(values, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) == ""
    assert moments.odd_statistics(values, 0.5, 0.5) == ""


# Values that transforms take.

JITTER = {"color_jitter": {}, "solarize": {}}


@pytest.mark.parametrize(
    ("x", "names", "message"),
    [
        (255 * floats(), ("scale",), "scale leaves floats in their units, and these are 0 to 255"),
        (255 * floats(), ("color_jitter",), "these are 0 to 255: 99.*% are outside"),
        (255 * floats(), ("solarize",), "are outside"),
        (2 * floats() - 1, ("color_jitter",), "these are -1 to 1: 49.*% are outside"),
        (images(), ("normalize", "color_jitter"), "the order scale, color_jitter, normalize"),
        (
            images(),
            ("random_crop", "scale", "normalize", "solarize", "mixup"),
            "the order random_crop, scale, solarize, normalize, mixup",
        ),
        (images(), ("normalize", "views"), r"^views\.transforms: color_jitter"),
        (255 * floats(), ("normalize",), "normalize leaves floats in their units"),
        (images(top=2), ("scale",), "only 0 and 1"),
    ],
)
def test_values_that_a_transform_does_not_take_are_refused(x, names, message):
    kwargs = {"normalize": {"mean": 0.5, "std": 0.2}, "views": {"transforms": ["color_jitter"]}}
    with pytest.raises(ConfigError, match=message):
        transforms.check_values(names, kwargs, look(x))


@pytest.mark.parametrize(
    ("x", "names", "kind"),
    [
        (images(), ("scale", "color_jitter", "solarize", "normalize"), "normalized"),
        (floats(), ("color_jitter", "normalize"), "normalized"),
        (255 * floats(), ("normalize",), "normalized"),
        (images(), ("random_crop",), "bytes"),
        (255 * floats(), (), "grey"),
        (images(), ("scale", "views"), "unit"),
        (2 * floats() - 1, ("normalize",), "normalized"),
        (images(), ("own.module:Symbol", "color_jitter"), ""),
        (images(top=2), ("normalize",), "normalized"),
    ],
)
def test_values_that_transforms_take(x, names, kind):
    kwargs = {"views": {"transforms": [("color_jitter", {}), "gaussian_blur"]}}
    assert transforms.check_values(names, kwargs, look(x)) == kind


def test_every_transform_that_clips_to_the_unit_interval_says_so():
    x = np.float32(np.linspace(-3, 3, 4 * 6 * 6 * 3).reshape(4, 6, 6, 3))
    batch = {"input": x, "index": np.arange(4), "epoch": np.zeros(4, int), "mask": np.ones(4)}
    key = jax.random.key(0)
    for name in ("color_jitter", "grayscale", "horizontal_flip"):
        made = transforms.resolve(name)(probability=1.0)
        out = np.asarray(made(key, batch, 0)["input"])
        clips = out.min() >= 0 and out.max() <= 1
        assert clips == (registry.TAKES.get(name) == "unit"), name
