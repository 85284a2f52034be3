"""What configs of self-supervised methods set that their golden dumps do not show."""

import importlib

import pytest

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
