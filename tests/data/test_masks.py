"""What the samplers of masks promise: disjoint, exact, independent, everywhere, on any grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.data import masks, transforms


def batch_of(b: int, x) -> dict:
    ids = np.arange(b, dtype=np.int32)
    return {"input": x, "index": ids, "epoch": np.zeros(b, np.int32), "mask": np.ones(b)}


def images(b: int, side: int) -> dict:
    return batch_of(b, jnp.zeros((b, side, side, 1)))


def table(b: int, c: int, m: int) -> dict:
    return batch_of(b, {"categorical": jnp.zeros((b, c), jnp.int32), "numeric": jnp.zeros((b, m))})


def draw(transform, batch) -> dict:
    made = jax.jit(lambda batch: transform(jax.random.key(5), batch, jnp.int32(0)))(batch)
    return {k: np.asarray(made[k]) for k in ("keep", "targets", "hidden")}


CASES = [
    ("random_masks", {"patch_size": 2}, images(500, 8), 16, 4, (1, 12)),
    ("random_masks", {"patch_size": 1, "ratio": 0.99}, images(500, 2), 4, 1, (1, 3)),
    ("block_masks", {"patch_size": 1}, images(500, 2), 4, 2, (4, 1)),
    ("block_masks", {"patch_size": 2}, images(500, 8), 16, 6, (4, 4)),
    ("block_masks", {"patch_size": 1}, images(500, 14), 196, 78, (4, 30)),
    ("column_masks", {}, table(500, 3, 7), 10, 3, (4, 3)),
]


@pytest.mark.parametrize(("name", "kwargs", "batch", "t", "n", "sets"), CASES)
def test_sets_are_exact_disjoint_and_reach_every_token(name, kwargs, batch, t, n, sets):
    found = draw(transforms.resolve(name)(**kwargs), batch)
    keep, targets, hidden = found["keep"], found["targets"], found["hidden"]
    assert keep.shape == (500, n)
    assert targets.shape == (500, *sets)
    assert hidden.shape == (500, t)
    for row in range(500):
        kept = set(keep[row].tolist())
        assert len(kept) == n or name == "block_masks"
        assert not kept & set(targets[row].ravel().tolist())
        assert all(len(set(one)) == sets[1] for one in targets[row].tolist())
        assert kept == set(np.flatnonzero(~hidden[row]).tolist())
    assert set(keep.ravel().tolist()) == set(range(t))
    assert set(targets.ravel().tolist()) == set(range(t))
    if name != "block_masks":  # where all places are alike, each is as likely as any other
        share = np.bincount(keep.ravel(), minlength=t) / 500
        assert np.abs(share - n / t).max() < 5 * np.sqrt(n / t * (1 - n / t) / 500)


def agreement(targets) -> list[float]:
    """How often two sets of an example `[b, 4, n]` are the same."""
    sets = np.sort(targets, -1)
    pairs = [(i, j) for i in range(4) for j in range(i)]
    return [float((sets[:, i] == sets[:, j]).all(-1).mean()) for i, j in pairs]


@pytest.mark.parametrize(
    ("name", "kwargs", "batch", "chance"),
    [
        # Two sets of 3 of the 7 columns that are not kept agree in one draw of 35.
        ("column_masks", {}, table(2000, 3, 7), 1 / 35),
        # Two shapes of 6 tokens, 5x6 or 6x5 on the 14x14 grid, at 90 places each.
        ("block_masks", {"patch_size": 1}, images(2000, 14), 1 / 180),
    ],
)
def test_targets_are_drawn_independently(name, kwargs, batch, chance):
    for share in agreement(draw(transforms.resolve(name)(**kwargs), batch)["targets"]):
        assert abs(share - chance) < 5 * np.sqrt(chance / 2000)


def test_sets_that_share_memory_would_be_noticed():
    """What public code does: one array is shuffled in place, and sets are views of it."""
    random, order, sets = np.random.RandomState(0), np.arange(10), []
    for _ in range(200):
        slices = []
        for _ in range(4):
            random.shuffle(order)
            slices.append(order[:3])
        sets.append(np.stack(slices))
    assert agreement(np.stack(sets)) == [1.0] * 6


def test_tubes_hide_the_same_places_of_all_frames():
    clips = batch_of(300, jnp.zeros((300, 4, 8, 8, 1)))
    transform = masks.make_tube_masks(patch_size=2, sets=((3, 0.25, 0.5), (1, 0.56, 0.75)))
    made = jax.jit(lambda batch: transform(jax.random.key(5), batch, jnp.int32(0)))(clips)
    for end, hide in (("", 8), ("_1", 12)):
        keep, targets = np.asarray(made[f"keep{end}"]), np.asarray(made[f"targets{end}"])
        assert keep.shape == (300, 2 * (16 - hide))
        assert targets.shape == (300, 1, 2 * hide)
        for kept, hidden in zip(keep, targets[:, 0], strict=True):
            assert sorted([*kept, *hidden]) == list(range(32))
            assert set(hidden[hidden < 16] + 16) == set(hidden[hidden >= 16])
        assert set(targets.ravel()) == set(range(32))
    assert set(np.asarray(made["keep"]).ravel()) == set(range(32))
    # One block of 9 of 16 places, and 3 more: a 3x3 square is among what is hidden.
    for hidden in np.asarray(made["targets_1"])[:, 0]:
        field = np.isin(np.arange(16), hidden).reshape(4, 4)
        assert any(field[i : i + 3, j : j + 3].all() for i in (0, 1) for j in (0, 1))


def test_images_become_tables_of_their_pixels():
    pixels = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4, 1)
    found = transforms.make_columns()(jax.random.key(0), {"input": pixels}, jnp.int32(0))["input"]
    np.testing.assert_allclose(found["numeric"], pixels.reshape(2, 12) / 255, rtol=1e-6)
    assert found["categorical"].shape == (2, 0)


def test_blocks_are_rectangles_of_the_ranges():
    found = draw(masks.make_block_masks(patch_size=1), images(300, 14))
    sides = set()
    for block in found["targets"].reshape(-1, 30):
        rows, columns = np.unique(block // 14), np.unique(block % 14)
        assert len(rows) * len(columns) == 30
        assert rows[-1] - rows[0] + 1 == len(rows)
        assert columns[-1] - columns[0] + 1 == len(columns)
        sides.add((len(rows), len(columns)))
    assert sides == {(5, 6), (6, 5)}
    # Context beside targets: more than half of what is kept is kept once.
    assert min(len(set(row)) for row in found["keep"].tolist()) >= 39
    assert np.mean([len(set(row)) for row in found["keep"].tolist()]) > 70


@pytest.mark.parametrize(
    ("grid", "want"),
    [((2, 2), {(1, 1)}), ((4, 4), {(2, 2)}), ((14, 14), {(5, 6), (6, 5)}), ((1, 1), set())],
)
def test_shapes_of_blocks_exist_on_any_grid(grid, want):
    found = masks.block_shapes(grid, scale=(0.15, 0.2), aspect=(0.75, 1.5))
    assert set(found) == want


def test_masks_are_functions_of_seed_epoch_and_example():
    transform = masks.make_random_masks(patch_size=2)
    batch = images(6, 8)
    whole = draw(transform, batch)
    part = jax.tree.map(lambda x: x[jnp.array([4, 1])], batch)
    np.testing.assert_array_equal(draw(transform, part)["keep"], whole["keep"][[4, 1]])
    later = draw(transform, {**batch, "epoch": batch["epoch"] + 1})
    assert (later["keep"] != whole["keep"]).any()


@pytest.mark.parametrize(
    ("name", "kwargs", "batch", "match"),
    [
        ("random_masks", {"patch_size": 2, "ratio": 1.0}, images(2, 8), "between 0 and 1"),
        ("random_masks", {"patch_size": 3}, images(2, 8), "divisors: 1, 2, 4, 8"),
        ("random_masks", {"patch_size": 8}, images(2, 8), "a smaller patch"),
        ("random_masks", {"patch_size": 2}, table(2, 1, 1), "column_masks"),
        ("block_masks", {"patch_size": 4, "scale": (0.9, 0.5)}, images(2, 8), "not a range"),
        ("block_masks", {"patch_size": 8}, images(2, 8), "smaller patches"),
        (
            "block_masks",
            {"patch_size": 2, "scale": (0.9, 0.9), "keep": 0.9},
            images(2, 8),
            "smaller blocks",
        ),
        ("column_masks", {"context": 0.6, "target": 0.6}, table(2, 0, 5), "smaller shares"),
        ("column_masks", {"targets": 0}, table(2, 0, 5), "1 or more"),
        ("column_masks", {}, images(2, 8), "block_masks"),
        ("tube_masks", {"patch_size": 2}, images(2, 8), "block_masks"),
        ("tube_masks", {"patch_size": 2, "sets": ((0, 0.5, 0.5),)}, images(2, 8), "such as"),
    ],
)
def test_impossible_masks_are_refused(name, kwargs, batch, match):
    with pytest.raises(ConfigError) as error:
        draw(transforms.resolve(name)(**kwargs), batch)
    assert match in str(error.value)
