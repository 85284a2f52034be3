"""Augmentation: pure, keyed on (seed, epoch, example), and equal to plain NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax.core import rng
from distill_jax.core.errors import ConfigError
from distill_jax.data import transforms

KEY = jax.random.key(3)
STEP = jnp.int32(5)
GEOMETRY = {
    "random_crop": {"padding": 2},
    "horizontal_flip": {},
    "rotation": {"degrees": 30.0},
    "random_erasing": {"probability": 0.7},
}


def make_batch(index, *, epoch=0, h=8, w=6, c=3, dtype: type = np.uint8):
    """Images are a function of the example id alone."""
    index = np.asarray(index)
    images = [np.random.default_rng(int(i)).integers(0, 256, (h, w, c)) for i in index]
    return {
        "input": jnp.asarray(np.stack(images), dtype),
        "label": jnp.asarray(index % 4, jnp.int32),
        "index": jnp.asarray(index, jnp.int32),
        "epoch": jnp.full(len(index), epoch, jnp.int32),
        "mask": jnp.ones(len(index), jnp.float32),
    }


def all_transforms():
    steps = {name: transforms.resolve(name)(**kwargs) for name, kwargs in GEOMETRY.items()}
    steps["normalize"] = transforms.make_normalize(mean=(0.1, 0.2, 0.3), std=0.5)
    return transforms.compose(steps)


def test_names_resolve_and_typos_get_a_hint():
    assert transforms.resolve("random_crop") is transforms.make_random_crop
    with pytest.raises(ConfigError, match="did you mean 'horizontal_flip'"):
        transforms.resolve("horizontal_flop")


def each_and_all(key, batch, step):
    """The result of every transform alone, and of all after one another."""
    single = {
        n: transforms.resolve(n)(**kw)(key, batch, step)["input"] for n, kw in GEOMETRY.items()
    }
    return {**single, "all": all_transforms()(key, batch, step)["input"]}


def test_an_example_is_augmented_alike_in_any_batch():
    apply = jax.jit(each_and_all)
    batch, order = make_batch(np.arange(12)), np.array([7, 2, 11, 5])
    whole, again = apply(KEY, batch, STEP), apply(KEY, batch, STEP)
    part = apply(KEY, make_batch(order), STEP + 3)
    epoch = apply(KEY, make_batch(np.arange(12), epoch=1), STEP)
    other = apply(jax.random.key(4), batch, STEP)
    for name, images in whole.items():
        np.testing.assert_array_equal(again[name], images)
        np.testing.assert_allclose(part[name], images[order], rtol=0, atol=1e-6, err_msg=name)
        assert (np.asarray(epoch[name]) != np.asarray(images)).any()
        assert (np.asarray(other[name]) != np.asarray(images)).any()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_keeps_dtype_shape_and_the_rest(name, dtype):
    batch = make_batch(np.arange(6), dtype=dtype)
    transform = transforms.resolve(name)(**GEOMETRY[name])
    out = jax.eval_shape(transform, KEY, batch, STEP)
    assert out == jax.eval_shape(lambda: batch)


def test_eight_devices_give_what_one_gives_and_examples_need_no_communication():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    batch = make_batch(np.arange(16))
    split = jax.device_put(batch, rows)
    alone = jax.jit(all_transforms())
    compiled = alone.lower(KEY, split, STEP).compile()
    text = compiled.as_text() or ""
    assert text and not any(op in text for op in ("all-gather", "all-reduce", "collective-permute"))

    mixed = transforms.make_mixup(num_classes=4)
    pasted = transforms.make_cutmix(num_classes=4)
    mix = jax.jit(transforms.compose({"mixup": mixed, "cut": pasted}))
    single, meshed = alone(KEY, batch, STEP), compiled(KEY, split, STEP)
    for one, other in ((single, meshed), (mix(KEY, single, STEP), mix(KEY, meshed, STEP))):
        assert other["input"].sharding.is_equivalent_to(rows, 4)
        for key in one:
            np.testing.assert_allclose(other[key], one[key], rtol=1e-5, atol=1e-5, err_msg=key)


def test_composed_transforms_draw_from_streams_of_their_names():
    flip, crop = transforms.make_horizontal_flip(), transforms.make_random_crop()
    batch = make_batch(np.arange(10))

    def by_hand(key, batch, step):
        return flip(rng.stream(key, "b"), crop(rng.stream(key, "a"), batch, step), step)

    alone = jax.jit(by_hand)(KEY, batch, STEP)
    both = jax.jit(transforms.compose({"a": crop, "b": flip}))(KEY, batch, STEP)
    np.testing.assert_array_equal(both["input"], alone["input"])


def test_normalize_and_scale():
    batch = make_batch(np.arange(3))
    out = transforms.make_normalize(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))(KEY, batch, STEP)
    expected = (np.asarray(batch["input"]) / 255 - [0.1, 0.2, 0.3]) / [1, 2, 4]
    np.testing.assert_allclose(out["input"], expected, rtol=1e-5, atol=1e-6)
    assert out["input"].dtype == np.float32
    scaled = transforms.make_scale()(KEY, batch, STEP)
    np.testing.assert_allclose(scaled["input"], np.asarray(batch["input"]) / 255, rtol=1e-6)
    assert transforms.make_scale()(KEY, scaled, STEP)["input"].max() == scaled["input"].max()
    with pytest.raises(ConfigError, match="std must be positive"):
        transforms.make_normalize(mean=0.0, std=0.0)


def test_downscale():
    batch = make_batch(np.arange(3))
    image = np.asarray(batch["input"], np.float64) / 255
    h, w = image.shape[1] // 2, image.shape[2] // 2
    out = transforms.make_downscale(factor=2)(KEY, batch, STEP)["input"]
    for i in range(h):
        for j in range(w):
            want = image[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2))
            np.testing.assert_allclose(out[:, i, j], want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="do not divide by 5"):
        transforms.make_downscale(factor=5)(KEY, batch, STEP)
    with pytest.raises(ConfigError, match="factor is 0"):
        transforms.make_downscale(factor=0)


@pytest.mark.parametrize("mode", ["constant", "reflect"])
@pytest.mark.parametrize("x64", [False, True])
def test_crop_against_numpy(mode, x64):
    images = np.asarray(make_batch(np.arange(9))["input"])
    offsets = np.stack(np.meshgrid([0, 3, 6], [1, 3, 5]), -1).reshape(9, 2)
    with jax.enable_x64(x64):
        at = jnp.asarray(offsets, jnp.int32)  # also where integers have 64 bits by default
        got = transforms.crop(jnp.asarray(images), at, padding=3, mode=mode)
    for image, (top, left), out in zip(images, offsets, np.asarray(got), strict=True):
        expected = np.zeros_like(image)
        for y in range(8):
            for x in range(6):
                v, u = y + top - 3, x + left - 3
                if mode == "reflect":
                    v, u = abs(v), abs(u)
                    v, u = 7 - abs(7 - v), 5 - abs(5 - u)
                if 0 <= v < 8 and 0 <= u < 6:
                    expected[y, x] = image[v, u]
        np.testing.assert_array_equal(out, expected)


def test_crop_offsets_are_uniform():
    n, p = 2000, 2
    images = jnp.zeros((n, 8, 6, 1), jnp.uint8).at[:, 4, 3, 0].set(1)
    batch = {
        "input": images,
        "index": jnp.arange(n, dtype=jnp.int32),
        "epoch": jnp.zeros(n, jnp.int32),
    }
    crop = jax.jit(transforms.make_random_crop(padding=p))
    out = np.asarray(crop(KEY, batch, STEP)["input"])
    y, x = out[..., 0].reshape(n, -1).argmax(1) // 6, out[..., 0].reshape(n, -1).argmax(1) % 6
    counts = np.zeros((5, 5))
    np.add.at(counts, (y - 2, x - 1), 1)
    assert counts.sum() == n
    # Chi-squared with 24 degrees of freedom: 51 is its 0.999 quantile.
    assert ((counts - n / 25) ** 2 / (n / 25)).sum() < 51


def test_half_of_the_images_are_flipped():
    n = 1000
    batch = make_batch(np.arange(n), h=1, w=4, c=1)
    out = np.asarray(jax.jit(transforms.make_horizontal_flip())(KEY, batch, STEP)["input"])
    before = np.asarray(batch["input"])
    flipped = (out == before[:, :, ::-1]).all((1, 2, 3))
    assert (flipped | (out == before).all((1, 2, 3))).all()
    assert abs(flipped.mean() - 0.5) < 4 * 0.5 / math.sqrt(n)
    always = transforms.make_horizontal_flip(probability=1.0)(KEY, batch, STEP)["input"]
    np.testing.assert_array_equal(always, before[:, :, ::-1])


def numpy_rotate(image, degrees, fill):
    """Inverse map and bilinear interpolation, pixel by pixel."""
    h, w, _ = image.shape
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), constant_values=fill)
    out = np.full(image.shape, float(fill))
    turn = np.exp(1j * np.deg2rad(degrees))
    for i in range(h):
        for j in range(w):
            # The complex plane has its imaginary axis upwards, rows count downwards.
            point = complex(j - (w - 1) / 2, (h - 1) / 2 - i) / turn
            y, x = (h - 1) / 2 - point.imag + 1, point.real + (w - 1) / 2 + 1
            if not (0 <= y <= h + 1 and 0 <= x <= w + 1):
                continue
            v, u = min(int(y), h), min(int(x), w)
            a, b = y - v, x - u
            out[i, j] = (1 - a) * ((1 - b) * padded[v, u] + b * padded[v, u + 1]) + a * (
                (1 - b) * padded[v + 1, u] + b * padded[v + 1, u + 1]
            )
    return out


@pytest.mark.parametrize("fill", [0.0, 7.0])
def test_rotation_against_numpy(fill):
    images = np.asarray(make_batch(np.arange(5), dtype=np.float32)["input"])
    degrees = np.array([0.0, 13.0, -40.0, 90.0, 171.0], np.float32)
    rotate = jax.jit(functools.partial(transforms.rotate, fill=fill))
    got = np.asarray(rotate(jnp.asarray(images), jnp.asarray(degrees)))
    for image, angle, out in zip(images, degrees, got, strict=True):
        np.testing.assert_allclose(out, numpy_rotate(image, angle, fill), atol=2e-3)
    whole = rotate(jnp.asarray(images, jnp.uint8), jnp.asarray(degrees))
    assert np.abs(np.asarray(whole, np.float32) - got).max() <= 0.5 + 1e-3


def test_a_quarter_turn_is_counter_clockwise():
    square = np.asarray(make_batch([1, 2], h=5, w=5)["input"])
    got = jax.jit(transforms.rotate)(jnp.asarray(square), jnp.array([90.0, -90.0]))
    np.testing.assert_array_equal(got[0], np.rot90(square[0]))
    np.testing.assert_array_equal(got[1], np.rot90(square[1], -1))


def test_erased_rectangles():
    n, h, w = 400, 16, 12
    batch = {
        "input": jnp.full((n, h, w, 1), 9, jnp.uint8),
        "index": jnp.arange(n, dtype=jnp.int32),
        "epoch": jnp.zeros(n, jnp.int32),
    }
    erasing = transforms.make_random_erasing(probability=0.5, area=(0.1, 0.3), fill=4)
    out = np.asarray(jax.jit(erasing)(KEY, batch, STEP)["input"])[..., 0]
    assert set(np.unique(out)) == {4, 9}
    gone = out == 4
    hit = gone.any((1, 2))
    assert abs(hit.mean() - 0.5) < 4 * 0.5 / math.sqrt(n)
    rows, columns = gone.any(2), gone.any(1)
    np.testing.assert_array_equal(gone.sum((1, 2)), rows.sum(1) * columns.sum(1))
    share = gone[hit].mean((1, 2))
    assert 0.05 < share.min() < 0.13 and 0.25 < share.max() < 0.36
    assert rows[hit][:, 0].any() and rows[hit][:, -1].any()
    ratio = np.log(rows[hit].sum(1) / columns[hit].sum(1))
    assert ratio.min() < -0.7 and ratio.max() > 0.7


def test_box_mask_is_exclusive_at_the_end():
    mask = np.asarray(transforms.box_mask(jnp.array([1, 3, 0, 2]), 4, 3))
    expected = np.zeros((4, 3), bool)
    expected[1:3, 0:2] = True
    np.testing.assert_array_equal(mask, expected)


def numpy_cutmix_box(lam, cy, cx, h, w):
    half_h, half_w = int(h * math.sqrt(1 - lam)) // 2, int(w * math.sqrt(1 - lam)) // 2
    return [max(cy - half_h, 0), min(cy + half_h, h), max(cx - half_w, 0), min(cx + half_w, w)]


def test_cutmix_box_against_python():
    for lam in (0.013, 0.3, 0.77, 1.0):
        for cy, cx in ((0, 0), (4, 9), (11, 19)):
            got = transforms.cutmix_box(jnp.float32(lam), jnp.array([cy, cx]), 12, 20)
            assert got.tolist() == numpy_cutmix_box(np.float32(lam), cy, cx, 12, 20)


def test_mixup_mixes_inputs_and_labels_alike():
    batch = make_batch(np.arange(8), dtype=np.float32)
    mix = jax.jit(transforms.make_mixup(num_classes=4))
    out = mix(KEY, batch, STEP)
    probs = np.asarray(out["label_probs"])
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-6)
    x, onehot = np.asarray(batch["input"]), np.eye(4)[np.asarray(batch["label"])]
    lam = probs[1, 1]
    assert 0 < lam < 1
    np.testing.assert_allclose(probs, lam * onehot + (1 - lam) * np.roll(onehot, 1, 0), rtol=1e-5)
    expected = lam * x + (1 - lam) * np.roll(x, 1, 0)
    np.testing.assert_allclose(out["input"], expected, rtol=1e-4, atol=1e-3)
    later = mix(KEY, batch, STEP + 1)["label_probs"]
    assert abs(later[1, 1] - lam) > 1e-4


def test_mixup_weights_follow_their_distribution():
    batch = make_batch(np.arange(2), h=1, w=1, c=1, dtype=np.float32)
    mix = transforms.make_mixup(num_classes=4, alpha=0.4)
    steps = jnp.arange(2000)
    lam = jax.jit(jax.vmap(lambda s: mix(KEY, batch, s)["label_probs"][0, 0]))(steps)
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)).
    assert abs(float(lam.mean()) - 0.5) < 0.04
    assert abs(float(lam.var()) - 1 / (4 * 1.8)) < 0.01


def test_mixup_of_integers_is_refused():
    with pytest.raises(ConfigError, match="put scale or normalize before"):
        transforms.make_mixup(num_classes=4)(KEY, make_batch(np.arange(2)), STEP)
    for make in (transforms.make_mixup, transforms.make_cutmix):
        with pytest.raises(ConfigError, match="alpha"):
            make(num_classes=4, alpha=0.0)


def test_cutmix_pastes_one_box_and_weighs_by_its_area():
    batch = make_batch(np.arange(8))
    cut = jax.jit(transforms.make_cutmix(num_classes=4))
    before, after = np.asarray(batch["input"]), np.roll(np.asarray(batch["input"]), 1, 0)
    areas = []
    for step in range(20):
        out = cut(KEY, batch, jnp.int32(step))
        image, probs = np.asarray(out["input"]), np.asarray(out["label_probs"])
        pasted = (image != before).any((0, 3))
        assert pasted.sum() == pasted.any(0).sum() * pasted.any(1).sum()
        expected = np.where(pasted[None, :, :, None], after, before)
        np.testing.assert_array_equal(image, expected)
        np.testing.assert_allclose(probs[1, 1], 1 - pasted.mean(), atol=1e-6)
        np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-6)
        areas.append(pasted.mean())
    assert min(areas) < 0.1 < 0.4 < max(areas)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_padding_never_reaches_a_row_that_counts(name):
    batch = make_batch(np.arange(8), dtype=np.float32)
    batch["mask"] = batch["mask"].at[jnp.array([3, 7])].set(0)
    poisoned = {**batch, "input": batch["input"].at[jnp.array([3, 7])].set(1e6)}
    mix = jax.jit(transforms.resolve(name)(num_classes=4))
    clean, dirty = mix(KEY, batch, STEP), mix(KEY, poisoned, STEP)
    real = np.asarray(batch["mask"]) > 0
    np.testing.assert_array_equal(clean["input"][real], dirty["input"][real])
    for row in (4, 0):
        np.testing.assert_array_equal(clean["input"][row], batch["input"][row])
        assert clean["label_probs"][row].max() == 1


def test_mixing_twice_mixes_the_probabilities():
    batch = make_batch(np.arange(8), dtype=np.float32)
    both = transforms.compose(
        {
            "cutmix": transforms.make_cutmix(num_classes=4),
            "mixup": transforms.make_mixup(num_classes=4),
        }
    )
    probs = np.asarray(jax.jit(both)(KEY, batch, STEP)["label_probs"])
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-6)
    assert ((probs > 0).sum(1) == 3).all()


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("random_crop", {"mode": "edge"}),
        ("random_crop", {"padding": -1}),
        ("horizontal_flip", {"probability": 1.5}),
        ("rotation", {"degrees": -1}),
        ("random_erasing", {"area": (0.5, 0.2)}),
        ("random_erasing", {"aspect": 0.0}),
        ("cutmix", {"num_classes": 1}),
    ],
)
def test_bad_arguments_are_refused(name, kwargs):
    with pytest.raises(ConfigError, match=name):
        transforms.resolve(name)(**kwargs)
