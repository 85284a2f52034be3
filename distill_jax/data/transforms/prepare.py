"""The preparation of images for a pretrained network, as its card describes it."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core import ranges, resample
from distill_jax.core.api import Array, Batch, Key, Transform
from distill_jax.core.errors import nearest
from distill_jax.data.transforms._draws import require, require_images
from distill_jax.data.transforms.values import scale

LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in grey (ITU-R BT.601), as in Pillow."""


@functools.cache
def _weights(n: int, m: int, size: int, interpolation: str) -> np.ndarray:
    """Returns the rows of `resample.matrix` that make the centre of `size` pixels, float32."""
    first = round((m - size) / 2)
    return resample.matrix(n, m, interpolation)[first : first + size].astype(np.float32)


def resize(images: Array, *, size: int, resized: int, interpolation: str) -> Array:
    """Resizes the shorter side to `resized` and cuts the centre of `size` by `size` out.

    Args:
      images: float `[b, h, w, c]`.
      size: side of the result, at most `resized`.
      resized: of the shorter side; the other one keeps the proportion, rounded down.
      interpolation: one of `resample.KERNELS`.

    Returns:
      `[b, size, size, c]`.
    """
    sides = images.shape[1:3]
    rows, columns = (_weights(n, n * resized // min(sides), size, interpolation) for n in sides)
    highest = jax.lax.Precision.HIGHEST
    images = jnp.einsum("ij,bjkc->bikc", rows, images, precision=highest)
    return jnp.einsum("lk,bikc->bilc", columns, images, precision=highest)


def make_prepare(
    *,
    size: int,
    crop: float = 1.0,
    interpolation: str = "bicubic",
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    channel_order: str = "rgb",
) -> Transform:
    """Returns the preparation of images of any size for a pretrained network.

    The shorter side is resized to `size / crop`, the centre is cut out, channels are brought into
    their order, and `mean` and `std` are removed. Grey images are repeated for networks of colours,
    and colours are weighted for networks of grey images. `card:<role>` in a config is this
    transform with the arguments of the role's card (`weights.cards`).

    Args:
      size: side of the result in pixels.
      crop: share of the resized image's side that the centre has, in (0, 1].
      interpolation: "nearest", "bilinear", "bicubic" or "lanczos", with antialiasing.
      mean: of each channel in `channel_order`, on the scale [0, 1].
      std: likewise, positive.
      channel_order: "rgb", "bgr" or "grey".

    Raises:
      ArgumentError: an argument out of its range; when traced, inputs that are no images of one or
        three channels.
    """
    ranges.sizes(size=size)
    require(0 < crop <= 1, f"crop is {crop}, not in (0, 1]", "prepare.crop")
    require(
        interpolation in resample.KERNELS,
        f"no interpolation {interpolation!r}; {nearest(interpolation, resample.KERNELS)}",
        "prepare.interpolation",
    )
    channels = {"rgb": 3, "bgr": 3, "grey": 1}
    require(
        channel_order in channels,
        f"no order {channel_order!r}; {nearest(channel_order, channels)}",
        "prepare.channel_order",
    )
    shift, spread = (np.array(x, np.float32).reshape(1, 1, 1, -1) for x in (mean, std))
    wanted = channels[channel_order]
    for part, numbers in (("mean", shift), ("std", spread)):
        require(
            numbers.size in (1, wanted),
            f"{numbers.size} numbers for {wanted} channels",
            f"prepare.{part}",
        )
    require(bool((spread > 0).all()), "std must be positive", "prepare.std")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del key, step
        require_images(batch, "prepare")
        images = batch["input"]
        have = images.shape[-1]
        require(
            have in (1, 3), f"takes images of 1 or 3 channels, and these have {have}", "prepare"
        )
        prepared = resize(
            scale(images), size=size, resized=round(size / crop), interpolation=interpolation
        )
        if images.dtype == jnp.uint8:  # cubic and Lanczos kernels overshoot
            prepared = prepared.clip(0, 1)
        if have == 3 and wanted == 1:
            prepared = prepared @ np.array(LUMA, np.float32)[:, None]
        elif have == 1 and wanted == 3:
            prepared = jnp.repeat(prepared, 3, axis=-1)
        if channel_order == "bgr":
            prepared = prepared[..., ::-1]
        return {**batch, "input": (prepared - shift) * (1 / spread)}

    return apply
