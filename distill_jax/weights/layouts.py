"""How an array of another library is laid out, and how it is laid out here; both directions.

A layout is applied to one array, after several sources of one parameter were joined along their
first axis. `sizes` are the arguments of the network, such as the number of attention heads, which
shapes alone do not tell.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from distill_jax.core import resample

Sizes = Mapping[str, Any]
Convert = Callable[[np.ndarray, Sizes], np.ndarray]


class Layout(NamedTuple):
    """Two functions that undo each other.

    Attributes:
      forward: from the source's layout to ours.
      backward: from ours to the source's.
      resize: to another shape of ours where the shapes differ; None where they must agree.
      channels: axis of the input channels in the source's layout of a convolution.
    """

    forward: Convert
    backward: Convert
    resize: Callable[[np.ndarray, tuple[int, ...], Sizes], np.ndarray] | None = None
    channels: int = 1


def _same(x: np.ndarray, sizes: Sizes) -> np.ndarray:
    return x


def _transposed(x: np.ndarray, sizes: Sizes) -> np.ndarray:
    return x.T


def _by_head(x: np.ndarray, sizes: Sizes) -> np.ndarray:
    """From query, key and value of all heads to query, key and value of each head, first axis."""
    heads = sizes["heads"]
    return x.reshape(3, heads, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)


def _by_part(x: np.ndarray, sizes: Sizes) -> np.ndarray:
    heads = sizes["heads"]
    return x.reshape(heads, 3, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)


def _pairs_apart(heads: str) -> Convert:
    """From rows of a head in pairs (rotary positions of llama.cpp) to halves, transposed."""

    def convert(x: np.ndarray, sizes: Sizes) -> np.ndarray:
        n = sizes[heads]
        return x.reshape(n, -1, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape).T

    return convert


def _pairs_together(heads: str) -> Convert:
    def convert(x: np.ndarray, sizes: Sizes) -> np.ndarray:
        n, x = sizes[heads], x.T
        return x.reshape(n, 2, -1, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)

    return convert


def _patches(x: np.ndarray, sizes: Sizes) -> np.ndarray:
    """From a convolution `[d, c, p, p]` of stride p to a product with patches, `[p p c, d]`."""
    return x.transpose(2, 3, 1, 0).reshape(-1, len(x))


def _unpatches(x: np.ndarray, sizes: Sizes) -> np.ndarray:
    p = sizes["patch_size"]
    return x.reshape(p, p, -1, x.shape[-1]).transpose(3, 2, 0, 1)


def _patches_hwio(x: np.ndarray, sizes: Sizes) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])


def _unpatches_hwio(x: np.ndarray, sizes: Sizes) -> np.ndarray:
    p = sizes["patch_size"]
    return x.reshape(p, p, -1, x.shape[-1])


def _flax_by_head(x: np.ndarray, sizes: Sizes) -> np.ndarray:
    """From kernels `[3 d, heads, c]` of query, key and value to columns by head, `[d, heads 3 c]`.

    Biases are `[3 heads, c]`; `sizes["heads"]` is the number of heads.
    """
    if x.ndim == 2:
        return x.reshape(3, sizes["heads"], -1).swapaxes(0, 1).reshape(-1)
    d = len(x) // 3
    return x.reshape(3, d, *x.shape[1:]).transpose(1, 2, 0, 3).reshape(d, -1)


def _flax_by_part(x: np.ndarray, sizes: Sizes) -> np.ndarray:
    heads = sizes["heads"]
    if x.ndim == 1:
        return x.reshape(heads, 3, -1).swapaxes(0, 1).reshape(3 * heads, -1)
    d = len(x)
    return x.reshape(d, heads, 3, -1).transpose(2, 0, 1, 3).reshape(3 * d, heads, -1)


def resize_grid(x: np.ndarray, grid: Sequence[int]) -> np.ndarray:
    """Resizes `[h, w, d]` to `[*grid, d]`, bicubic."""
    rows, columns = (resample.matrix(n, m, "bicubic") for n, m in zip(x.shape, grid, strict=False))
    return np.einsum("ah,bw,hwd->abd", rows, columns, x.astype(np.float64)).astype(x.dtype)


def _resize_positions(x: np.ndarray, shape: tuple[int, ...], sizes: Sizes) -> np.ndarray:
    """Resizes embeddings `[1, front + h w, d]` of a square grid; the front ones stay.

    `sizes` may have `grid`, the height and width in patches to reach (a square by default).
    """
    classes = (sizes.get("pool", "cls") == "cls") + bool(sizes.get("distilled", False))
    front = classes if sizes.get("class_position", True) else 0
    side = math.isqrt(x.shape[1] - front)
    grid = sizes.get("grid") or (math.isqrt(shape[1] - front),) * 2
    if side * side + front != x.shape[1] or math.prod(grid) + front != shape[1]:
        raise ValueError(f"{x.shape[1]} positions cannot be resized to {shape[1]}: no square grid")
    patches = resize_grid(x[0, front:].reshape(side, side, -1), grid)
    return np.concatenate([x[:, :front], patches.reshape(1, -1, x.shape[2])], axis=1)


def adapt_channels(kernel: np.ndarray, channels: int, axis: int = 1) -> np.ndarray:
    """Returns a first convolution for images of another number of channels.

    Its input channels are along `axis`: `[d, c, kh, kw]` by default.

    One channel gets the sum over c, so that a grey image has the same result as c copies of it.
    Otherwise the c kernels are repeated in turn and scaled by c / channels, as in timm, which keeps
    the scale of the outputs.
    """
    c = kernel.shape[axis]
    if channels == 1:
        return kernel.sum(axis, keepdims=True, dtype=kernel.dtype)
    repeated = np.take(kernel, np.arange(channels) % c, axis)
    return repeated * kernel.dtype.type(c / channels)


LAYOUTS: Mapping[str, Layout] = {
    "same": Layout(_same, _same),
    "transposed": Layout(_transposed, _transposed),
    # [out, in / groups, h, w] and [h, w, in / groups, out], depthwise too
    "conv_kernel": Layout(
        lambda x, sizes: x.transpose(2, 3, 1, 0), lambda x, sizes: x.transpose(3, 2, 0, 1)
    ),
    # a 1x1 convolution as a product of matrices
    "pointwise_kernel": Layout(
        lambda x, sizes: x[:, :, 0, 0].T, lambda x, sizes: x.T[:, :, None, None]
    ),
    "patches_kernel": Layout(_patches, _unpatches),
    # [3 heads c, in] to columns by head; `sizes["heads"]`
    "qkv_kernel": Layout(lambda x, s: _by_head(x, s).T, lambda x, s: _by_part(x.T, s)),
    "qkv_bias": Layout(_by_head, _by_part),
    "positions": Layout(_same, _same, _resize_positions),
    # a token `[d]` to `[1, 1, d]`, and a table of positions `[t, d]` to `[1, t, d]`
    "vector": Layout(lambda x, s: x[None, None], lambda x, s: x[0, 0]),
    # a gain of channels `[d, 1, 1]`
    "column": Layout(lambda x, s: x[:, 0, 0], lambda x, s: x[:, None, None]),
    "position_table": Layout(lambda x, s: x[None], lambda x, s: x[0], _resize_positions),
    # of Flax: patches `[p, p, c, d]`, products of attention with an axis for the heads
    "patches_hwio": Layout(_patches_hwio, _unpatches_hwio, channels=2),
    "qkv_flax": Layout(_flax_by_head, _flax_by_part),
    "out_flax": Layout(
        lambda x, s: x.reshape(-1, x.shape[-1]),
        lambda x, s: x.reshape(s["heads"], -1, x.shape[-1]),
    ),
    # [heads c, in] whose rows rotary positions turn in pairs, to columns that they turn by halves
    "rotary_heads": Layout(_pairs_apart("heads"), _pairs_together("heads")),
    "rotary_groups": Layout(_pairs_apart("groups"), _pairs_together("groups")),
}

KINDS: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    "conv": (("weight", "kernel", "conv_kernel"), ("bias", "bias", "same")),
    "pointwise": (("weight", "kernel", "pointwise_kernel"), ("bias", "bias", "same")),
    "patches": (("weight", "kernel", "patches_kernel"), ("bias", "bias", "same")),
    "linear": (("weight", "kernel", "transposed"), ("bias", "bias", "same")),
    "linear_io": (("weight", "kernel", "same"), ("bias", "bias", "same")),
    "qkv": (("weight", "kernel", "qkv_kernel"), ("bias", "bias", "qkv_bias")),
    "norm": (("weight", "scale", "same"), ("bias", "bias", "same")),
    "batch_norm": (
        ("weight", "scale", "same"),
        ("bias", "bias", "same"),
        ("running_mean", "batch_stats:mean", "same"),
        ("running_var", "batch_stats:var", "same"),
    ),
    "embedding": (("weight", "embedding", "same"),),
}
"""Layers: names of their tensors at the source, here, and the layout of each."""
