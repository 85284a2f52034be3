"""Colour, blur and views: equal to plain NumPy, pure in (seed, epoch, example, view)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core import rng
from distill_jax.core.api import Dataset, Provenance
from distill_jax.core.errors import ConfigError
from distill_jax.data import corruption, source, transforms
from tests.data.test_transforms import KEY, STEP, make_batch


def floats(index, **kwargs):
    batch = make_batch(index, **kwargs)
    return {**batch, "input": batch["input"].astype(jnp.float32) / 255}


def draws(batch, *shape):
    return np.asarray(
        jax.vmap(lambda k: jax.random.uniform(k, shape))(rng.example_keys(KEY, batch))
    )


def grey(x):
    return x @ np.array([0.299, 0.587, 0.114], np.float32)[:, None]


def test_color_jitter_is_the_chain_of_blends():
    batch = floats(np.arange(12))
    jitter = transforms.make_color_jitter(brightness=0.3, contrast=0.5, saturation=0.4)
    got = np.asarray(jax.jit(jitter)(KEY, batch, STEP)["input"])
    images, u = np.asarray(batch["input"]), draws(batch, 5)
    for i, image in enumerate(images):
        light, spread, vivid = 2 * u[i, :3] - 1
        want = image * (1 + 0.3 * light)
        mean = grey(want).mean()
        want = mean + (1 + 0.5 * spread) * (want - mean)
        want = grey(want) + (1 + 0.4 * vivid) * (want - grey(want))
        want = np.clip(want, 0, 1) if u[i, 4] < 0.8 else image
        np.testing.assert_allclose(got[i], want, atol=2e-6)
    assert 0 < (u[:, 4] < 0.8).mean() < 1  # both cases occur


def test_hue_keeps_luminance_and_a_whole_turn_changes_nothing():
    images = jnp.asarray(np.random.default_rng(0).random((4, 3, 3, 3)), jnp.float32)
    turned = transforms.rotate_hue(images, jnp.array([0.0, 1.0, 0.3, -0.4]))
    np.testing.assert_allclose(turned[:2], images[:2], atol=1e-5)
    assert np.abs(turned[2:] - images[2:]).max() > 0.1
    np.testing.assert_allclose(grey(np.asarray(turned)), grey(np.asarray(images)), atol=2e-3)


def test_blur_is_a_convolution_with_repeated_edges():
    image = np.random.default_rng(1).random((1, 7, 5, 2)).astype(np.float32)
    at, sigma = np.arange(-2, 3), 0.9
    taps = np.exp(-0.5 * (at / sigma) ** 2)
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    padded = np.pad(image[0], ((2, 2), (2, 2), (0, 0)), mode="edge")
    want = np.zeros_like(image[0])
    for y in range(7):
        for x in range(5):
            want[y, x] = (kernel[:, :, None] * padded[y : y + 5, x : x + 5]).sum((0, 1))
    got = transforms.blur(jnp.asarray(image), jnp.array([sigma]), radius=2)
    np.testing.assert_allclose(got[0], want, atol=1e-5)
    same = transforms.blur(jnp.asarray(image), jnp.zeros(1), radius=2)
    np.testing.assert_allclose(same, image, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("grayscale", lambda x: np.broadcast_to(grey(x), x.shape)),
        ("solarize", lambda x: np.where(x >= 0.5, 1 - x, x)),
    ],
)
def test_some_examples_are_changed_and_others_not(name, changed):
    batch = floats(np.arange(20))
    make = transforms.resolve(name)(probability=0.5)
    got, images = np.asarray(make(KEY, batch, STEP)["input"]), np.asarray(batch["input"])
    hit = draws(batch) < 0.5
    assert 0 < hit.mean() < 1
    np.testing.assert_allclose(got[hit], changed(images[hit]), atol=1e-6)
    np.testing.assert_array_equal(got[~hit], images[~hit])


def test_views_depend_on_the_example_and_not_on_the_batch():
    chain = (("random_resized_crop", {"flip": 0.5}), ("gaussian_noise", {"std": 0.1}))
    apply = transforms.compose(
        {
            "views": transforms.make_views(count=3, transforms=chain),
            "local_views": transforms.make_local_views(
                count=2, transforms=[("random_resized_crop", {"area": (0.1, 0.4), "size": 4})]
            ),
        }
    )
    run = jax.jit(apply)
    found = run(KEY, floats(np.arange(6), w=8), STEP)
    assert found["views"].shape == (6, 3, 8, 8, 3)
    assert found["local_views"].shape == (6, 2, 4, 4, 3)
    np.testing.assert_array_equal(found["input"], floats(np.arange(6), w=8)["input"])
    assert np.abs(found["views"][:, 0] - found["views"][:, 1]).max() > 0.1
    other = run(KEY, floats([9, 4, 2, 8, 7, 1], w=8), STEP + 7)
    for name in ("views", "local_views"):
        np.testing.assert_allclose(other[name][1], found[name][4], atol=1e-6)
    later = run(KEY, floats(np.arange(6), w=8, epoch=1), STEP)
    assert np.abs(later["views"] - found["views"]).max() > 0.1


def test_the_second_view_may_have_transforms_of_its_own():
    make = transforms.make_views(transforms=["solarize"], second=[("solarize", {"probability": 1})])
    batch = floats(np.arange(4))
    views = np.asarray(make(KEY, batch, STEP)["views"])
    images = np.asarray(batch["input"])
    np.testing.assert_allclose(views[:, 1], np.where(images >= 0.5, 1 - images, images), atol=1e-6)


def test_coarse_labels_are_groups():
    batch = transforms.make_coarse_labels(groups=(0, 1, 0, 1))(KEY, make_batch([0, 1, 2, 7]), STEP)
    np.testing.assert_array_equal(batch["label"], [0, 1, 0, 1])


def test_imbalance_keeps_exponentially_fewer_of_later_classes():
    labels = np.repeat(np.arange(3, dtype=np.int32), 90)
    origin = Provenance("rows", "here", 270, "0")
    train = source.ArraySource(np.zeros((270, 2), np.float32), labels, origin)
    whole = Dataset(train, train, train, ("a", "b", "c"))
    kept = corruption.corrupt(whole, imbalance=9.0).train
    found = kept.read(np.arange(len(kept)))["label"]
    np.testing.assert_array_equal(np.bincount(found), [90, 30, 10])
    again = corruption.corrupt(whole, imbalance=9.0).train
    np.testing.assert_array_equal(source.example_ids(kept), source.example_ids(again))
    assert corruption.corrupt(whole, imbalance=1.0) is whole


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: transforms.make_views(count=0, transforms=()), "count"),
        (lambda: transforms.make_views(transforms=["solarise"]), "solarize"),
        (lambda: transforms.make_views(transforms=[("solarize", {"p": 1})]), "solarize"),
        (lambda: transforms.make_color_jitter(hue=0.7), "hue"),
        (lambda: transforms.make_gaussian_blur(sigma=(2.0, 1.0)), "sigma"),
        (lambda: transforms.make_grayscale(probability=2), "probability"),
        (lambda: transforms.make_coarse_labels(groups=(-1,)), "groups"),
        (lambda: transforms.make_solarize()(KEY, make_batch([0]), STEP), "scale"),
        (lambda: transforms.make_color_jitter(hue=0.1)(KEY, floats([0], c=1), STEP), "colour"),
    ],
)
def test_mistakes_are_refused(make, match):
    with pytest.raises(ConfigError, match=match):
        make()
