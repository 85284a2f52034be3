"""Code shared by the networks for tables: checks, embedding tables, linear parts and hidden layers.

A table is `{"categorical": int32 [b, c], "numeric": float32 [b, m]}`; either may have no columns,
not both. Column j of `categorical` holds ids in [0, cardinalities[j]); an id outside counts as the
nearest one inside its own column, as `mode="clip"` of a gather that knows the columns.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from distill_jax.core import ranges
from distill_jax.core.api import Array
from distill_jax.core.errors import ArgumentError
from distill_jax.models.layers import BatchNorm, Dense, dense_uniform

ROW_MULTIPLE = 128
"""Tables have a multiple of this many rows, so that they split evenly over a mesh axis."""

unit_uniform = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")
"""Uniform in +-1/sqrt(d) for rows of d values, whatever their number."""

unit_normal = nn.initializers.variance_scaling(1.0, "fan_out", "normal")
"""Normal of variance 1/d for rows of d values, which are then of unit length on average."""


def check(
    *,
    cardinalities: tuple[int, ...],
    dropout: float,
    drop_path: float = 0.0,
    **sizes: int | tuple[int, ...],
) -> None:
    """Raises an error for sizes that are not whole numbers above 0, and for invalid rates."""
    named: dict[str, Any] = {"cardinalities": cardinalities, **sizes}
    ranges.sizes(**named)
    ranges.rates(dropout=dropout, drop_path=drop_path)
    n_rows(cardinalities)


def read(inputs: Any, cardinalities: tuple[int, ...]) -> tuple[Array, Array]:
    """Returns the ids `[b, c]`, clipped column by column, and the numeric values `[b, m]`.

    Raises:
      ArgumentError: the input is not a table, or not one with these categorical columns.
    """
    if not isinstance(inputs, Mapping) or not {"categorical", "numeric"} <= set(inputs):
        raise ArgumentError(
            "the input is not a table",
            where="input",
            hint='{"categorical": int [b, c], "numeric": float [b, m]} is needed',
        )
    ids, numeric = inputs["categorical"], inputs["numeric"]
    shapes = f"categorical {ids.dtype} {ids.shape}, numeric {numeric.dtype} {numeric.shape}"
    floating = jnp.issubdtype(numeric.dtype, jnp.floating)
    if ids.ndim != 2 or numeric.ndim != 2 or ids.dtype.kind not in "iu" or not floating:
        hint = "integers [b, c] and floating-point numbers [b, m] are needed"
        raise ArgumentError(f"the table has {shapes}", where="input", hint=hint)
    if ids.shape[1] != len(cardinalities):
        raise ArgumentError(
            f"{len(cardinalities)} cardinalities for {ids.shape[1]} categorical columns",
            where="cardinalities",
            hint="leave cardinalities out: they are taken from the data",
        )
    if not ids.shape[1] + numeric.shape[1]:
        raise ArgumentError("the table has no columns", where="input", hint="one is needed")
    top = np.asarray(cardinalities, np.int32) - 1
    return jnp.clip(ids.astype(jnp.int32), 0, top[None]), numeric


def n_rows(cardinalities: tuple[int, ...]) -> int:
    """Returns the number of rows of one table for all columns, a multiple of `ROW_MULTIPLE`.

    Raises:
      ArgumentError: int32 cannot count them.
    """
    rows = -(-sum(cardinalities) // ROW_MULTIPLE) * ROW_MULTIPLE
    if rows >= 2**31:
        raise ArgumentError(
            f"the categorical columns have {sum(cardinalities)} values",
            where="cardinalities",
            hint=f"fewer than {2**31}: hash the large columns into fewer",
        )
    return rows


def lookup(table: Array, ids: Array, cardinalities: tuple[int, ...]) -> Array:
    """Returns rows `[b, c, d]` of a table whose columns lie one after another."""
    offsets = np.cumsum((0, *cardinalities[:-1]), dtype=np.int32)
    return jnp.take(table, ids + offsets[None], axis=0, mode="clip")


class Fields(nn.Module):
    """One vector for each column: a row of the table, or a learned vector times the value.

    Attributes:
      cardinalities: of the categorical columns.
      features: d.
      init: of the table `embedding` and the vectors `numeric` `[m, d]`.
    """

    cardinalities: tuple[int, ...]
    features: int
    init: nn.initializers.Initializer = unit_normal

    @nn.compact
    def __call__(self, ids: Array, numeric: Array) -> Array:
        """Returns `[b, c + m, d]`, categorical columns first."""
        parts = []
        if self.cardinalities:
            shape = (n_rows(self.cardinalities), self.features)
            table = self.param("embedding", self.init, shape)
            parts.append(lookup(table, ids, self.cardinalities))
        if m := numeric.shape[1]:
            vectors = self.param("numeric", self.init, (m, self.features))
            numeric, vectors = promote_dtype(numeric, vectors)
            parts.append(numeric[:, :, None] * vectors[None])
        return jnp.concatenate(parts, axis=1)


def features(
    ids: Array, numeric: Array, cardinalities: tuple[int, ...], embedding_dim: int
) -> Array:
    """Returns embedded ids and numeric values side by side, `[b, c d + m]`; makes `fields`."""
    if not cardinalities:
        return numeric
    embedded = Fields(cardinalities, embedding_dim, name="fields")(ids, numeric[:, :0])
    return jnp.concatenate([embedded.reshape(ids.shape[0], -1), numeric], axis=1)


class Linear(nn.Module):
    """A linear map `[b, d]` to `[b, features]` without a bias."""

    features: int
    kernel_init: nn.initializers.Initializer = dense_uniform

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        x, kernel = promote_dtype(x, kernel)
        return x @ kernel


class Wide(nn.Module):
    """A linear model of one-hot ids and numeric values: `[b, features]`, 0 at first, no bias.

    The weights of the ids are the rows of a table, also called `embedding`.
    """

    cardinalities: tuple[int, ...]
    features: int

    @nn.compact
    def __call__(self, ids: Array, numeric: Array) -> Array:
        parts, zeros = [], nn.initializers.zeros
        if self.cardinalities:
            table = self.param("embedding", zeros, (n_rows(self.cardinalities), self.features))
            parts.append(lookup(table, ids, self.cardinalities).sum(1))
        if numeric.shape[1]:
            parts.append(Linear(self.features, zeros, name="numeric")(numeric))
        return sum(parts[1:], parts[0])


class Tower(nn.Module):
    """Hidden layers as those of `mlp`; returns the last one and the endpoints of all.

    Attributes:
      hidden: widths; without any, the input is returned.
      dropout: rate after every layer.
      batch_norm: whether to normalize before every activation.
    """

    hidden: tuple[int, ...]
    dropout: float
    batch_norm: bool

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> tuple[Array, dict[str, Array]]:
        outputs = {}
        for stage, width in enumerate(self.hidden, start=1):
            x = Dense(width)(x)
            if self.batch_norm:
                x = BatchNorm()(x, train=train)
            outputs[f"stage{stage}_pre"] = x
            x = outputs[f"stage{stage}"] = jax.nn.relu(x)
            if self.dropout:
                x = nn.Dropout(self.dropout)(x, deterministic=not train)
        return x, outputs
