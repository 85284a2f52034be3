"""Encoding and projection of views, shared by the methods that compare views of an example.

Views are `[b, v, ...]`, for tables a dictionary of such arrays. A network is applied to
`[b * v, ...]`, example by example, so that rows stay on their device and batch statistics are
computed over all views together.
"""

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array, Batch, Nets, PyTree, Role, State
from distill_jax.core.errors import ArgumentError


def count(views: PyTree) -> int:
    """Returns v, the number of views of each example."""
    return jax.tree.leaves(views)[0].shape[1]


def take(views: PyTree, start: int, stop: int) -> PyTree:
    """Returns some of the views, `[b, stop - start, ...]`."""
    return jax.tree.map(lambda x: x[:, start:stop], views)


MOST_PAIRED = 12
"""Most views of a loss that is written out for each pair, or each step of a sorting network."""


def views_of(
    batch: Batch, *, least: int = 2, most: int | None = None, key: str = "views"
) -> PyTree:
    """Returns the views of a batch, `[b, v, ...]`.

    Raises:
      ArgumentError: the batch has no views, fewer than `least` or more than `most`.
    """
    if key not in batch:
        raise ArgumentError(
            f"the method compares views, and batches have no {key!r}",
            where="batch",
            hint=f"add the transform {key!r}, and its own in its argument transforms",
        )
    if (v := count(batch[key])) < least:
        raise ArgumentError(
            f"{v} views where the method compares {least}",
            where=f"{key}.count",
            hint=f"{least} or more",
        )
    if most is not None and v > most:
        raise ArgumentError(
            f"{v} views, every two of which would be a part of the program",
            where=f"{key}.count",
            hint=f"{most} or fewer",
        )
    return batch[key]


def apply(
    nets: Nets,
    role: Role,
    x: PyTree,
    *,
    output: str,
    train: bool = True,
    stop_gradient_params: bool = False,
) -> tuple[Array, State]:
    """Applies a network to each view `[b, v, ...]` and returns one of its outputs, `[b, v, d]`.

    Raises:
      ArgumentError: the network has no such output, or the output is not a vector.
    """
    b, v = jax.tree.leaves(x)[0].shape[:2]
    rows = jax.tree.map(lambda leaf: leaf.reshape(b * v, *leaf.shape[2:]), x)
    outputs, state = nets(role, rows, train=train, stop_gradient_params=stop_gradient_params)
    if output not in outputs:
        raise ArgumentError(
            f"{role} has no output {output!r}",
            where=role,
            hint=f"it has {', '.join(outputs)}",
        )
    return outputs[output].reshape(b, v, *outputs[output].shape[1:]), state


def encode(
    nets: Nets, role: Role, views: PyTree, *, train: bool = True, output: str = "embedding"
) -> tuple[Array, State]:
    """Returns the embeddings of views, `[b, v, d]`, and the encoder's new state."""
    return apply(nets, role, views, output=output, train=train)


def project(
    nets: Nets, role: Role, embeddings: Array, *, train: bool = True
) -> tuple[Array, State]:
    """Applies a head to embeddings `[b, v, d]`; returns its output `[b, v, d]` and its new
    state."""
    return apply(nets, role, embeddings, output="output", train=train)


def share(value: Array, mask: Array) -> Array:
    """Returns a statistic of the whole batch as each example's share, `[b]`.

    The masked mean of the result is the statistic.
    """
    return jnp.broadcast_to(value[None], mask.shape)
