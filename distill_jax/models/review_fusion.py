"""Attention-based fusion of stages, deep to shallow (Chen et al. 2021, arXiv:2104.09044)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ConfigError
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
    """Resizes a map to `size`; whole multiples are repetitions, without a gather."""
    (h, w), (height, width) = x.shape[1:3], size
    if height % h or width % w:
        return jax.image.resize(x, (x.shape[0], height, width, x.shape[-1]), "nearest")
    return x.repeat(height // h, axis=1).repeat(width // w, axis=2)


def make(*, width: int = 0, batch_norm: bool = True) -> Model:
    """Returns the fusion of s student maps, each with what comes from deeper ones.

    It is called with s maps `[b, h, w, c]`, shallow to deep, then s maps of which only the shapes
    count, and returns `output1`, ... of those shapes. Deeper maps are resized to the next stage by
    nearest neighbours.

    Args:
      width: channels of the fusion; 0 takes those of the student's deepest map, at most 512.
      batch_norm: whether batch norm follows each convolution but those of the gates, in place of
        a bias.

    Raises:
      ConfigError: a negative width.
    """
    if width < 0:
        raise ConfigError(f"must be at least 0, not {width}", where="width")
    return from_linen(ReviewFusion(width, batch_norm))
