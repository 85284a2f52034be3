"""Values of images: scale, normalization, size by averages; columns of tables."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from distill_jax.core.api import Array, Batch, Key, Transform
from distill_jax.data.transforms._draws import require


def scale(images: Array) -> Array:
    """Returns float32: uint8 divided by 255, floats as they are."""
    unit = 1 / 255 if images.dtype == jnp.uint8 else 1.0
    return images.astype(jnp.float32) * unit


def make_scale() -> Transform:
    """Returns a transform to float32 in [0, 1] (see `scale`)."""
    return lambda key, batch, step: {**batch, "input": scale(batch["input"])}


def make_normalize(
    *,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    statistics: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None,
) -> Transform:
    """Returns `(scale(input) - mean) / std`, float32.

    Args:
      mean: one number, or one a channel, on the scale [0, 1].
      std: likewise, positive.
      statistics: gives both where neither is set: those of the training part, by channel.

    Raises:
      ArgumentError: one of both without the other, or none and no statistics; when traced, numbers
        that are not one for each channel.
    """
    require((mean is None) == (std is None), "one of mean and std is set", "normalize")
    if mean is None or std is None:
        require(statistics is not None, "mean and std are not set", "normalize")
        assert statistics is not None
        moments: tuple[Any, Any] = statistics()
    else:
        moments = mean, std
    shift, spread = (np.array(x, np.float32, ndmin=1) for x in moments)
    require(bool((spread > 0).all()), "std must be positive", "normalize.std")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del key, step
        require(
            not isinstance(batch["input"], Mapping), "the input is a table, not images", "normalize"
        )
        images = scale(batch["input"])
        for part, numbers in (("mean", shift), ("std", spread)):
            require(
                len(numbers) in (1, images.shape[-1]),
                f"{len(numbers)} numbers for images of {images.shape[-1]} channels",
                f"normalize.{part}",
            )
        channels = (1,) * (images.ndim - 1) + (-1,)
        images = (images - shift.reshape(channels)) * (1 / spread).reshape(channels)
        return {**batch, "input": images}

    return apply


def make_columns() -> Transform:
    """Returns a transform of images into tables: a numeric column for each pixel (see `scale`)."""

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del key, step
        pixels = scale(batch["input"])
        pixels = pixels.reshape(pixels.shape[0], -1)
        none = jnp.zeros((pixels.shape[0], 0), jnp.int32)
        return {**batch, "input": {"categorical": none, "numeric": pixels}}

    return apply


def make_downscale(*, factor: int = 2) -> Transform:
    """Returns a transform to float32 in [0, 1] at a smaller size: means of `factor` x `factor`.

    Raises:
      ArgumentError: a factor below 1; when used, images whose sides it does not divide.
    """
    require(factor >= 1, f"factor is {factor}, not 1 or more", "downscale.factor")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del key, step
        images = scale(batch["input"])
        b, h, w, c = images.shape
        require(
            h % factor == w % factor == 0,
            f"images of {h} x {w} do not divide by {factor}",
            "downscale.factor",
        )
        cells = images.reshape(b, h // factor, factor, w // factor, factor, c)
        return {**batch, "input": cells.mean((2, 4))}

    return apply
