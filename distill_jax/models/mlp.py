"""A multilayer perceptron over flattened inputs."""

import flax.linen as nn
import jax

from distill_jax.core import ranges
from distill_jax.core.api import Array, Model, Outputs
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import BatchNorm, Dense


class MLP(nn.Module):
    """The network of `make`."""

    num_classes: int
    hidden: tuple[int, ...]
    dropout: float
    batch_norm: bool
    pool: int

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Outputs:
        outputs = {}
        if self.pool > 1:
            x = nn.avg_pool(x, (self.pool, self.pool), (self.pool, self.pool))
        x = x.reshape(x.shape[0], -1)
        for stage, width in enumerate(self.hidden, start=1):
            x = Dense(width)(x)
            if self.batch_norm:
                x = BatchNorm()(x, train=train)
            outputs[f"stage{stage}_pre"] = x
            x = outputs[f"stage{stage}"] = jax.nn.relu(x)
            if self.dropout:
                x = nn.Dropout(self.dropout)(x, deterministic=not train)
        outputs["embedding"] = x
        if self.num_classes:
            outputs["logits"] = Dense(self.num_classes)(x)
        return outputs


def make(
    *,
    num_classes: int,
    hidden: tuple[int, ...] = (512, 512),
    dropout: float = 0.0,
    batch_norm: bool = False,
    pool: int = 1,
) -> Model:
    """Returns a perceptron for inputs `[b, ...]`; without hidden layers it is a linear model.

    Endpoints: `stage<i>` `[b, hidden_i]` and `stage<i>_pre` of every hidden layer, `embedding`
    (input of the last layer) and `logits`.

    Args:
      num_classes: k; 0 leaves the last layer and `logits` out, for a head that is another network.
      hidden: widths of the hidden layers.
      dropout: rate after every hidden layer.
      batch_norm: whether to normalize before every activation.
      pool: side of the squares of pixels that are averaged first, for images `[b, h, w, c]`; 1
        keeps them. It gives a network that sees less than another one does.
    """
    ranges.counts(num_classes=num_classes)
    ranges.sizes(hidden=hidden, pool=pool)
    ranges.rates(dropout=dropout)
    return from_linen(MLP(num_classes, tuple(hidden), dropout, batch_norm, pool))
