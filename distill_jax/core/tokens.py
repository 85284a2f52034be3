"""Parts of an example as tokens: patches of images and clips, selection of tokens, positions.

Masked methods refer to tokens by their index in [0, t), row by row. Tokens that a network prepends
(class, registers) have no index.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from distill_jax.core.api import Array
from distill_jax.core.errors import ArgumentError


def divisors(n: int) -> str:
    """Returns the divisors of `n` as a list for a hint."""
    return ", ".join(str(k) for k in range(1, n + 1) if n % k == 0)


def grid_of(
    shape: Sequence[int], *, patch_size: int, tubelet: int = 1, where: str = "patch_size"
) -> tuple[int, ...]:
    """Returns the numbers of patches along each axis of an image or clip `([f,] h, w, c)`.

    Raises:
      ArgumentError: they do not divide its sides.
    """
    *frames, h, w, _ = shape
    if patch_size < 1 or h % patch_size or w % patch_size:
        raise ArgumentError(
            f"an image of {h}x{w} cannot be cut into patches of {patch_size}x{patch_size}",
            where=where,
            hint=f"divisors: {divisors(math.gcd(h, w))}",
        )
    if frames and (tubelet < 1 or frames[0] % tubelet):
        raise ArgumentError(
            f"a clip of {frames[0]} frames cannot be cut into {tubelet} at a time",
            where="tubelet",
            hint=f"divisors: {divisors(frames[0])}",
        )
    return (*(f // tubelet for f in frames), h // patch_size, w // patch_size)


def patchify(x: Array, *, patch_size: int, tubelet: int = 1) -> Array:
    """Cuts images `[b, h, w, c]` into `[b, t, p p c]`, clips `[b, f, h, w, c]` likewise in time.

    Args:
      x: images or clips.
      patch_size: p, side of a patch in pixels.
      tubelet: u, frames of a patch of a clip.

    Raises:
      ArgumentError: see `grid_of`.
    """
    grid = grid_of(x.shape[1:], patch_size=patch_size, tubelet=tubelet)
    b, p, c = x.shape[0], patch_size, x.shape[-1]
    if len(grid) == 2:
        x = x.reshape(b, grid[0], p, grid[1], p, c).swapaxes(2, 3)
    else:
        x = x.reshape(b, grid[0], tubelet, grid[1], p, grid[2], p, c)
        x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(b, math.prod(grid), -1)


def unpatchify(patches: Array, *, shape: Sequence[int]) -> Array:
    """Puts square patches `[b, t, p p c]` together to images `[b, *shape]`: undoes `patchify`."""
    h, w, c = shape
    p = math.isqrt(patches.shape[-1] // c)
    x = patches.reshape(patches.shape[0], h // p, w // p, p, p, c).swapaxes(2, 3)
    return x.reshape(patches.shape[0], h, w, c)


def take(tokens: Array, indices: Array) -> Array:
    """Returns chosen tokens: `[b, t, d]` at `[b, ...]` is `[b, ..., d]`."""
    flat = indices.reshape(indices.shape[0], -1, 1)
    return jnp.take_along_axis(tokens, flat, axis=1).reshape(*indices.shape, tokens.shape[-1])


def fourier_positions(grid: Sequence[int], width: int) -> np.ndarray:
    """Returns fixed positions of a grid, float32 `[t, width]`: sines and cosines along each axis.

    Each axis has an equal share of the width, with the frequencies of Vaswani et al. (2017,
    arXiv:1706.03762), section 3.5; the rest of the width is 0.

    Raises:
      ArgumentError: 2**28 numbers or more.
    """
    if math.prod(grid) * width >= 2**28:
        raise ArgumentError(
            f"positions of {math.prod(grid)} tokens, {width:,} wide",
            where="width",
            hint="below 2**28 numbers in all",
        )
    count = width // (2 * len(grid))
    frequencies = 1 / 10000 ** (np.arange(count) / max(count, 1))
    places = np.stack(np.meshgrid(*(np.arange(n) for n in grid), indexing="ij"), -1)
    angles = places.reshape(-1, len(grid), 1) * frequencies[None, None]
    waves = np.concatenate([np.sin(angles), np.cos(angles)], -1).reshape(len(angles), -1)
    rest = np.zeros((len(angles), width - waves.shape[1]))
    return np.concatenate([waves, rest], 1).astype(np.float32)
