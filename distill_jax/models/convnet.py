"""A small convolutional network: a few 3x3 convolutions, each followed by 2x2 mean pooling."""

import flax.linen as nn
import jax

from distill_jax.core import ranges
from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ArgumentError
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import BatchNorm, Conv, Dense, mean_pool


class ConvNet(nn.Module):
    """The network of `make`."""

    num_classes: int
    widths: tuple[int, ...]
    dropout: float

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Outputs:
        outputs = {}
        for stage, width in enumerate(self.widths, start=1):
            pre = outputs[f"stage{stage}_pre"] = BatchNorm()(Conv(width)(x), train=train)
            x = outputs[f"stage{stage}"] = jax.nn.relu(pre)
            if min(x.shape[1:3]) > 1:
                x = mean_pool(x)
        x = outputs["embedding"] = x.mean((1, 2))
        if self.dropout:
            x = nn.Dropout(self.dropout)(x, deterministic=not train)
        if self.num_classes:
            outputs["logits"] = Dense(self.num_classes)(x)
        return outputs


def make(
    *, num_classes: int, widths: tuple[int, ...] = (16, 32, 64), dropout: float = 0.0
) -> Model:
    """Returns a ConvNet for images `[b, h, w, c]` of any size.

    Endpoints: `stage<i>` and `stage<i>_pre` of every width before pooling, `embedding`, `logits`.

    Args:
      num_classes: k; 0 leaves the last layer and `logits` out, for a head that is another network.
      widths: channels of the convolutions.
      dropout: rate before the last layer.

    Raises:
      ArgumentError: there is no width.
    """
    ranges.counts(num_classes=num_classes)
    ranges.sizes(widths=widths)
    ranges.rates(dropout=dropout)
    if not widths:
        raise ArgumentError("needs at least one width", where="widths", hint="e.g. (16, 32, 64)")
    return from_linen(ConvNet(num_classes, tuple(widths), dropout))
