"""Draws and checks that transforms share."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from distill_jax.core import rng
from distill_jax.core.api import Array, Batch, Key
from distill_jax.core.errors import ArgumentError


def require(condition: bool, what: str, where: str) -> None:
    if not condition:
        raise ArgumentError(what, where=where)


def uniform(key: Key, batch: Batch, *shape: int) -> Array:
    """Returns numbers in [0, 1), `[b, *shape]`: one draw per example, cheap to run and compile."""
    return jax.vmap(lambda k: jax.random.uniform(k, shape))(rng.example_keys(key, batch))


def integer(u: Array, count: Array | int) -> Array:
    return jnp.floor(u * count).astype(jnp.int32)


def require_float(batch: Batch, name: str) -> Array:
    if not jnp.issubdtype(batch["input"].dtype, jnp.floating):
        raise ArgumentError(
            f"{name} of {batch['input'].dtype} images",
            where="batch",
            hint=f"put scale before {name}: it takes values in [0, 1]",
        )
    return batch["input"]


def each(x: Array) -> Array:
    return x[:, None, None, None]


def beta(key: Key, alpha: float) -> Array:
    """Draws from Beta(alpha, alpha) as the share of one of two gamma variates."""
    first, second = jax.random.loggamma(key, alpha, (2,))
    return jax.nn.sigmoid(first - second)


def partner(x: Array) -> Array:
    return jnp.roll(x, 1, axis=0)


def require_images(batch: Batch, name: str) -> None:
    """Raises `ArgumentError`, naming a transform, unless inputs are images `[b, h, w, c]`."""
    images = batch["input"]
    if isinstance(images, Mapping):
        what = "the input is a table, not images"
    elif images.ndim != 4:
        shape = ", ".join(("b", *map(str, images.shape[1:])))
        what = f"takes images [b, h, w, c], and inputs are [{shape}]"
    else:
        return
    raise ArgumentError(what, where=name, hint="leave it out for data that are not images")
