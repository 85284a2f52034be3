"""`spec` tells what `make` will give."""

import importlib

import jax
import numpy as np
import pytest

from tests import harness

KWARGS = {
    "synthetic": {"n_train": 103, "num_classes": 5, "held_out": 0.25},
    "fashion_mnist_5k": {"held_out": 0.13},
    "kdd99_attack_types": {"held_out": 0.2},
    "adult": {"held_out": 0.13},
    "letter": {"held_out": 0.13},
    "adult, uci": {"held_out": 0.13, "split": "uci"},
    "synthetic_table": {"n_train": 103, "num_classes": 5, "imbalance": 7.0, "held_out": 0.25},
    "arithmetic_chains": {"n_train": 103, "held_out": 0.13, "steps": (2, 4)},
    "synthetic_table, numeric": {"cardinalities": (), "numeric": 3, "n_test": 31},
}


@pytest.mark.parametrize("name", KWARGS)
def test_spec_equals_make(name):
    module = importlib.import_module(f"distill_jax.data.{name.partition(',')[0]}")
    made, shapes = module.make(**KWARGS[name]), module.spec(**KWARGS[name])
    assert shapes.classes == made.classes and shapes.cardinalities == made.cardinalities
    for part in ("train", "held_out", "test"):
        want, got = getattr(made, part), getattr(shapes, part)
        assert len(got) == len(want)
        rows = np.arange(3)
        want, got = want.read(rows), got.read(rows)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), dict(want)) == jax.tree.map(
            lambda x: (x.shape, x.dtype), dict(got)
        )


def test_every_data_module_is_found():
    images = {"fashion_mnist_5k", "digits", "idx_folder", "npz_file", "tfds", "synthetic"}
    tables = {
        "kdd99_attack_types",
        "adult",
        "letter",
        "nsl_kdd",
        "census_income",
        "criteo",
        "avazu",
    }
    of_users = {"image_folder", "table_file", "hf_folder"}
    assert images | tables | of_users | {"synthetic_table"} <= set(harness.modules("data"))
