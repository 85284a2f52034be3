"""What configs of self-supervised methods set that their golden dumps do not show."""

import importlib
from typing import Any

import numpy as np
import pytest

from distill_jax.configs import self_supervised
from distill_jax.core import steps
from distill_jax.run import config as config_lib


def load(name, arg=""):
    return importlib.import_module(f"distill_jax.configs.ssl.{name}").get_config(arg)


@pytest.mark.parametrize("name", ["dino", "ibot", "mugs", "continual", "ijepa", "tjepa"])
def test_methods_of_the_dino_family_are_evaluated_on_the_average(name):
    evaluators = load(name).evaluators
    assert len(evaluators) >= 3
    assert all(kwargs["role"] == "target" for kwargs in evaluators.values())


def test_the_averages_of_byol_have_one_decay():
    changed = config_lib.override(load("byol"), {"roles.target.decay": 0.9})
    assert changed.roles.target.decay == changed.roles.target_projector.decay == 0.9


def test_ijepa_flips_nothing():
    assert load("ijepa", "fashion").data.transform_kwargs.random_resized_crop.flip == 0
    assert "flip" not in load("mae", "fashion").data.transform_kwargs.random_resized_crop


@pytest.mark.parametrize("name", ["ibot", "ijepa", "mae"])
def test_networks_with_fixed_positions_see_standardized_pixels(name):
    """Beside pixels from 0 to 1, positions are most of an untrained token."""
    config = load(name)
    assert config.roles.student.kwargs.positions == "fourier"
    assert config.data.eval_transforms[-1] == "normalize"
    views = config.data.transform_kwargs.get("views")
    chain = config.data.train_transforms if views is None else views.transforms
    assert "normalize" in chain


@pytest.mark.parametrize("name", ["ibot", "ijepa", "mae"])
def test_patches_of_clothes_divide_the_images_of_a_smoke(name):
    config = config_lib.smoke(load(name, "fashion"))
    assert config.data.kwargs.image_size % config.roles.student.kwargs.patch_size == 0
    assert config_lib.smoke(load("simclr", "fashion")).data.kwargs.image_size == 16


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_an_average_of_a_short_run_forgets_its_start(schedule):
    def left(decay, total):
        at: Any = steps.rising_decay(decay, schedule, total)
        return np.prod([float(at(t)) for t in range(total)])

    assert left(0.996, 600) == pytest.approx(0.3, abs=0.01)
    assert left(self_supervised.forgetting(600), 600) < 1e-6
