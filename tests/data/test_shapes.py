"""`spec` tells what `make` will give."""

import importlib

import jax
import numpy as np
import pytest

from tests import harness

KWARGS = {
    "synthetic": {"n_train": 103, "num_classes": 5, "held_out": 0.25},
    "fashion_mnist_5k": {"held_out": 0.13},
}


@pytest.mark.parametrize("name", KWARGS)
def test_spec_equals_make(name):
    module = importlib.import_module(f"distill_jax.data.{name}")
    made, shapes = module.make(**KWARGS[name]), module.spec(**KWARGS[name])
    assert shapes.classes == made.classes
    for part in ("train", "held_out", "test"):
        want, got = getattr(made, part), getattr(shapes, part)
        assert len(got) == len(want)
        rows = np.arange(3)
        want, got = want.read(rows), got.read(rows)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), dict(want)) == jax.tree.map(
            lambda x: (x.shape, x.dtype), dict(got)
        )


def test_every_data_module_is_found():
    assert {"fashion_mnist_5k", "digits", "idx_folder", "npz_file", "tfds", "synthetic"} <= set(
        harness.modules("data")
    )
