"""Convolutions from a student's feature maps to the channels of a teacher's."""

import math

import flax.linen as nn
import jax

from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ArgumentError
from distill_jax.models._connectors import ConvUnit
from distill_jax.models.adapters import from_linen

VARIANCE_FLOOR = 1e-5


class Regressor(nn.Module):
    """The network of `make`."""

    kernel_sizes: tuple[int, ...]
    reduction: int
    batch_norm: bool
    relu: bool
    variance: float

    @nn.compact
    def __call__(self, *maps: Array, train: bool = False) -> Outputs:
        outputs, half = {}, len(maps) // 2
        for i, (x, like) in enumerate(zip(maps[:half], maps[half:], strict=True), start=1):
            width = like.shape[-1]
            last = len(self.kernel_sizes) - 1
            for layer, size in enumerate(self.kernel_sizes):
                features = width if layer == last else max(1, width // self.reduction)
                x = ConvUnit(features, size, self.batch_norm)(x, train=train)
                if layer < last or self.relu:
                    x = jax.nn.relu(x)
            outputs[f"output{i}"] = x
            if self.variance:
                start = math.log(math.expm1(self.variance - VARIANCE_FLOOR))
                raw = self.param(f"variance{i}", nn.initializers.constant(start), (width,))
                variance = jax.nn.softplus(raw) + VARIANCE_FLOOR
                outputs[f"variance{i}"] = variance.reshape(1, 1, 1, width)
        return outputs


def make(
    *,
    kernel_sizes: tuple[int, ...] = (1,),
    reduction: int = 1,
    batch_norm: bool = False,
    relu: bool = False,
    variance: float = 0.0,
) -> Model:
    """Returns a map of s student features to s teacher features, one stack of layers a pair.

    It is called with s maps `[b, h, w, c]`, then s maps `[b, h, w, c']` that only set the numbers
    of channels, and returns `output1`, ... `[b, h, w, c']` and, with a variance, `variance1`, ...
    `[1, 1, 1, c']`.

    Args:
      kernel_sizes: of the convolutions of a stack, odd; a ReLU lies between two of them.
      reduction: hidden convolutions have the teacher's channels over this many.
      batch_norm: whether batch norm follows each convolution, in place of a bias.
      relu: whether a ReLU follows the last: where the teacher's features are activated.
      variance: initial value of a learned variance of each channel, a softplus; 0 has none.

    Raises:
      ArgumentError: no layer, an even kernel, a reduction below 1 or a variance not above 1e-5.
    """
    if not kernel_sizes or any(size < 1 or size % 2 == 0 for size in kernel_sizes):
        raise ArgumentError(
            f"kernels of {kernel_sizes}", where="kernel_sizes", hint="odd numbers, at least one"
        )
    if reduction < 1:
        raise ArgumentError(f"must be at least 1, not {reduction}", where="reduction")
    if variance and not variance > VARIANCE_FLOOR:
        raise ArgumentError(f"a variance of {variance}", where="variance", hint="above 1e-5, or 0")
    return from_linen(Regressor(tuple(kernel_sizes), reduction, batch_norm, relu, variance))
