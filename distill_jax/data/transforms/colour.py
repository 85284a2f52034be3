"""Colour, blur and noise, of float images in [0, 1]."""

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core import rng
from distill_jax.core.api import Array, Batch, Key, Transform
from distill_jax.data.transforms._draws import each, require, require_float, uniform

_LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in luminance (ITU-R BT.601)."""


def luminance(images: Array) -> Array:
    """Returns `[..., 1]`: the weighted mean of three channels, or the one channel there is."""
    if images.shape[-1] != 3:
        return images.mean(-1, keepdims=True)
    weights = jnp.array(_LUMA, images.dtype)
    return (images * weights.reshape((1,) * (images.ndim - 1) + (3,))).sum(-1, keepdims=True)


def rotate_hue(images: Array, turns: Array) -> Array:
    """Rotates the hue of RGB images `[b, h, w, 3]` by `turns` `[b]` of the colour circle.

    A rotation about the grey axis in YIQ space, which keeps luminance; values are not clipped.
    """
    angle = 2 * jnp.pi * turns
    cos, sin, zero = jnp.cos(angle), jnp.sin(angle), jnp.zeros_like(angle)
    one = jnp.ones_like(angle)
    rows = ((one, zero, zero), (zero, cos, -sin), (zero, sin, cos))
    turn = jnp.stack([jnp.stack(row, -1) for row in rows], -2)
    to_yiq = np.array([_LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
    back = jnp.asarray(np.linalg.inv(to_yiq), images.dtype)
    matrix = back[None] @ turn.astype(images.dtype) @ jnp.asarray(to_yiq, images.dtype)[None]
    return jnp.einsum("bhwc,bdc->bhwd", images, matrix)


def make_color_jitter(
    *,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.0,
    hue: float = 0.0,
    probability: float = 0.8,
) -> Transform:
    """Returns images with random brightness, contrast, saturation and hue, clipped to [0, 1].

    Chen et al. (2020, SimCLR, appendix A), in this order instead of a random one. The factors of
    the first three are uniform in 1 +- strength, that of the hue in +- strength turns.

    Args:
      brightness: strength; the image times the factor.
      contrast: strength; a blend with its mean luminance.
      saturation: strength; a blend with its luminance.
      hue: strength, at most 0.5.
      probability: that an example is changed at all.

    Raises:
      ArgumentError: a value out of range; when traced, images that are not float, or saturation or
        hue of images without three channels.
    """
    strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
    for name, value in strengths.items():
        require(0 <= value <= 1, f"{name} is {value}, not in [0, 1]", f"color_jitter.{name}")
    require(0 <= hue <= 0.5, f"hue is {hue}, not in [0, 0.5]", "color_jitter.hue")
    require(0 <= probability <= 1, "probability is not in [0, 1]", "color_jitter.probability")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        images = require_float(batch, "color_jitter")
        colour = images.shape[-1] == 3
        require(
            colour or not (saturation or hue),
            f"images of {images.shape[-1]} channels have no colour",
            "color_jitter.saturation" if saturation else "color_jitter.hue",
        )
        draws = uniform(key, batch, 5).astype(images.dtype).T
        light, spread, vivid, turn = (2 * draws[:4] - 1)[:, :, None, None, None]
        new = images * (1 + brightness * light)
        mean = luminance(new).mean((1, 2), keepdims=True)
        new = mean + (1 + contrast * spread) * (new - mean)
        if saturation:
            grey = luminance(new)
            new = grey + (1 + saturation * vivid) * (new - grey)
        if hue:
            new = rotate_hue(new, hue * turn.reshape(-1))
        kept = each(draws[4] < probability)
        return {**batch, "input": jnp.where(kept, jnp.clip(new, 0, 1), images)}

    return apply


def make_grayscale(*, probability: float = 0.2) -> Transform:
    """Returns images whose channels are, with the given probability, all their luminance."""
    require(0 <= probability <= 1, "probability is not in [0, 1]", "grayscale.probability")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        images = require_float(batch, "grayscale")
        grey = jnp.broadcast_to(luminance(images), images.shape)
        return {
            **batch,
            "input": jnp.where(each(uniform(key, batch) < probability), grey, images),
        }

    return apply


def make_solarize(*, probability: float = 0.2, threshold: float = 0.5) -> Transform:
    """Returns images whose values from `threshold` on are, with some probability, 1 - value.

    Grill et al. (2020, BYOL, appendix B). Values are in [0, 1].
    """
    require(0 <= probability <= 1, "probability is not in [0, 1]", "solarize.probability")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        images = require_float(batch, "solarize")
        hit = each(uniform(key, batch) < probability) & (images >= threshold)
        return {**batch, "input": jnp.where(hit, 1 - images, images)}

    return apply


def blur(images: Array, sigma: Array, *, radius: int) -> Array:
    """Blurs images `[b, h, w, c]` by a Gaussian of `sigma` `[b]` pixels, cut at `radius` pixels.

    Edges are repeated. A sigma of 0 is the image itself.
    """
    at = jnp.arange(-radius, radius + 1)
    width = jnp.maximum(sigma, 1e-3).astype(images.dtype)
    taps = jnp.exp(-0.5 * (at[None] / width[:, None]) ** 2)
    taps = (taps / taps.sum(1, keepdims=True)).astype(images.dtype)
    for axis in (1, 2):
        n = images.shape[axis]
        rows = jnp.clip(jnp.arange(n)[:, None] + at[None], 0, n - 1)
        # One product with a band matrix a side: cheap for small images, and no gather of pixels.
        chosen = (rows[:, :, None] == jnp.arange(n)[None, None]).astype(images.dtype)
        band = jnp.einsum("bt,itj->bij", taps, chosen)
        out = "bij,bjkc->bikc" if axis == 1 else "bij,bkjc->bkic"
        images = jnp.einsum(out, band, images)
    return images


def make_gaussian_blur(
    *, probability: float = 0.5, sigma: tuple[float, float] = (0.1, 2.0), radius: int = 0
) -> Transform:
    """Returns images blurred with some probability, by a width uniform in `sigma`, in pixels.

    Chen et al. (2020, SimCLR, appendix A).

    Args:
      probability: of blurring.
      sigma: smallest and largest standard deviation.
      radius: pixels after which the Gaussian is cut; 0 is a twentieth of the side, as published.
    """
    require(0 <= probability <= 1, "probability is not in [0, 1]", "gaussian_blur.probability")
    require(0 < sigma[0] <= sigma[1], "sigma is not a range above 0", "gaussian_blur.sigma")
    require(radius >= 0, "radius must not be negative", "gaussian_blur.radius")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        images = require_float(batch, "gaussian_blur")
        hit, width = uniform(key, batch, 2).T
        width = jnp.where(hit < probability, sigma[0] + (sigma[1] - sigma[0]) * width, 0.0)
        side = min(images.shape[1:3])
        require(
            radius < side, f"radius is {radius}, and images are {side} wide", "gaussian_blur.radius"
        )
        cut = radius or max(1, images.shape[1] // 20)
        return {**batch, "input": blur(images, width, radius=cut)}

    return apply


def make_gaussian_noise(*, std: float = 0.05) -> Transform:
    """Returns images with independent normal noise added to every value; not clipped."""
    require(std >= 0, "std must not be negative", "gaussian_noise.std")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        images = require_float(batch, "gaussian_noise")
        draw = lambda k: jax.random.normal(k, images.shape[1:], images.dtype)  # noqa: E731
        return {**batch, "input": images + std * jax.vmap(draw)(rng.example_keys(key, batch))}

    return apply
