"""A convolutional auto-encoder of feature maps (Kim et al. 2018, arXiv:1802.04977)."""

import flax.linen as nn

from distill_jax.core import ranges
from distill_jax.core.api import Array, Model, Outputs
from distill_jax.models._connectors import LeakyConvs
from distill_jax.models.adapters import from_linen


class Paraphraser(nn.Module):
    """The network of `make`."""

    rate: float
    depth: int
    batch_norm: bool

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Outputs:
        c = x.shape[-1]
        k = max(1, round(self.rate * c))
        encode, decode = factor_widths(c, k, self.depth), factor_widths(k, c, self.depth)
        factor = LeakyConvs(encode, self.batch_norm)(x, train=train)
        output = LeakyConvs(decode, self.batch_norm)(factor, train=train)
        return {"factor": factor, "output": output}


def factor_widths(old: int, new: int, depth: int) -> tuple[int, ...]:
    """Returns the widths of a path from `old` channels to `new`: the last two are new."""
    kept = max(0, depth - 2)
    return (old,) * kept + (new,) * (depth - kept)


def make(*, rate: float = 0.5, depth: int = 3, batch_norm: bool = True) -> Model:
    """Returns an auto-encoder of maps `[b, h, w, c]`: `factor` `[b, h, w, k]` and `output`.

    Args:
      rate: k over c.
      depth: 3x3 convolutions on either side. Those that decode have stride 1, at which a transposed
        convolution is a convolution.
      batch_norm: whether batch norm follows each convolution, in place of a bias.

    Raises:
      ArgumentError: a rate that is not positive, or no convolution.
    """
    ranges.depths(depth=depth)
    ranges.within("(0, 1000]", rate=rate)
    return from_linen(Paraphraser(rate, depth, batch_norm))
