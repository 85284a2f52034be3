"""A small convolutional network over the bytes of a file's two ends.

Two strided convolutions, with the maximum and the mean over each half of the window, find byte
n-grams at any position and how common they are; a separate part reads the signature at the
beginning. All of it is normalised (`LayerNorm`) before the last hidden layer. Convolutions are
matrix products over reshaped windows, which is fastest on a CPU.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from distill_jax.core import ranges
from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ArgumentError
from distill_jax.models._tables import unit_normal
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import Dense, LayerNorm

PATCH = 4
"""Bytes by which the windows of the first convolution move on."""


class ByteConvNet(nn.Module):
    """The network of `make`."""

    num_classes: int
    symbols: int
    embedding_dim: int
    widths: tuple[int, int]
    hidden: int
    header: int
    dropout: float

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Outputs:
        if x.ndim != 2 or x.dtype.kind not in "iu" or x.shape[1] % (4 * PATCH):
            raise ArgumentError(
                f"the input is {x.dtype} {x.shape}",
                where="input",
                hint=f"integers [b, t] with t a multiple of {4 * PATCH} are needed",
            )
        table = self.param("embedding", unit_normal, (self.symbols, self.embedding_dim))
        ids = jnp.clip(x.astype(jnp.int32), 0, self.symbols - 1)
        x = jnp.take(table, ids, axis=0).reshape(x.shape[0], -1, PATCH * self.embedding_dim)
        x = jax.nn.gelu(Dense(self.widths[0])(_joined(x)))  # windows of 8 bytes, 4 apart
        outputs = {"stage1": x}
        start = x[:, : self.header].reshape(x.shape[0], -1)
        x = x.reshape(x.shape[0], -1, 2 * self.widths[0])
        x = jax.nn.gelu(Dense(self.widths[1])(_joined(x)))  # windows of 20 bytes, 8 apart
        outputs["stage2"] = x
        halves = x.reshape(x.shape[0], 2, -1, self.widths[1])
        pooled = jnp.concatenate([halves.max(2), halves.mean(2)], axis=2)
        x = jnp.concatenate([pooled.reshape(x.shape[0], -1), start], axis=1)
        x = LayerNorm()(x)
        x = outputs["embedding"] = jax.nn.gelu(Dense(self.hidden)(x))
        if self.dropout:
            x = nn.Dropout(self.dropout)(x, deterministic=not train)
        if self.num_classes:
            outputs["logits"] = Dense(self.num_classes)(x)
        return outputs


def _joined(x: Array) -> Array:
    """Returns each of vectors `[b, t, d]` beside the next, `[b, t, 2 d]`; after the last is 0."""
    return jnp.concatenate([x, jnp.pad(x[:, 1:], ((0, 0), (0, 1), (0, 0)))], axis=2)


def make(
    *,
    num_classes: int,
    symbols: int = 257,
    embedding_dim: int = 8,
    widths: tuple[int, int] = (32, 64),
    hidden: int = 96,
    header: int = 4,
    dropout: float = 0.0,
) -> Model:
    """Returns a network for windows of bytes, integers `[b, t]`, t a multiple of 16.

    Endpoints: `stage1` `[b, t / 4, widths[0]]`, `stage2` `[b, t / 8, widths[1]]`, `embedding`
    `[b, hidden]` and `logits` `[b, num_classes]`.

    Args:
      num_classes: k; 0 leaves the last layer and `logits` out.
      symbols: values of the input, 256 bytes and padding; others count as the nearest.
      embedding_dim: size of the vector of a byte.
      widths: channels of the two convolutions.
      hidden: width of the last hidden layer.
      header: leading windows of the first convolution that the last layers read without pooling.
      dropout: rate before the last layer.

    Raises:
      ArgumentError: a size below 1 or a rate outside [0, 1); when the network is first called, also
        an input of another shape or type.
    """
    ranges.counts(num_classes=num_classes)
    ranges.sizes(symbols=symbols, embedding_dim=embedding_dim, hidden=hidden, header=header)
    ranges.sizes(widths=tuple(widths))
    if len(widths) != 2:
        raise ArgumentError(f"widths are {widths}", where="widths", hint="of two convolutions")
    first, second = widths
    ranges.rates(dropout=dropout)
    return from_linen(
        ByteConvNet(num_classes, symbols, embedding_dim, (first, second), hidden, header, dropout)
    )
