"""Augmentation on the device, inside the jitted step: `(key, batch, step) -> batch`.

A config names a transform by what follows `make_` here. Images are `batch["input"]` `[b, h, w, c]`,
uint8 or float; transforms that move or hide pixels keep the dtype and the labels, and draw per
example from `rng.example_keys`: what happens to an example is a function of (seed, epoch, example)
whatever the batch, the step and the devices. `mixup` and `cutmix` pair examples and set
`label_probs`; they depend on the step and on the neighbours in the batch, and `feature_corruption`,
for tables, on the neighbours.

Each transform is a draw followed by a public pure map (`crop`, `rotate`, `erase`, ...). Those that
presuppose a range of values declare it in `TAKES`, see `check_values`.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core import ranges, rng
from distill_jax.core.api import Array, Batch, Key, Transform
from distill_jax.core.errors import ConfigError, explained, nearest
from distill_jax.data import checks
from distill_jax.data.masks import make_block_masks as make_block_masks
from distill_jax.data.masks import make_column_masks as make_column_masks
from distill_jax.data.masks import make_patch_masks as make_patch_masks
from distill_jax.data.masks import make_random_masks as make_random_masks
from distill_jax.data.masks import make_tube_masks as make_tube_masks

TAKES: Mapping[str, str] = {
    "scale": "pixels",
    "downscale": "pixels",
    "columns": "pixels",
    "normalize": "pixels",
    "color_jitter": "unit",
    "solarize": "unit",
}
"""What transforms presuppose of the values of an image: "pixels", uint8 or floats that are meant as
they are; "unit", floats in [0, 1]."""


def resolve(name: str, *, where: str = "data.train_transforms") -> Callable[..., Transform]:
    """Returns the builder `make_<name>`.

    Raises:
      ConfigError: there is none; the hint names the nearest.
    """
    builders = {k[5:]: v for k, v in vars(sys.modules[__name__]).items() if k.startswith("make_")}
    if name not in builders:
        raise ConfigError(f"no transform {name!r}", where=where, hint=nearest(name, builders))
    return builders[name]


def check_values(
    names: Sequence[Any],
    kwargs: Mapping[str, Any],
    values: checks.Values,
    *,
    where: str = "data.train_transforms",
    kind: str = "",
) -> str:
    """Follows the range of an image's values through transforms.

    Args:
      names: transforms in order: names, or pairs of a name and its keyword arguments.
      kwargs: keyword arguments by name, of names without.
      values: of the training part.
      where: the config path of the list.
      kind: of the values before the first transform; by default that of the data.

    Returns:
      The kind of the values after the last one: see `checks.Values.kind`; "normalized"; or ""
      after a transform of somebody's own.

    Raises:
      ConfigError: values reach a transform in units that it does not take. The hint names the
        nearest order that is right.
    """
    kind = kind or values.kind
    plain = [name if isinstance(name, str) else name[0] for name in names]
    for i, name in enumerate(plain):
        if ":" in name:
            return ""
        own = dict(kwargs.get(name, {}) if isinstance(names[i], str) else names[i][1])
        if name in ("views", "local_views"):
            for part in ("transforms", "second"):
                nested = own.get(part) or ()
                at = f"data.transform_kwargs.{name}.{part}"
                check_values(nested, {}, values, where=at, kind=kind)
        takes = TAKES.get(name)
        if takes == "pixels" and kind == "grey" and values.is_image and name != "columns":
            mean = own.get("mean")
            fits = name == "normalize" and (mean is None or np.max(mean) > 1.5)
            if not fits:
                raise ConfigError(
                    f"{name} leaves floats in their units, and these are {values.interval}",
                    where=where,
                    hint="store images as uint8, divide them by their largest value, or take "
                    "normalize without mean and std, which then are those of the training part",
                )
        if takes == "unit" and kind not in ("unit", "bytes"):
            raise _not_unit(name, plain, values, kind, where)
        if takes == "pixels":
            binary = kind == "bytes" and values.high <= 1 and values.low < values.high
            if binary and (name != "normalize" or own.get("mean") is not None):
                raise ConfigError(
                    f"{name} divides uint8 by 255, and these pixels are only 0 and 1",
                    where=where,
                    hint="store them as floats, multiply them by 255, or take normalize without "
                    "mean and std, which then are those of the training part",
                )
            if name == "normalize":
                kind = "normalized"
            elif kind == "bytes":
                kind = "unit"
    return kind


def _not_unit(
    name: str, names: Sequence[str], values: checks.Values, kind: str, where: str
) -> ConfigError:
    if kind == "normalized":
        order = [other for other in names if other != "normalize"]
        last = max(i for i, other in enumerate(order) if TAKES.get(other) == "unit")
        order.insert(last + 1, "normalize")
        before = ["scale"] if values.kind == "bytes" and "scale" not in order else []
        return ConfigError(
            f"{name} takes values in [0, 1], and normalize comes before it",
            where=where,
            hint=f"the order {', '.join([*before, *order])}",
        )
    return ConfigError(
        f"{name} takes values in [0, 1], and these are {values.interval}: "
        f"{100 * values.outside:.1f} % are outside",
        where=where,
        hint="store images as uint8 and put scale first, or divide them by their largest value",
    )


def compose(transforms: Mapping[str, Transform]) -> Transform:
    """Returns the transforms applied in the order of the mapping.

    Each draws from the stream of its own name, so that adding or removing one leaves the others'
    draws as they are.
    """

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        for name, transform in transforms.items():
            with explained("fails on these inputs", where=f"data.transform_kwargs.{name}"):
                batch = transform(rng.stream(key, name), batch, step)
        return batch

    return apply


def two_views(
    transforms: Mapping[str, Transform], clean: Transform | None, *, shared: Sequence[str]
) -> Transform:
    """Returns the transforms, and a view of the teacher's own as `teacher_input`.

    A student that sees another view than its teacher learns what the teacher says of an image, not
    of what it sees (Beyer, Zhai, Royer, Markeeva, Anil, Kolesnikov 2022, arXiv:2106.05237, figure
    2: "independent noise", and "fixed teacher" where the teacher's view is `clean`).

    Args:
      transforms: of the student's view, in order.
      clean: of the teacher's view; None draws the student's transforms once more.
      shared: names of transforms whose draws both views share, such as mixup, which then mixes the
        same pairs in the same proportion. After `clean` they alone are applied.
    """

    def draw_again(key: Key, batch: Batch, step: Array) -> Batch:
        for name, transform in transforms.items():
            own = key if name in shared else rng.stream(key, "teacher")
            batch = transform(rng.stream(own, name), batch, step)
        return batch

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        if clean is None:
            other = draw_again(key, batch, step)
        else:
            mixing = {name: transforms[name] for name in transforms if name in shared}
            other = compose(mixing)(key, clean(key, batch, step), step)
        return {**compose(transforms)(key, batch, step), "teacher_input": other["input"]}

    return apply


def _make_views(
    key: str,
    count: int,
    chain: Sequence[Any],
    second: Sequence[Any] | None,
    statistics: Callable[[], tuple[np.ndarray, np.ndarray]] | None,
) -> Transform:
    where = f"data.transform_kwargs.{key}"
    ranges.depths(where=where, count=count)

    def build(chain: Sequence[Any], part: str) -> Transform:
        made = {}
        for i, item in enumerate(chain):
            name, kwargs = (item, {}) if isinstance(item, str) else item
            at = f"{where}.{part}[{i}]"
            builder = resolve(name, where=at)
            try:
                given = {"statistics": statistics} if name == "normalize" else {}
                made[f"{i}/{name}"] = builder(**{**given, **dict(kwargs)})
            except TypeError as error:
                raise ConfigError(f"{name}: {error}", where=at) from None
        return compose(made)

    chains = [build(chain, "transforms")] * count
    if second is not None:
        chains[1:] = [build(second, "second")] * (count - 1)

    def apply(rng_key: Key, batch: Batch, step: Array) -> Batch:
        views = [
            chain(rng.stream(rng_key, f"view{i}"), batch, step)["input"]
            for i, chain in enumerate(chains)
        ]
        return {**batch, key: jax.tree.map(lambda *v: jnp.stack(v, axis=1), *views)}

    return apply


def make_views(
    *,
    count: int = 2,
    transforms: Sequence[Any],
    second: Sequence[Any] | None = None,
    statistics: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None,
) -> Transform:
    """Returns a transform that adds `views` `[b, count, h, w, c]`; the input stays as it is.

    Those of a table are a table of `[b, count, c]` and `[b, count, m]`. Each view is drawn by
    itself, as a function of (seed, epoch, example, view).

    Args:
      count: v.
      transforms: of every view, in order: names, or pairs of a name and its keyword arguments.
      second: of the views after the first, where they differ (BYOL's asymmetric blur).
      statistics: of the training part, for `normalize` without numbers.

    Raises:
      ConfigError: an unknown transform, arguments that it does not take, or a count below 1.
    """
    return _make_views("views", count, transforms, second, statistics)


def make_local_views(
    *,
    count: int = 4,
    transforms: Sequence[Any],
    statistics: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None,
) -> Transform:
    """Returns a transform that adds `local_views` `[b, count, h', w', c]`: small crops.

    Multi-crop (Caron et al. 2020, SwAV, section 3.4): end the chain with crops of their own
    `size`. Arguments and errors are those of `make_views`.
    """
    return _make_views("local_views", count, transforms, None, statistics)


def make_halves() -> Transform:
    """Returns a transform that adds `views` `[b, 2, h / 2, w, c]`: upper and lower half of images.

    Two parts that show different things and belong together, as for losses on pairs. The input
    stays as it is; of an odd number of rows the last is left out.
    """

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del key, step
        x = batch["input"]
        half = x.shape[1] // 2
        return {**batch, "views": jnp.stack([x[:, :half], x[:, half : 2 * half]], axis=1)}

    return apply


def in_turn(transform: Transform, views: int) -> Transform:
    """Returns the transform with `views` views of each example that come back in turn.

    These are the stored crops of FKD (Shen, Xing 2022, arXiv:2112.01528): epoch e sees view
    e modulo `views`.
    """

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        seen = transform(key, {**batch, "epoch": batch["epoch"] % views}, step)
        return {**seen, "epoch": batch["epoch"]}

    return apply


def _require(condition: bool, what: str, where: str) -> None:
    if not condition:
        raise ConfigError(what, where=f"data.transform_kwargs.{where}")


def _uniform(key: Key, batch: Batch, *shape: int) -> Array:
    """Returns numbers in [0, 1), `[b, *shape]`: one draw an example, cheap to run and compile."""
    return jax.vmap(lambda k: jax.random.uniform(k, shape))(rng.example_keys(key, batch))


def _integer(u: Array, count: Array | int) -> Array:
    return jnp.floor(u * count).astype(jnp.int32)


# --- values ---------------------------------------------------------------------------------


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
      ConfigError: one of both without the other, or none and no statistics; when traced, numbers
        that are not one for each channel.
    """
    _require((mean is None) == (std is None), "one of mean and std is set", "normalize")
    if mean is None or std is None:
        _require(statistics is not None, "mean and std are not set", "normalize")
        assert statistics is not None
        found: tuple[Any, Any] = statistics()
    else:
        found = mean, std
    shift, spread = (np.array(x, np.float32, ndmin=1) for x in found)
    _require(bool((spread > 0).all()), "std must be positive", "normalize.std")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del key, step
        _require(
            not isinstance(batch["input"], Mapping), "the input is a table, not images", "normalize"
        )
        images = scale(batch["input"])
        for part, numbers in (("mean", shift), ("std", spread)):
            _require(
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
        pixels = scale(batch["input"]).reshape(len(batch["input"]), -1)
        none = jnp.zeros((len(pixels), 0), jnp.int32)
        return {**batch, "input": {"categorical": none, "numeric": pixels}}

    return apply


def make_downscale(*, factor: int = 2) -> Transform:
    """Returns a transform to float32 in [0, 1] at a smaller size: means of `factor` x `factor`.

    Raises:
      ConfigError: a factor below 1; when used, images whose sides it does not divide.
    """
    _require(factor >= 1, f"factor is {factor}, not 1 or more", "downscale.factor")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del key, step
        images = scale(batch["input"])
        b, h, w, c = images.shape
        _require(
            h % factor == w % factor == 0,
            f"images of {h} x {w} do not divide by {factor}",
            "downscale.factor",
        )
        cells = images.reshape(b, h // factor, factor, w // factor, factor, c)
        return {**batch, "input": cells.mean((2, 4))}

    return apply


# --- geometry -------------------------------------------------------------------------------


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
    _require(mode in modes, f"mode {mode!r} is not one of {', '.join(modes)}", "random_crop.mode")
    _require(padding >= 0, "padding must not be negative", "random_crop.padding")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        side = min(batch["input"].shape[1:3])
        _require(
            padding < side,
            f"padding is {padding}, and images are {side} wide: all of some would be padding",
            "random_crop.padding",
        )
        offsets = _integer(_uniform(key, batch, 2), 2 * padding + 1)
        images = crop(batch["input"], offsets, padding=padding, mode=modes[mode])
        return {**batch, "input": images}

    return apply


def make_horizontal_flip(*, probability: float = 0.5) -> Transform:
    """Returns images mirrored left to right with the given probability."""
    _require(0 <= probability <= 1, "probability is not in [0, 1]", "horizontal_flip.probability")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        flip = _uniform(key, batch) < probability
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
    _require(degrees >= 0, "degrees must not be negative", "rotation.degrees")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        angles = degrees * (2 * _uniform(key, batch) - 1)
        return {**batch, "input": rotate(batch["input"], angles, fill=fill)}

    return apply


# --- boxes ----------------------------------------------------------------------------------


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
    _require(0 <= probability <= 1, "probability is not in [0, 1]", f"{where}.probability")
    _require(0 < area[0] <= area[1] <= 1, "area is not a range in (0, 1]", f"{where}.area")
    _require(0 < aspect <= 1, "aspect is not in (0, 1]", f"{where}.aspect")
    limit = -math.log(aspect)

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        hit, share, ratio, *corner = _uniform(key, batch, 5).T
        height, width = batch["input"].shape[1:3]
        pixels = height * width * (area[0] + (area[1] - area[0]) * share)
        tall = jnp.exp(limit * (2 * ratio - 1))

        def side(length, limit, place):
            length = jnp.clip(jnp.round(jnp.sqrt(length)), 1, limit).astype(jnp.int32)
            length = jnp.where(hit < probability, length, 0)
            first = _integer(place, limit - length + 1)
            return first, first + length

        sides = *side(pixels * tall, height, corner[0]), *side(pixels / tall, width, corner[1])
        return {**batch, "input": erase(batch["input"], jnp.stack(sides, -1), fill=fill)}

    return apply


# --- colour ---------------------------------------------------------------------------------

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


def _require_float(batch: Batch, name: str) -> Array:
    if not jnp.issubdtype(batch["input"].dtype, jnp.floating):
        raise ConfigError(
            f"{name} of {batch['input'].dtype} images",
            where="data.train_transforms",
            hint=f"put scale before {name}: it takes values in [0, 1]",
        )
    return batch["input"]


def _each(x: Array) -> Array:
    return x[:, None, None, None]


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
      ConfigError: a value out of range; when traced, images that are not float, or saturation or
        hue of images without three channels.
    """
    strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
    for name, value in strengths.items():
        _require(0 <= value <= 1, f"{name} is {value}, not in [0, 1]", f"color_jitter.{name}")
    _require(0 <= hue <= 0.5, f"hue is {hue}, not in [0, 0.5]", "color_jitter.hue")
    _require(0 <= probability <= 1, "probability is not in [0, 1]", "color_jitter.probability")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        images = _require_float(batch, "color_jitter")
        colour = images.shape[-1] == 3
        _require(
            colour or not (saturation or hue),
            f"images of {images.shape[-1]} channels have no colour",
            "color_jitter.saturation" if saturation else "color_jitter.hue",
        )
        draws = _uniform(key, batch, 5).astype(images.dtype).T
        light, spread, vivid, turn = (2 * draws[:4] - 1)[:, :, None, None, None]
        new = images * (1 + brightness * light)
        mean = luminance(new).mean((1, 2), keepdims=True)
        new = mean + (1 + contrast * spread) * (new - mean)
        if saturation:
            grey = luminance(new)
            new = grey + (1 + saturation * vivid) * (new - grey)
        if hue:
            new = rotate_hue(new, hue * turn.reshape(-1))
        kept = _each(draws[4] < probability)
        return {**batch, "input": jnp.where(kept, jnp.clip(new, 0, 1), images)}

    return apply


def make_grayscale(*, probability: float = 0.2) -> Transform:
    """Returns images whose channels are, with the given probability, all their luminance."""
    _require(0 <= probability <= 1, "probability is not in [0, 1]", "grayscale.probability")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        images = _require_float(batch, "grayscale")
        grey = jnp.broadcast_to(luminance(images), images.shape)
        return {
            **batch,
            "input": jnp.where(_each(_uniform(key, batch) < probability), grey, images),
        }

    return apply


def make_solarize(*, probability: float = 0.2, threshold: float = 0.5) -> Transform:
    """Returns images whose values from `threshold` on are, with some probability, 1 - value.

    Grill et al. (2020, BYOL, appendix B). Values are in [0, 1].
    """
    _require(0 <= probability <= 1, "probability is not in [0, 1]", "solarize.probability")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        images = _require_float(batch, "solarize")
        hit = _each(_uniform(key, batch) < probability) & (images >= threshold)
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
    _require(0 <= probability <= 1, "probability is not in [0, 1]", "gaussian_blur.probability")
    _require(0 < sigma[0] <= sigma[1], "sigma is not a range above 0", "gaussian_blur.sigma")
    _require(radius >= 0, "radius must not be negative", "gaussian_blur.radius")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        images = _require_float(batch, "gaussian_blur")
        hit, width = _uniform(key, batch, 2).T
        width = jnp.where(hit < probability, sigma[0] + (sigma[1] - sigma[0]) * width, 0.0)
        side = min(images.shape[1:3])
        _require(
            radius < side, f"radius is {radius}, and images are {side} wide", "gaussian_blur.radius"
        )
        cut = radius or max(1, images.shape[1] // 20)
        return {**batch, "input": blur(images, width, radius=cut)}

    return apply


def make_gaussian_noise(*, std: float = 0.05) -> Transform:
    """Returns images with independent normal noise added to every value; not clipped."""
    _require(std >= 0, "std must not be negative", "gaussian_noise.std")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        images = _require_float(batch, "gaussian_noise")
        draw = lambda k: jax.random.normal(k, images.shape[1:], images.dtype)  # noqa: E731
        return {**batch, "input": images + std * jax.vmap(draw)(rng.example_keys(key, batch))}

    return apply


# --- pairs ----------------------------------------------------------------------------------


def label_probs(batch: Batch, num_classes: int) -> Array:
    """Returns the target distributions `[b, k]`: `label_probs` where set, else from `label`."""
    if "label_probs" in batch:
        return batch["label_probs"]
    return (batch["label"][:, None] == jnp.arange(num_classes)[None]).astype(jnp.float32)


def make_feature_corruption(*, share: float = 0.6) -> Transform:
    """Returns a transform of tables that takes some cells of each row from other rows.

    SCARF (Bahri, Jiang, Tay, Metzler 2022, arXiv:2106.15147), section 3: a fixed number of columns
    of each row is chosen at random, and each of their cells is replaced by that of another example,
    drawn for each cell by itself: a draw from the column's own distribution. As in `mixup`, the
    other example is one of the batch. A cell whose other example is padding stays.

    Args:
      share: of the columns that are replaced; at least one is.

    Raises:
      ConfigError: a share outside (0, 1]; when traced, an input that is not a table.
    """
    _require(0 < share <= 1, f"share is {share}, not in (0, 1]", "feature_corruption.share")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        table = batch["input"]
        if not isinstance(table, Mapping):
            raise ConfigError(
                "the input is not a table, so it has no columns to take cells of",
                where="data.train_transforms",
                hint="for images there are random_resized_crop and color_jitter",
            )
        sizes = [table[kind].shape[1] for kind in ("categorical", "numeric")]
        d, b = sum(sizes), len(batch["mask"])
        u = _uniform(key, batch, 2, d)
        ranks = jnp.argsort(jnp.argsort(u[:, 0], axis=1), axis=1)
        other = _integer(u[:, 1], b)
        replaced = (ranks < max(1, round(share * d))) & (batch["mask"][other] > 0)
        parts, start = {}, 0
        for kind, size in zip(("categorical", "numeric"), sizes, strict=True):
            columns = slice(start, start := start + size)
            found = jnp.take_along_axis(table[kind], other[:, columns], axis=0)
            parts[kind] = jnp.where(replaced[:, columns], found, table[kind])
        return {**batch, "input": parts}

    return apply


def make_coarse_labels(*, groups: Sequence[int]) -> Transform:
    """Returns batches whose labels are groups of classes, for training on coarser ones.

    Args:
      groups: the group of each class, from 0: `(0, 1, 0, 1)` makes two groups of four classes.

    Raises:
      ConfigError: a negative group.
    """
    _require(min(groups, default=-1) >= 0, "groups are numbers from 0", "coarse_labels.groups")
    table = np.array(groups, np.int32)

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del key, step
        return {**batch, "label": jnp.asarray(table)[batch["label"]]}

    return apply


def _beta(key: Key, alpha: float) -> Array:
    """Draws from Beta(alpha, alpha) as the share of one of two gamma variates."""
    first, second = jax.random.loggamma(key, alpha, (2,))
    return jax.nn.sigmoid(first - second)


def _partner(x: Array) -> Array:
    return jnp.roll(x, 1, axis=0)


def _mix_labels(batch: Batch, keep: Array, num_classes: int) -> Array:
    probs, keep = label_probs(batch, num_classes), keep[:, None]
    return keep * probs + (1 - keep) * _partner(probs)


def _require_mix(alpha: float, num_classes: int, name: str) -> None:
    _require(alpha > 0, "alpha must be positive", f"{name}.alpha")
    _require(num_classes > 1, "num_classes must be at least 2", f"{name}.num_classes")


def make_mixup(*, num_classes: int, alpha: float = 1.0) -> Transform:
    """Returns convex combinations of each example and its left neighbour in the batch.

    Zhang, Cisse, Dauphin, Lopez-Paz (2018), equation (2): one weight a batch from
    Beta(alpha, alpha), as in the authors' code; batches are already shuffled, so the neighbour is
    a random partner. Sets `label_probs`. An example whose partner is padding stays unmixed, so
    that padding never reaches a row that counts.

    Args:
      num_classes: k.
      alpha: concentration.

    Raises:
      ConfigError: bad arguments; when traced, an input that is not float (mixtures of rounded
        pixels would lose precision: put `scale` or `normalize` before).
    """
    _require_mix(alpha, num_classes, "mixup")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        images = batch["input"]
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ConfigError(
                f"mixup of {images.dtype} images",
                where="data.augment",
                hint="put scale or normalize before mixup",
            )
        lam = _beta(jax.random.fold_in(key, step), alpha)
        keep = jnp.where(_partner(batch["mask"]) > 0, lam, 1.0)
        weight = keep.astype(images.dtype).reshape((-1,) + (1,) * (images.ndim - 1))
        images = weight * images + (1 - weight) * _partner(images)
        return {**batch, "input": images, "label_probs": _mix_labels(batch, keep, num_classes)}

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
      ConfigError: bad arguments; when traced, an input that is not float.
    """
    where = "random_resized_crop"
    _require(size >= 0, f"size is {size}, not 0 or more", f"{where}.size")
    _require(0 < area[0] <= area[1] <= 1, "area is not a range in (0, 1]", f"{where}.area")
    _require(0 < aspect <= 1, "aspect is not in (0, 1]", f"{where}.aspect")
    _require(0 <= flip <= 1, "flip is not in [0, 1]", f"{where}.flip")
    _require(alpha > 0, "alpha must be positive", f"{where}.alpha")
    kinds = ("none", "mixup", "cutmix")
    _require(self_mix in kinds, f"self_mix is not one of {', '.join(kinds)}", f"{where}.self_mix")
    limit = -math.log(aspect)

    def one(key: Key, batch: Batch) -> Array:
        share, ratio, top, left, mirror = _uniform(key, batch, 5).T
        share = area[0] + (area[1] - area[0]) * share
        tall = jnp.exp(limit * (2 * ratio - 1))
        height, width = (jnp.minimum(jnp.sqrt(x), 1) for x in (share * tall, share / tall))
        boxes = jnp.stack([top * (1 - height), left * (1 - width), height, width], -1)
        sides = (size, size) if size else None
        return resized_crop(batch["input"], boxes, mirror < flip, size=sides)

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        if not jnp.issubdtype(batch["input"].dtype, jnp.floating):
            raise ConfigError(
                f"a scaled crop of {batch['input'].dtype} images",
                where="data.train_transforms",
                hint="put scale or normalize before random_resized_crop",
            )
        first = one(key, batch)
        if self_mix == "none":
            return {**batch, "input": first}
        second = one(rng.stream(key, "second"), batch)
        keys = rng.example_keys(rng.stream(key, "mix"), batch)
        lam = jax.vmap(lambda k: _beta(k, alpha))(keys)
        if self_mix == "mixup":
            keep = lam.astype(first.dtype).reshape(-1, 1, 1, 1)
            mixed = keep * first + (1 - keep) * second
        else:
            size = first.shape[1:3]
            middle = _integer(_uniform(rng.stream(key, "box"), batch, 2), jnp.array([size]))
            boxes = jax.vmap(lambda share, at: cutmix_box(share, at, *size))(lam, middle)
            inside = box_mask(boxes, *size)
            mixed = jnp.where(inside[..., None], second, first)
            lam = 1 - inside.mean((1, 2))
        crops = jnp.stack([first, second], axis=1)
        return {**batch, "input": mixed, "crops": crops, "mix": lam.astype(jnp.float32)}

    return apply


def make_cutmix(*, num_classes: int, alpha: float = 1.0) -> Transform:
    """Returns images with one box of the batch pasted from the left neighbour.

    Yun, Han, Oh, Chun, Choe, Yoo (2019), section 3.1: Beta(alpha, alpha) for the share, a uniform
    centre, one box a batch as in the authors' code, and label weights by the area really pasted.
    Sets `label_probs`. An example whose partner is padding stays as it is.

    Args:
      num_classes: k.
      alpha: concentration.

    Raises:
      ConfigError: bad arguments.
    """
    _require_mix(alpha, num_classes, "cutmix")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        images = batch["input"]
        height, width = images.shape[1:3]
        share, centre = jax.random.split(jax.random.fold_in(key, step))
        lam = _beta(share, alpha)
        middle = _integer(jax.random.uniform(centre, (2,)), jnp.array([height, width]))
        inside = box_mask(cutmix_box(lam, middle, height, width), height, width)
        paired = _partner(batch["mask"]) > 0
        images = jnp.where(
            paired[:, None, None, None] & inside[None, :, :, None], _partner(images), images
        )
        keep = jnp.where(paired, 1 - inside.mean(), 1.0)
        return {**batch, "input": images, "label_probs": _mix_labels(batch, keep, num_classes)}

    return apply
