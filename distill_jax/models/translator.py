"""Convolutions from a student's map to a teacher's factors (Kim et al. 2018, arXiv:1802.04977)."""

import flax.linen as nn

from distill_jax.core import ranges
from distill_jax.core.api import Array, Model, Outputs
from distill_jax.models._connectors import LeakyConvs
from distill_jax.models.adapters import from_linen
from distill_jax.models.paraphraser import factor_widths


class Translator(nn.Module):
    """The network of `make`."""

    depth: int
    batch_norm: bool

    @nn.compact
    def __call__(self, x: Array, like: Array, train: bool = False) -> Outputs:
        widths = factor_widths(x.shape[-1], like.shape[-1], self.depth)
        return {"output1": LeakyConvs(widths, self.batch_norm)(x, train=train)}


def make(*, depth: int = 3, batch_norm: bool = True) -> Model:
    """Returns a map of `[b, h, w, c]` to `output1` with the channels of its second input.

    Args:
      depth: 3x3 convolutions.
      batch_norm: whether batch norm follows each convolution, in place of a bias.

    Raises:
      ArgumentError: no convolution.
    """
    ranges.depths(depth=depth)
    return from_linen(Translator(depth, batch_norm))
