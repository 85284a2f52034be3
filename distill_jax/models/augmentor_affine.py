"""A learned distribution over affine warps of images (spatial transformers, Jaderberg et al. 2015).

`A = I + Delta(phi, eps)`, `Delta = mean + eps M` reshaped to 2 x 3, with bilinear sampling
(arXiv:1506.02025, eq. 1 and 5); as an augmentor in Nix et al. 2023 (arXiv:2305.14890).
"""

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array, Model
from distill_jax.core.errors import ArgumentError, nearest

BORDERS = ("zero", "wrap")


def warp(images: Array, affine: Array, *, border: str) -> Array:
    """Samples each image at the positions given by an affine map, `[b, h, w, c] -> [b, h, w, c]`.

    Output pixel (x, y), in units of half the image from its centre, takes the bilinearly
    interpolated value of the input at `affine @ (x, y, 1)`.

    Args:
      images: `[b, h, w, c]`.
      affine: `[b, 2, 3]`, the x row first.
      border: "zero", nothing is outside of the image; "wrap", it repeats.
    """
    b, h, w, c = images.shape
    kind = jnp.promote_types(affine.dtype, jnp.float32)  # bfloat16 cannot resolve single pixels
    half_h, half_w = (h - 1) / 2, (w - 1) / 2
    y, x = jnp.meshgrid(jnp.arange(h) - half_h, jnp.arange(w) - half_w, indexing="ij")
    y, x = y.reshape(1, -1).astype(kind) * (2 / h), x.reshape(1, -1).astype(kind) * (2 / w)
    affine = affine.astype(kind)
    at_x = affine[:, 0, 0:1] * x + affine[:, 0, 1:2] * y + affine[:, 0, 2:3]
    at_y = affine[:, 1, 0:1] * x + affine[:, 1, 1:2] * y + affine[:, 1, 2:3]
    at_x, at_y = at_x * (w / 2) + half_w, at_y * (h / 2) + half_h
    flat = images.reshape(b, h * w, c).astype(kind)
    left, top = jnp.floor(at_x), jnp.floor(at_y)
    result = jnp.zeros_like(flat)
    for down in (0, 1):
        for right in (0, 1):
            column, row = left + right, top + down
            share = (1 - jnp.abs(at_x - column)) * (1 - jnp.abs(at_y - row))
            if border == "zero":
                share *= (column >= 0) & (column < w) & (row >= 0) & (row < h)
            place = (row % h).astype(jnp.int32) * w + (column % w).astype(jnp.int32)
            value = jnp.take_along_axis(flat, place[..., None], axis=1)
            result += share[..., None] * value
    return result.reshape(images.shape).astype(images.dtype)


def make(*, scale: float = 0.1, border: str = "zero") -> Model:
    """Returns `(images [b, h, w, c], eps [b, e]) -> output` as the images, `affine` `[b, 2, 3]`.

    Parameters: `mean` `[6]` and `mix` `[e, 6]` of `Delta`, in the order of the rows of A, x
    first; lengths are in units of half the image, so that a shift by the whole image is 2.

    Args:
      scale: initial standard deviation of each entry of `Delta`, positive.
      border: "zero", nothing is outside of an image; "wrap" for images that repeat, such as
        periodic signals.

    Raises:
      ArgumentError: a value outside these.
    """
    if not scale > 0:
        raise ArgumentError(f"scale is {scale}", where="scale", hint="a positive number")
    if border not in BORDERS:
        hint = nearest(border, BORDERS)
        raise ArgumentError(f"unknown border {border!r}", where="border", hint=hint)

    def init(key, images, eps):
        del images
        e = eps.shape[-1]
        mix = scale * e**-0.5 * jax.random.normal(key, (e, 6), jnp.float32)
        return {"mean": jnp.zeros(6, jnp.float32), "mix": mix}, {}

    def apply(params, state, images, eps, *, train, rngs):
        del train, rngs
        delta = params["mean"][None] + eps @ params["mix"]
        affine = jnp.eye(2, 3, dtype=delta.dtype)[None] + delta.reshape(-1, 2, 3)
        return {"output": warp(images, affine, border=border), "affine": affine}, state

    return Model(init, apply)
