"""Crops, flips, rotations and erased boxes; the labels stay."""

import math

import jax
import jax.numpy as jnp

from distill_jax.core import rng
from distill_jax.core.api import Array, Batch, Key, Transform
from distill_jax.core.errors import ArgumentError
from distill_jax.data.transforms._draws import beta, integer, require, require_images, uniform


def crop(images: Array, offsets: Array, *, padding: int, mode: str = "constant") -> Array:
    """Pads height and width by `padding` and cuts the original size out at `offsets` int `[b, 2]`.

    Offsets (row, column) lie in 0 .. 2 * padding; `padding` of both is the image itself. `mode` is
    that of `jnp.pad`.
    """
    margin = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(images, margin, mode=mode)

    def cut(image, offset):
        return jax.lax.dynamic_slice(image, (*offset, jnp.zeros_like(offset[0])), images.shape[1:])

    return jax.vmap(cut)(padded, offsets)


def make_random_crop(*, padding: int = 4, mode: str = "zero") -> Transform:
    """Returns crops at uniform offsets after padding with zeros or by reflection.

    He, Zhang, Ren, Sun (2016), section 4.2 (padding 4, zeros, 32x32).

    Args:
      padding: pixels added on each side.
      mode: "zero" or "reflect" (without repeating the edge).
    """
    modes = {"zero": "constant", "reflect": "reflect"}
    require(mode in modes, f"mode {mode!r} is not one of {', '.join(modes)}", "random_crop.mode")
    require(padding >= 0, "padding must not be negative", "random_crop.padding")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        require_images(batch, "random_crop")
        side = min(batch["input"].shape[1:3])
        require(
            padding < side,
            f"padding is {padding}, and images are {side} wide: all of some would be padding",
            "random_crop.padding",
        )
        offsets = integer(uniform(key, batch, 2), 2 * padding + 1)
        images = crop(batch["input"], offsets, padding=padding, mode=modes[mode])
        return {**batch, "input": images}

    return apply


def make_horizontal_flip(*, probability: float = 0.5) -> Transform:
    """Returns images mirrored left to right with the given probability."""
    require(0 <= probability <= 1, "probability is not in [0, 1]", "horizontal_flip.probability")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        require_images(batch, "horizontal_flip")
        flip = uniform(key, batch) < probability
        images = batch["input"]
        images = jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)
        return {**batch, "input": images}

    return apply


def rotate(images: Array, degrees: Array, *, fill: float = 0.0) -> Array:
    """Rotates about the centre, counter-clockwise as seen, by `degrees` `[b]`; bilinear.

    Each output pixel is read at its inverse image; pixels outside count as `fill`. uint8 is
    rounded.
    """
    b, h, w, c = images.shape
    angle = jnp.deg2rad(degrees)[:, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    dy = (jnp.arange(h) - (h - 1) / 2)[None, :, None]
    dx = (jnp.arange(w) - (w - 1) / 2)[None, None, :]
    y = cos * dy + sin * dx + (h - 1) / 2
    x = cos * dx - sin * dy + (w - 1) / 2
    top, left = jnp.floor(y), jnp.floor(x)
    flat = images.reshape(b, h * w, c).astype(jnp.float32) - fill

    def tap(row, column):
        weight = (1 - jnp.abs(y - row)) * (1 - jnp.abs(x - column))
        inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
        position = jnp.where(inside, row * w + column, 0).astype(jnp.int32).reshape(b, h * w, 1)
        value = jnp.take_along_axis(flat, position, axis=1, mode="promise_in_bounds")
        return value * jnp.where(inside, weight, 0).reshape(b, h * w, 1)

    out = tap(top, left) + tap(top, left + 1) + tap(top + 1, left) + tap(top + 1, left + 1)
    out = (out + fill).reshape(images.shape)
    if jnp.issubdtype(images.dtype, jnp.integer):
        out = jnp.round(out)
    return out.astype(images.dtype)


def make_rotation(*, degrees: float = 15.0, fill: float = 0.0) -> Transform:
    """Returns images rotated by an angle uniform in +-`degrees` (see `rotate`).

    Args:
      degrees: largest angle.
      fill: value outside the image, in the units of the input.
    """
    require(degrees >= 0, "degrees must not be negative", "rotation.degrees")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        require_images(batch, "rotation")
        angles = degrees * (2 * uniform(key, batch) - 1)
        return {**batch, "input": rotate(batch["input"], angles, fill=fill)}

    return apply


def cutmix_box(lam: Array, centre: Array, height: int, width: int) -> Array:
    """Returns the box int32 `[4]` of area share 1 - `lam` about `centre` int `[2]`, clipped.

    Yun et al. (2019), equation (2): sides are the image's times sqrt(1 - lam), rounded down; half
    a side, rounded down, lies on each side of the centre.
    """
    image = jnp.array([height, width])
    half = (image * jnp.sqrt(1 - lam)).astype(jnp.int32) // 2
    first, last = jnp.clip(centre - half, 0, image), jnp.clip(centre + half, 0, image)
    return jnp.stack([first[0], last[0], first[1], last[1]])


def box_mask(box: Array, height: int, width: int) -> Array:
    """Returns bool `[..., h, w]`: the pixels of boxes int `[..., 4]` (top, bottom, left, right).

    Bottom and right are exclusive.
    """
    top, bottom, left, right = (box[..., i, None] for i in range(4))
    row = jnp.arange(height).reshape((1,) * (box.ndim - 1) + (-1,))
    column = jnp.arange(width).reshape((1,) * (box.ndim - 1) + (-1,))
    rows, columns = (row >= top) & (row < bottom), (column >= left) & (column < right)
    return rows[..., :, None] & columns[..., None, :]


def erase(images: Array, boxes: Array, *, fill: float = 0.0) -> Array:
    """Sets the pixels in `boxes` int `[b, 4]` to `fill`."""
    mask = box_mask(boxes, *images.shape[1:3])[..., None]
    return jnp.where(mask, jnp.asarray(fill, images.dtype), images)


def make_random_erasing(
    *,
    probability: float = 0.5,
    area: tuple[float, float] = (0.02, 0.33),
    aspect: float = 0.3,
    fill: float = 0.0,
) -> Transform:
    """Returns images with a random rectangle set to `fill`.

    Zhong, Zheng, Kang, Li, Yang (2020), algorithm 1, with two changes that keep shapes static and
    the draw single: sides that exceed the image are cut to it (the paper draws again), and the
    aspect ratio is uniform on a logarithmic scale.

    Args:
      probability: of erasing.
      area: smallest and largest share of the image.
      aspect: smallest ratio of height to width; the largest is its inverse.
      fill: value, in the units of the input.
    """
    where = "random_erasing"
    require(0 <= probability <= 1, "probability is not in [0, 1]", f"{where}.probability")
    require(0 < area[0] <= area[1] <= 1, "area is not a range in (0, 1]", f"{where}.area")
    require(0 < aspect <= 1, "aspect is not in (0, 1]", f"{where}.aspect")
    limit = -math.log(aspect)

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        require_images(batch, "random_erasing")
        hit, share, ratio, *corner = uniform(key, batch, 5).T
        height, width = batch["input"].shape[1:3]
        pixels = height * width * (area[0] + (area[1] - area[0]) * share)
        tall = jnp.exp(limit * (2 * ratio - 1))

        def side(length, limit, place):
            length = jnp.clip(jnp.round(jnp.sqrt(length)), 1, limit).astype(jnp.int32)
            length = jnp.where(hit < probability, length, 0)
            first = integer(place, limit - length + 1)
            return first, first + length

        sides = *side(pixels * tall, height, corner[0]), *side(pixels / tall, width, corner[1])
        return {**batch, "input": erase(batch["input"], jnp.stack(sides, -1), fill=fill)}

    return apply


def resized_crop(
    images: Array, boxes: Array, flip: Array, *, size: tuple[int, int] | None = None
) -> Array:
    """Cuts boxes out, scales them to one size (bilinear), and mirrors some.

    Where a box shrinks, the triangle is as much wider (antialiasing), as in PIL and in
    `jax.image.scale_and_translate`. At a box's edge pixels outside it may count, those outside the
    image never.

    Args:
      images: float `[b, h, w, c]`.
      boxes: `[b, 4]`, top, left, height and width as shares of the image.
      flip: bool `[b]`, mirrored left to right after the crop.
      size: height and width of the result, by default those of the images.
    """

    def taps(first, length, n, m):
        at = (first[:, None] + length[:, None] * ((jnp.arange(m) + 0.5) / m)[None]) * n - 0.5
        wide = jnp.maximum(length * (n / m), 1)[:, None, None]
        distance = jnp.abs(at[:, :, None] - jnp.arange(n)[None, None])
        weight = jnp.maximum(0, 1 - distance / wide)
        return weight / weight.sum(-1, keepdims=True)

    height, width = images.shape[1:3]
    out = size or (height, width)
    rows = taps(boxes[:, 0], boxes[:, 2], height, out[0])
    columns = taps(boxes[:, 1], boxes[:, 3], width, out[1])
    columns = jnp.where(flip[:, None, None], columns[:, ::-1], columns)
    rows, columns = rows.astype(images.dtype), columns.astype(images.dtype)
    return jnp.einsum("bij,bjkc,blk->bilc", rows, images, columns)


def make_random_resized_crop(
    *,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: float = 0.75,
    flip: float = 0.5,
    self_mix: str = "none",
    alpha: float = 1.0,
    size: int = 0,
) -> Transform:
    """Returns crops of random size and place, scaled back; or two of the same image, mixed.

    The crop of Szegedy et al. (2015), section 6, with sides that exceed the image cut to it. A
    mixture is SelfMix of FerKD (Shen 2023, arXiv:2312.17473): labels of two crops of one image
    differ less than those of two images. It sets `crops` `[b, 2, h, w, c]` and `mix` `[b]`, the
    share of the first crop in the mixture, which is the input. Here each example has a share of its
    own.

    Args:
      area: smallest and largest share of the image.
      aspect: smallest ratio of height to width; the largest is its inverse.
      flip: probability that a crop is mirrored.
      self_mix: "none", "mixup" (a weighted sum) or "cutmix" (a box of the second in the first).
      alpha: concentration of the Beta distribution of the shares.
      size: height and width of the crops; 0 keeps those of the image.

    Raises:
      ArgumentError: bad arguments; when traced, an input that is not float.
    """
    where = "random_resized_crop"
    require(size >= 0, f"size is {size}, not 0 or more", f"{where}.size")
    require(0 < area[0] <= area[1] <= 1, "area is not a range in (0, 1]", f"{where}.area")
    require(0 < aspect <= 1, "aspect is not in (0, 1]", f"{where}.aspect")
    require(0 <= flip <= 1, "flip is not in [0, 1]", f"{where}.flip")
    require(alpha > 0, "alpha must be positive", f"{where}.alpha")
    kinds = ("none", "mixup", "cutmix")
    require(self_mix in kinds, f"self_mix is not one of {', '.join(kinds)}", f"{where}.self_mix")
    limit = -math.log(aspect)

    def one(key: Key, batch: Batch) -> Array:
        share, ratio, top, left, mirror = uniform(key, batch, 5).T
        share = area[0] + (area[1] - area[0]) * share
        tall = jnp.exp(limit * (2 * ratio - 1))
        height, width = (jnp.minimum(jnp.sqrt(x), 1) for x in (share * tall, share / tall))
        boxes = jnp.stack([top * (1 - height), left * (1 - width), height, width], -1)
        sides = (size, size) if size else None
        return resized_crop(batch["input"], boxes, mirror < flip, size=sides)

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        require_images(batch, "random_resized_crop")
        if not jnp.issubdtype(batch["input"].dtype, jnp.floating):
            raise ArgumentError(
                f"a scaled crop of {batch['input'].dtype} images",
                where="batch",
                hint="put scale or normalize before random_resized_crop",
            )
        first = one(key, batch)
        if self_mix == "none":
            return {**batch, "input": first}
        second = one(rng.stream(key, "second"), batch)
        keys = rng.example_keys(rng.stream(key, "mix"), batch)
        lam = jax.vmap(lambda k: beta(k, alpha))(keys)
        if self_mix == "mixup":
            keep = lam.astype(first.dtype).reshape(-1, 1, 1, 1)
            mixed = keep * first + (1 - keep) * second
        else:
            size = first.shape[1:3]
            middle = integer(uniform(rng.stream(key, "box"), batch, 2), jnp.array([size]))
            boxes = jax.vmap(lambda share, at: cutmix_box(share, at, *size))(lam, middle)
            inside = box_mask(boxes, *size)
            mixed = jnp.where(inside[..., None], second, first)
            lam = 1 - inside.mean((1, 2))
        crops = jnp.stack([first, second], axis=1)
        return {**batch, "input": mixed, "crops": crops, "mix": lam.astype(jnp.float32)}

    return apply
