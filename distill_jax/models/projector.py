"""A linear map or a perceptron on vectors: connectors, projection and prediction heads."""

import flax.linen as nn
import jax

from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ArgumentError
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import BatchNorm, Dense


class Projector(nn.Module):
    """The network of `make`."""

    features: int
    hidden: tuple[int, ...]
    batch_norm: bool
    last_norm: bool
    last_bias: bool

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Outputs:
        outputs = {}
        for layer, width in enumerate(self.hidden, start=1):
            x = Dense(width)(x)
            if self.batch_norm:
                x = BatchNorm()(x, train=train)
            x = outputs[f"hidden{layer}"] = jax.nn.relu(x)
        if self.features:
            x = Dense(self.features, use_bias=self.last_bias and not self.last_norm)(x)
        if self.last_norm:
            x = BatchNorm(affine=False)(x, train=train)
        return {**outputs, "output": x}


def make(
    *,
    features: int,
    hidden: tuple[int, ...] = (),
    batch_norm: bool = False,
    last_norm: bool = False,
    last_bias: bool = True,
) -> Model:
    """Returns a map of `[b, ...]` to `output` `[b, ..., features]`, linear without hidden layers.

    Endpoints: `hidden<i>` after each activation, and `output`.

    Args:
      features: width of the output; 0 gives that of the last hidden layer, to go on from a part of
        a stored projector (`init="<run>#projector/*"`).
      hidden: widths of hidden layers, each followed by a ReLU.
      batch_norm: whether to normalize before every activation.
      last_norm: whether to normalize the output, without gain and shift.
      last_bias: whether the last layer has one; with `last_norm` it has none. A loss of centred
        outputs gives it no gradient.

    Raises:
      ArgumentError: a width below 1.
    """
    if min(hidden, default=1) < 1 or features < 0 or not (features or hidden):
        raise ArgumentError("a width below 1", where="hidden" if features >= 1 else "features")
    return from_linen(Projector(features, tuple(hidden), batch_norm, last_norm, last_bias))
