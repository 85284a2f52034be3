"""The ratio network of TGeo-KD: a perceptron that starts at a given ratio."""

import math

import flax.linen as nn
import jax

from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ArgumentError
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import Dense, dense_uniform


def head(x: Array, *, outputs: int, ratio: float, zero_init: bool) -> Array:
    """Returns logits `[b, outputs]` whose sigmoids start at `ratio`; called inside a module.

    The offset is a constant, not a learned bias, so that weight decay pulls towards `ratio`.
    """
    last = nn.initializers.zeros if zero_init else dense_uniform
    return Dense(outputs, kernel_init=last)(x) + math.log(ratio / (1 - ratio))


def check_head(outputs: int, ratio: float) -> None:
    """Raises `ArgumentError` for a ratio outside (0, 1), or no outputs."""
    if not 0 < ratio < 1:
        raise ArgumentError(f"ratio is {ratio}", where="ratio", hint="between 0 and 1")
    if outputs < 1:
        raise ArgumentError(f"outputs is {outputs}", where="outputs", hint="at least 1")


class RatioMLP(nn.Module):
    """The network of `make`."""

    outputs: int
    hidden: tuple[int, ...]
    ratio: float
    zero_init: bool

    @nn.compact
    def __call__(self, x: Array) -> Outputs:
        x = x.reshape(x.shape[0], -1)
        for width in self.hidden:
            x = jax.nn.relu(Dense(width)(x))
        logits = head(x, outputs=self.outputs, ratio=self.ratio, zero_init=self.zero_init)
        return {"logits": logits}


def make(
    *,
    outputs: int = 1,
    hidden: tuple[int, ...] = (128,),
    ratio: float = 0.5,
    zero_init: bool = True,
) -> Model:
    """Returns a ReLU perceptron `[b, ...] -> logits [b, outputs]`.

    Args:
      outputs: number of loss terms, or one fewer, depending on the weighting.
      hidden: widths; `()`, `(128,)` and `(128, 64)` are the 1-, 2- and 3-layer networks of Hu et
        al. 2024, table 5.
      ratio: the sigmoid of every output at the start, in (0, 1).
      zero_init: whether the last kernel starts at zero, which makes that exact. A network that is
        never trained needs a random one.

    Raises:
      ArgumentError: a ratio outside (0, 1), no outputs, or a hidden layer without units.
    """
    check_head(outputs, ratio)
    if any(width < 1 for width in hidden):
        raise ArgumentError(
            f"hidden is {tuple(hidden)}",
            where="hidden",
            hint="widths of at least 1, or () for a linear map",
        )
    return from_linen(RatioMLP(outputs, tuple(hidden), ratio, zero_init))
