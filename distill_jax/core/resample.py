"""Matrices that resize an axis, as Pillow and `interpolate(antialias=True)` of PyTorch do."""

from collections.abc import Callable, Mapping

import numpy as np


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(0, 1 - np.abs(x))


def _cubic(x: np.ndarray) -> np.ndarray:
    """The kernel of Keys 1981 (Cubic convolution interpolation, equation 15), a = -0.5."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


KERNELS: Mapping[str, Callable[[np.ndarray], np.ndarray] | None] = {
    "nearest": None,
    "bilinear": _triangle,
    "bicubic": _cubic,
    "lanczos": _lanczos,
}
"""Interpolations, in units of the larger of the two grids."""


def matrix(source: int, target: int, interpolation: str) -> np.ndarray:
    """Returns the matrix `[target, source]`, float64, that resizes an axis.

    The kernel is widened where the axis shrinks (antialiasing), and its weights are normalised
    where it reaches over an end.

    Args:
      source: values of the axis.
      target: values of the result.
      interpolation: one of `KERNELS`.
    """
    kernel, twice = KERNELS[interpolation], source * (2 * np.arange(target) + 1)
    if kernel is None:
        return np.eye(source)[twice // (2 * target)]
    distance = np.arange(source)[None, :] + 0.5 - twice[:, None] / (2 * target)
    weights = kernel(distance / max(source / target, 1.0))
    return weights / weights.sum(1, keepdims=True)
