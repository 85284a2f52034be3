"""A network whose classes are groups of those that it was trained on."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core.api import Model
from distill_jax.core.errors import ArgumentError

Groups = Sequence[int | Sequence[int]]
"""For each class here an index of the network's own, or several."""


def indices_of(groups: Groups) -> tuple[tuple[int, ...], ...]:
    """Returns the groups as tuples."""
    return tuple((g,) if isinstance(g, int) else tuple(g) for g in groups)


def grouped(model: Model, groups: Groups, *, where: str) -> Model:
    """Returns the network with logits of groups of its classes.

    The logit of a group is the logarithm of the sum of exponentials of its members', so that the
    softmax gives the sum of their probabilities, as a share of all groups together. Classes in no
    group are left out.

    Args:
      model: with an output `logits` `[..., c]`.
      groups: k groups, none of them empty, no class in two of them.
      where: the argument, for errors.

    Raises:
      ArgumentError: as the network is called, where it has no logits or too few of them.
    """
    members = indices_of(groups)
    width = max(map(len, members))
    rows = np.array([[*m, *[m[0]] * (width - len(m))] for m in members])
    used = np.array([[True] * len(m) + [False] * (width - len(m)) for m in members])

    def apply(*inputs, **options):
        outputs, state = model.apply(*inputs, **options)
        logits = outputs.get("logits")
        have = 0 if logits is None else logits.shape[-1]
        if logits is None or rows.max() >= have:
            raise ArgumentError(
                f"names class {rows.max()}, and the network has {have} classes",
                where=where,
                hint=f"indices from 0 to {have - 1}" if have else "a network with logits",
            )
        picked = logits[..., rows]
        mask = used.reshape((1,) * (picked.ndim - 2) + used.shape)
        joined = picked[..., 0] if width == 1 else jax.nn.logsumexp(picked, axis=-1, where=mask)
        return {**outputs, "logits": joined.astype(jnp.result_type(logits))}, state

    return Model(model.init, apply)
