"""The ratio network of TGeo-KD: a perceptron that starts at a given ratio."""

import math

import flax.linen as nn
import jax

from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ConfigError
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import Dense, dense_uniform


class RatioMLP(nn.Module):
    """The network of `make`."""

    outputs: int
    hidden: tuple[int, ...]
    bias: float
    zero_init: bool

    @nn.compact
    def __call__(self, x: Array) -> Outputs:
        x = x.reshape(x.shape[0], -1)
        for width in self.hidden:
            x = jax.nn.relu(Dense(width)(x))
        last = nn.initializers.zeros if self.zero_init else dense_uniform
        return {"logits": Dense(self.outputs, kernel_init=last)(x) + self.bias}


def make(
    *,
    outputs: int = 1,
    hidden: tuple[int, ...] = (128,),
    ratio: float = 0.5,
    zero_init: bool = True,
) -> Model:
    """Returns a ReLU perceptron `[b, ...] -> logits [b, outputs]`.

    Args:
      outputs: one fewer than there are signals, or as many, as the weigher asks.
      hidden: widths; `()`, `(128,)` and `(128, 64)` are the 1-, 2- and 3-layer networks of Hu et
        al. 2024, table 5.
      ratio: the sigmoid of every output at the start, in (0, 1).
      zero_init: whether the last kernel starts at zero, which makes that exact. A network that is
        never trained needs a random one.

    Raises:
      ConfigError: a ratio outside (0, 1), or no outputs.
    """
    if not 0 < ratio < 1:
        raise ConfigError(
            f"ratio is {ratio}", where="roles.weigher.kwargs.ratio", hint="between 0 and 1"
        )
    if outputs < 1:
        raise ConfigError(
            f"outputs is {outputs}", where="roles.weigher.kwargs.outputs", hint="at least 1"
        )
    bias = math.log(ratio / (1 - ratio))
    return from_linen(RatioMLP(outputs, tuple(hidden), bias, zero_init))
