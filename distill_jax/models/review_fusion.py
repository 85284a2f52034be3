"""Attention-based fusion of stages, deep to shallow (Chen et al. 2021, arXiv:2104.09044)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ArgumentError
from distill_jax.models._connectors import ConvUnit
from distill_jax.models.adapters import from_linen


class ReviewFusion(nn.Module):
    """The network of `make`."""

    width: int
    batch_norm: bool

    @nn.compact
    def __call__(self, *maps: Array, train: bool = False) -> Outputs:
        half = len(maps) // 2
        width = self.width or min(512, maps[half - 1].shape[-1])
        outputs: dict[str, Array] = {}
        deeper = None
        for i in reversed(range(half)):
            like = maps[half + i]
            x = ConvUnit(width, 1, self.batch_norm)(maps[i], train=train)
            if deeper is not None:
                deeper = nearest_resize(deeper, x.shape[1:3])
                both = jnp.concatenate([x, deeper], axis=-1)
                gate = jax.nn.sigmoid(ConvUnit(2, 1, batch_norm=False)(both, train=train))
                x = x * gate[..., :1] + deeper * gate[..., 1:]
            x = deeper = nearest_resize(x, like.shape[1:3])
            outputs[f"output{i + 1}"] = ConvUnit(like.shape[-1], 3, self.batch_norm)(x, train=train)
        return outputs


def nearest_resize(x: Array, size: tuple[int, ...]) -> Array:
    """Resizes a map to `size` as PyTorch's "nearest": row i is row `floor(i h / height)`.

    `jax.image.resize` and PyTorch's "nearest-exact" take the row at the centre instead. Whole
    multiples are repetitions, without a gather.
    """
    for axis, m in zip((1, 2), size, strict=True):
        n = x.shape[axis]
        if m % n:
            # In float32, as PyTorch rounds.
            at = np.arange(m, dtype=np.float32) * (np.float32(n) / np.float32(m))
            x = x.take(np.minimum(at.astype(np.int32), n - 1), axis=axis)
        else:
            x = x.repeat(m // n, axis=axis)
    return x


def make(*, width: int = 0, batch_norm: bool = True) -> Model:
    """Returns the fusion of s student maps, each with the fused deeper ones.

    It is called with s maps `[b, h, w, c]`, shallow to deep, then s maps that only set the output
    shapes, and returns `output1`, ... of those shapes. Deeper maps are resized to the next stage by
    nearest neighbours.

    Args:
      width: channels of the fusion; 0 takes those of the student's deepest map, at most 512.
      batch_norm: whether batch norm follows each convolution but those of the gates, in place of
        a bias.

    Raises:
      ArgumentError: a negative width.
    """
    if width < 0:
        raise ArgumentError(f"must be at least 0, not {width}", where="width")
    return from_linen(ReviewFusion(width, batch_norm))
