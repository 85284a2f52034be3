"""A linear map or a perceptron on vectors: connectors, projection and prediction heads."""

import flax.linen as nn
import jax

from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ConfigError
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import BatchNorm, Dense


class Projector(nn.Module):
    """The network of `make`."""

    features: int
    hidden: tuple[int, ...]
    batch_norm: bool

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Outputs:
        for width in self.hidden:
            x = Dense(width)(x)
            if self.batch_norm:
                x = BatchNorm()(x, train=train)
            x = jax.nn.relu(x)
        return {"output": Dense(self.features)(x)}


def make(*, features: int, hidden: tuple[int, ...] = (), batch_norm: bool = False) -> Model:
    """Returns a map of `[b, ...]` to `output` `[b, ..., features]`, linear without hidden layers.

    Args:
      features: width of the output.
      hidden: widths of hidden layers, each followed by a ReLU.
      batch_norm: whether to normalize before every activation.

    Raises:
      ConfigError: a width below 1.
    """
    if min((features, *hidden)) < 1:
        raise ConfigError("a width below 1", where="features" if features < 1 else "hidden")
    return from_linen(Projector(features, tuple(hidden), batch_norm))
