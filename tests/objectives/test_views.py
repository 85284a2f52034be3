"""Views of tables, which are dictionaries of arrays, reach networks row by row as images do."""

import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.objectives import _views

R = np.random.default_rng(0)
TABLE = {
    "categorical": jnp.asarray(R.integers(0, 9, (4, 3, 2))),
    "numeric": jnp.asarray(R.normal(size=(4, 3, 5))),
}


def nets(role, rows, *, train, stop_gradient_params):
    return {"embedding": jnp.concatenate([rows["categorical"], rows["numeric"]], 1)}, {}


def test_views_of_a_table_are_encoded_row_by_row():
    found, _ = _views.encode(nets, "student", _views.views_of({"views": TABLE}))
    assert found.shape == (4, 3, 7)
    for v in range(3):
        want, _ = nets(
            "student",
            {k: x[:, v] for k, x in TABLE.items()},
            train=True,
            stop_gradient_params=False,
        )
        np.testing.assert_array_equal(found[:, v], want["embedding"])


def test_views_of_a_table_are_counted_and_taken():
    assert _views.count(TABLE) == 3
    taken = _views.take(TABLE, 1, 3)
    np.testing.assert_array_equal(taken["numeric"], TABLE["numeric"][:, 1:])
    np.testing.assert_array_equal(taken["categorical"], TABLE["categorical"][:, 1:])
    with pytest.raises(ConfigError, match="3 views where the method compares 4"):
        _views.views_of({"views": TABLE}, least=4)
    with pytest.raises(ConfigError, match="batches have no 'views'"):
        _views.views_of({})
