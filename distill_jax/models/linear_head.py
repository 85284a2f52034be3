"""The linear layer at the end of a classifier, as a separate network."""

from distill_jax.core.api import Model
from distill_jax.core.errors import ArgumentError
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import Dense


def make(*, num_classes: int) -> Model:
    """Returns a linear map of `[b, d]` to `logits` `[b, k]`, parameters `kernel` and `bias`.

    A role with this model takes over the classifier of a trained network by
    `init="<run>#<role>/<layer>"`, where the layer is named as in that network's parameters
    (`Dense_0` in the networks of this package).

    Args:
      num_classes: k.

    Raises:
      ArgumentError: fewer than one class.
    """
    if num_classes < 1:
        raise ArgumentError(f"must be at least 1, not {num_classes}", where="num_classes")
    return from_linen(Dense(num_classes))
