"""Building blocks of the connectors between feature maps."""

import flax.linen as nn
import jax

from distill_jax.core.api import Array
from distill_jax.models.layers import BatchNorm, Conv


class ConvUnit(nn.Module):
    """A convolution, then batch normalization or, without it, a bias."""

    features: int
    kernel_size: int
    batch_norm: bool

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        x = Conv(self.features, kernel_size=self.kernel_size)(x)
        if self.batch_norm:
            return BatchNorm()(x, train=train)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return x + bias.reshape(1, 1, 1, -1).astype(x.dtype)


class LeakyConvs(nn.Module):
    """3x3 convolution units of given widths, each followed by a leaky ReLU of slope 0.1."""

    widths: tuple[int, ...]
    batch_norm: bool

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        for width in self.widths:
            x = jax.nn.leaky_relu(ConvUnit(width, 3, self.batch_norm)(x, train=train), 0.1)
        return x
