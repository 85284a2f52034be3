"""Pictures of what a masked method sees and predicts are of its own masks and networks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import report
from distill_jax.core import partition, tokens
from distill_jax.objectives import mae
from distill_jax.report import masks
from distill_jax.run import build, flags, masked
from distill_jax.run import config as config_lib


@pytest.mark.parametrize(("patch", "shape"), [(2, (6, 4, 3)), (1, (3, 5, 1)), (4, (8, 8, 2))])
def test_patches_put_together_are_the_image(patch, shape):
    x = np.random.default_rng(0).normal(size=(3, *shape))
    found = tokens.unpatchify(tokens.patchify(jnp.asarray(x), patch_size=patch), shape=shape)
    np.testing.assert_array_equal(found, jnp.asarray(x))


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_decoder_that_knows_gives_the_image_back(norm_pix):
    images = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6, 6, 2)), jnp.float32)
    patches = tokens.patchify(images, patch_size=2)
    targets = jnp.asarray([[[1, 3, 8]], [[0, 2, 4]], [[5, 6, 7]], [[0, 4, 8]]])
    batch = {"input": images, "keep": targets[:, 0], "targets": targets, "hidden": jnp.ones((4, 9))}
    wrong = 1.0

    def nets(role, *inputs, train):
        assert not train
        if role == "student":
            return {"tokens": jnp.zeros((4, 3, 5))}, {}
        true = tokens.take(patches, targets)
        if norm_pix:
            true = (true - true.mean(-1, keepdims=True)) / true.std(-1, keepdims=True, ddof=1)
        return {"output": wrong * true}, {}

    objective = mae.MAE(norm_pix=norm_pix, epsilon=1e-12)
    [(name, found)] = objective.pictures(nets, batch, {}, 0).items()
    assert name == "prediction"
    np.testing.assert_allclose(found, images, atol=1e-5)
    wrong = 2.0  # only what was hidden is the decoder's
    found = tokens.patchify(objective.pictures(nets, batch, {}, 0)["prediction"], patch_size=2)
    hidden = (np.asarray(targets)[:, 0, :, None] == np.arange(9)).any(1)
    np.testing.assert_array_equal(jnp.abs(found - patches).max(-1) > 1e-3, hidden)


def test_only_shows_what_it_is_told_to():
    images = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4, 1)
    shown = np.array([[True, False, False, False], [False, False, True, True]])
    found = masks.only(images, shown)
    assert found.shape == (2, 4, 4, 4)
    np.testing.assert_array_equal(found[..., :3], images.repeat(3, -1))
    assert np.all(found[0, :2, :2, 3] == 255) and found[0, ..., 3].sum() == 4 * 255
    assert np.all(found[1, 2:, :, 3] == 255) and found[1, ..., 3].sum() == 8 * 255


def test_a_run_stores_and_shows_its_masks(tmp_path, monkeypatch):
    devices, make_mesh = jax.devices()[:1], partition.make_mesh
    monkeypatch.setattr(
        partition, "make_mesh", lambda **kwargs: make_mesh(**kwargs, devices=devices)
    )
    config = flags.load("configs/ssl/mae.py:smoke")
    config.mesh.data = 1
    experiment = build.build(config)
    state = build.initial_state(experiment, jax.random.key(0), config)
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    masked.store(tmp_path, experiment, state, {}, seed=0, write=True)
    stored = dict(np.load(tmp_path / masked.FILE))
    q, h, w, c = stored["images"].shape
    assert q == 6 and stored["hidden"].shape == (6, 16)
    assert np.all(stored["hidden"].sum(1) == 12)
    np.testing.assert_array_equal(stored["predicted"][:, 0], stored["hidden"])
    assert stored["pictures_of"].tolist() == ["prediction"]
    assert stored["pictures"].shape == (1, q, h, w, c)
    seen = masks.only(stored["images"], ~stored["hidden"])[..., 3] == 255
    np.testing.assert_array_equal(stored["pictures"][0][seen], stored["images"][seen])
    assert np.any(stored["pictures"][0][~seen] != stored["images"][~seen])
    text = report.write_run_report(tmp_path).read_text()
    section = re.search(r'<section id="masks">.*?</section>', text, re.S)
    assert section is not None and section[0].count("<img") == 6 * 4
    assert "does not see 75% of their patches" in section[0]


@pytest.mark.parametrize("name", ["ssl/simclr.py", "ssl/tjepa.py", "ssl/ibot.py"])
def test_what_hides_no_patches_of_an_image_has_no_such_picture(name, tmp_path):
    config = flags.load(f"configs/{name}:smoke")
    config.mesh.data = 8
    assert not masked.hides(build.build(config, shapes_only=True))
