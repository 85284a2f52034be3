"""Losses between feature maps: one value per example, `[b]`.

Maps are `[b, h, w, c]`. Where the papers sum over the elements of a map, these losses average, as
does the benchmark of Tian et al. 2020 (arXiv:1910.10699), whose weights the objectives use. The
exceptions are `boundary_distance` and `factor_distance`, for which its reductions differ.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core.api import Array
from distill_jax.core.errors import ArgumentError
from distill_jax.losses.ties import absolute, normalized


def as_map(x: Array, *, where: str) -> Array:
    """Views a feature as a map `[b, h, w, c]`.

    Args:
      x: a map; vectors `[b, d]`, which become `[b, 1, 1, d]`; or tokens `[b, t, d]` of a square
        grid in row order. A leading class token is dropped.
      where: config path of the feature.

    Raises:
      ArgumentError: the feature has another rank, or its tokens do not form a square grid.
    """
    if x.ndim == 4:
        return x
    if x.ndim == 2:
        return x[:, None, None]
    if x.ndim == 3:
        b, t, d = x.shape
        for grid in (t, t - 1):
            side = math.isqrt(grid)
            if side and side * side == grid:
                return x[:, t - grid :].reshape(b, side, side, d)
        raise ArgumentError(
            f"{t} tokens form no square, with a class token or without",
            where=where,
            hint="name an output that is a map, or a vector such as embedding",
        )
    raise ArgumentError(
        f"a feature of shape {x.shape} is no map",
        where=where,
        hint="[b, h, w, c], tokens [b, t, d] or vectors [b, d]",
    )


def match_sizes(first: Array, second: Array, *, where: str) -> tuple[Array, Array]:
    """Average-pools the larger of two maps to the smaller, by an integer factor per axis.

    Raises:
      ArgumentError: one size does not divide the other.
    """
    sizes = first.shape[1:3], second.shape[1:3]
    h, w = (min(pair) for pair in zip(*sizes, strict=True))
    if any(n % m for size in sizes for n, m in zip(size, (h, w), strict=True)):
        raise ArgumentError(
            f"maps of {sizes[0][0]}x{sizes[0][1]} and {sizes[1][0]}x{sizes[1][1]}",
            where=where,
            hint="the larger size must be a multiple of the smaller: name other stages",
        )
    return _pool(first, h, w), _pool(second, h, w)


def _pool(x: Array, h: int, w: int) -> Array:
    b, height, width, c = x.shape
    if (height, width) == (h, w):
        return x
    return x.reshape(b, h, height // h, w, width // w, c).mean((2, 4))


def check_same_shape(student: Array, teacher: Array, *, where: str, hint: str) -> None:
    """Raises `ArgumentError` unless two features have the same shape."""
    if student.shape != teacher.shape:
        raise ArgumentError(
            f"the student's features are {student.shape[1:]}, the teacher's {teacher.shape[1:]}",
            where=where,
            hint=hint,
        )


def mean_square(x: Array) -> Array:
    """Mean of the squares of each example, `[b, ...] -> [b]`."""
    return (x * x).reshape(x.shape[0], -1).mean(-1)


def _normalized(x: Array) -> Array:
    """Rows of unit length, `[b, ...] -> [b, n]`; a zero row stays zero and has no gradient."""
    return normalized(x.reshape(x.shape[0], -1), epsilon=1e-12)


def attention_distance(student: Array, teacher: Array) -> Array:
    """Squared distance of normalized attention maps (Zagoruyko & Komodakis 2017, eq. 2).

    An attention map is the mean over channels of the squared activations, scaled to unit length.

    Args:
      student: `[b, h, w, c]`.
      teacher: `[b, h, w, c']`.
    """
    maps = [_normalized((x * x).mean(-1)) for x in (student, teacher)]
    return mean_square(maps[0] - maps[1])


def gaussian_nll(target: Array, mean: Array, variance: Array) -> Array:
    """`1/2 (log variance + (target - mean)^2 / variance)`, averaged over the elements.

    The variational bound of Ahn et al. 2019 without its constant.

    Args:
      target: `[b, h, w, c]`.
      mean: `[b, h, w, c]`.
      variance: positive, `[1, 1, 1, c]`.
    """
    nll = 0.5 * (jnp.log(variance) + (target - mean) ** 2 / variance)
    return nll.reshape(nll.shape[0], -1).mean(-1)


def flow(first: Array, second: Array) -> Array:
    """Channel products of two maps of equal size, averaged over positions (Yim 2017, eq. 1).

    `[b, h, w, c], [b, h, w, c'] -> [b, c, c']`.
    """
    b, h, w, _ = first.shape
    first, second = (x.reshape(b, h * w, x.shape[-1]) for x in (first, second))
    return jnp.einsum("bpc,bpd->bcd", first, second) / (h * w)


def boundary_distance(student: Array, teacher: Array, *, margin: float) -> Array:
    """Squared hinge loss on the sign of the teacher's activations (Heo et al. 2019).

    Args:
      student: values before the activation, `[b, ...]`.
      teacher: values before the activation, `[b, ...]`; only their signs count.
      margin: distance from zero beyond which the student has no loss.
    """
    gap = jnp.where(teacher > 0, margin - student, margin + student)
    return mean_square(jax.nn.relu(gap))


def factor_distance(student: Array, teacher: Array) -> Array:
    """Mean absolute difference over the entries of unit-length factors (Kim et al. 2018).

    Equal entries have no gradient.
    """
    return absolute(_normalized(student) - _normalized(teacher)).mean(-1)


def hierarchical_distance(student: Array, teacher: Array) -> Array:
    """Hierarchical context loss of Chen et al. 2021.

    Mean squared differences at full size and after average pooling to 4, 2 and 1 positions per
    side, restricted to sizes below the smaller side of the map. Each level has half the weight of
    the one before, and the weights sum to 1.

    Args:
      student: `[b, h, w, c]`.
      teacher: `[b, h, w, c]`.
    """
    gap = student - teacher  # pooling is linear
    levels = [gap] + [_adaptive_pool(gap, n) for n in (4, 2, 1) if n < min(gap.shape[1:3])]
    weights = 0.5 ** np.arange(len(levels))
    weights = weights / weights.sum()
    return sum(
        (float(w) * mean_square(x) for w, x in zip(weights, levels, strict=True)),
        start=jnp.zeros_like(gap, shape=gap.shape[:1]),
    )


def _adaptive_pool(x: Array, size: int) -> Array:
    """Averages into `size` bins per side; bins overlap by up to one position if not divisible."""
    if not (x.shape[1] % size or x.shape[2] % size):
        return _pool(x, size, size)

    def bins(n: int) -> Array:
        i, position = np.arange(size)[:, None], np.arange(n)[None]
        inside = (position >= i * n // size) & (position < -(-(i + 1) * n // size))
        return jnp.asarray(inside / inside.sum(1, keepdims=True), x.dtype)

    return jnp.einsum(
        "ih,jw,bhwc->bijc", bins(x.shape[1]), bins(x.shape[2]), x, precision="highest"
    )
