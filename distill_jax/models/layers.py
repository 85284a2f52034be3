"""Layers shared by the networks: they follow the dtype of their input, statistics stay float32.

Images are `[b, h, w, c]`. Parameters are created in float32; a caller that casts parameters and
inputs to bfloat16 gets bfloat16 activations.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import lax

from distill_jax.core.api import Array
from distill_jax.models.convolution import conv2d, conv2d_same

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""He et al. 2015 for ReLU networks, by fan-out as in the distillation literature."""

dense_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""Uniform in +-1/sqrt(fan_in)."""


class Conv(nn.Module):
    """`conv2d` with a learned kernel, without a bias by default; parameters as `nn.Conv`.

    Attributes:
      features: output channels.
      kernel_size: side of the kernel, odd.
      stride: step between outputs.
      groups: see `conv2d`.
      use_bias: whether a bias is added; a batch norm makes it needless.
      same: whether images are padded as TensorFlow's "SAME" does, where the padding depends on the
        stride, in place of half a kernel on every side.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    groups: int = 1
    use_bias: bool = False
    same: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1] // self.groups, self.features)
        x, kernel = promote_dtype(x, self.param("kernel", he_normal, shape))
        apply = conv2d_same if self.same else conv2d
        x = apply(x, kernel, stride=self.stride, groups=self.groups)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            x += bias.reshape(1, 1, 1, -1).astype(x.dtype)
        return x


class BatchNorm(nn.Module):
    """Batch normalization over all axes but the last (Ioffe & Szegedy 2015).

    Statistics are reduced and kept in float32; the output has the dtype of the input. Over a batch
    sharded by `jit` they are those of the whole batch. The variance is that of the centred values,
    so that it stays right where the mean is far above the deviation.

    The running variance is an average of biased variances (over n), as in Flax; PyTorch averages
    unbiased ones (over n - 1).

    Attributes:
      momentum: share of the old running statistics that an update keeps.
      epsilon: added to the variance.
      affine: whether a learned gain and shift follow.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    affine: bool = True

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        shape = (x.shape[-1],)
        scale, bias = jnp.ones(shape), jnp.zeros(shape)
        if self.affine:
            scale = self.param("scale", nn.initializers.ones, shape)
            bias = self.param("bias", nn.initializers.zeros, shape)
        ra_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        ra_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        mean, var = ra_mean.value, ra_var.value
        if train:
            mean, var = _moments(x)
            if not self.is_initializing():
                keep = self.momentum
                ra_mean.value = keep * ra_mean.value + (1 - keep) * mean.astype(jnp.float32)
                ra_var.value = keep * ra_var.value + (1 - keep) * var.astype(jnp.float32)
        gain = scale * lax.rsqrt(var + self.epsilon)
        shift = bias - mean * gain
        row = (1,) * (x.ndim - 1) + shape
        return (x * gain.reshape(row) + shift.reshape(row)).astype(x.dtype)


def _moments(x: Array) -> tuple[Array, Array]:
    """Returns mean and biased variance over all axes but the last, at least in float32.

    The variance is the mean square of the differences to the mean, as which the mean has no
    derivative: that of the sum of the differences is 0. They are computed again in the backward
    pass, since XLA:CPU would otherwise write them to memory.
    """
    axes = tuple(range(x.ndim - 1))
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = x.mean(axes)
    centre = lax.stop_gradient(mean).reshape((1,) * len(axes) + mean.shape)
    return mean, jax.checkpoint(lambda x: jnp.square(x - centre).mean(axes))(x)


class LayerNorm(nn.Module):
    """Normalization of each vector along the last axis (Ba et al. 2016), with gain and shift.

    Parameters are those of `nn.LayerNorm`. The variance is that of the centred values, where Flax
    takes `E[x^2] - E[x]^2` by default. Statistics are computed in float32.

    Attributes:
      epsilon: added to the variance.
    """

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        row = (1,) * (x.ndim - 1) + shape
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - wide.mean(-1, keepdims=True)
        gain = lax.rsqrt((centred * centred).mean(-1, keepdims=True) + self.epsilon)
        return (centred * gain * scale.reshape(row) + bias.reshape(row)).astype(x.dtype)


class RMSNorm(nn.Module):
    """Division of each vector by its root mean square (Zhang & Sennrich 2019), with gain.

    Statistics are computed in float32.

    Attributes:
      epsilon: added to the mean square.
    """

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        row = (1,) * (x.ndim - 1) + scale.shape
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        gain = lax.rsqrt((wide * wide).mean(-1, keepdims=True) + self.epsilon)
        return (wide * gain * scale.reshape(row)).astype(x.dtype)


class Dense(nn.Module):
    """A linear map of the last axis as one product of two matrices, with `nn.Dense` parameters.

    Leading axes are flattened: a product with a three-dimensional operand is much slower on CPU.
    """

    features: int
    kernel_init: nn.initializers.Initializer = dense_uniform
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        x, kernel = promote_dtype(x, kernel)
        y = x.reshape(-1, x.shape[-1]) @ kernel
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y += bias.reshape(1, -1).astype(y.dtype)
        return y.reshape(*x.shape[:-1], self.features)


class DropPath(nn.Module):
    """Drops whole residual branches of examples (stochastic depth, Huang et al. 2016)."""

    rate: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        axes = tuple(range(1, x.ndim))
        return nn.Dropout(self.rate, broadcast_dims=axes)(x, deterministic=not train)


def mean_pool(x: Array) -> Array:
    """Averages squares of 2 x 2 pixels; an odd last row or column is dropped.

    The four pixels are added as slices, which XLA:CPU fuses with what is before and, in the
    backward pass, after: a window reduction writes its operands to memory.

    Args:
      x: `[b, h, w, c]`.

    Returns:
      `[b, h // 2, w // 2, c]`.
    """
    b, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)
    return (x[:, :, 0, :, 0] + x[:, :, 0, :, 1] + x[:, :, 1, :, 0] + x[:, :, 1, :, 1]) / 4


def gelu(x: Array) -> Array:
    """Gaussian error linear unit in its tanh form (Hendrycks & Gimpel 2016)."""
    return jax.nn.gelu(x, approximate=True)


def shuffle_channels(x: Array, groups: int) -> Array:
    """Interleaves groups of channels (Zhang et al. 2018, ShuffleNet, figure 1).

    Args:
      x: `[..., c]`, c a multiple of `groups`.
      groups: consecutive parts of c; output channel i comes from part i mod `groups`.
    """
    return x.reshape(*x.shape[:-1], groups, -1).swapaxes(-1, -2).reshape(x.shape)
