"""Sequences of tokens: positions, and log-probabilities over a large vocabulary in chunks.

Shape letters: b batch, t tokens, d width, v vocabulary, k requested tokens.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.core import partition
from distill_jax.core.api import Array

SMALL_VOCABULARY = 4096
"""Below this number of tokens, chunks are not used: their cost exceeds the memory saved."""

CHUNK_ENTRIES = 2**25
"""Number of logits per device in a chunk: 128 MiB in float32."""


def positions_of(mask: Array | None, segments: Array | None, shape: tuple[int, int]) -> Array:
    """Returns the position of each token in its own sequence, int32 `[b, t]`.

    Tokens are counted from the first unmasked token, so that padding on the left has no effect, or
    from the first token of their segment. Masked tokens on the left get position 0.

    Args:
      mask: `[b, t]`, 0 for padding; None if there is no padding.
      segments: int `[b, t]`, equal for the tokens of one document, which are contiguous; None for
        one document.
      shape: `(b, t)`.
    """
    column = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None], shape)
    start = jnp.zeros_like(column)
    if segments is not None:
        first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
        start = jax.lax.cummax(jnp.where(first, column, 0), axis=1)
    if mask is not None:
        start = jnp.maximum(start, jnp.argmax(mask > 0, axis=1).astype(jnp.int32)[:, None])
    return jnp.maximum(column - start, 0)


class TopLogProbs(NamedTuple):
    """The k most probable tokens and the total probability of all others.

    Attributes:
      index: int32 `[b, t, k]`, most probable first.
      log_probs: float32 `[b, t, k]`.
      tail: float32 `[b, t]`, the logarithm of the probability of all other tokens.
    """

    index: Array
    log_probs: Array
    tail: Array


def chunk_size(shape: tuple[int, ...], vocabulary: int) -> int:
    """Returns the number of positions in a chunk, for `[b, t, d]` on the mesh in context.

    This is t if the vocabulary is small; otherwise `CHUNK_ENTRIES` limits it.
    """
    b, t = shape[:2]
    if vocabulary < SMALL_VOCABULARY:
        return t
    rows = vocabulary * max(1, b // partition.shards_in_context())
    return max(1, min(t, CHUNK_ENTRIES // rows))


def over_logits(
    read: Callable[..., Any],
    hidden: Array,
    unembedding: Array,
    *rows: Array,
    bias: Array | None = None,
    chunk: int = 0,
) -> Any:
    """Applies a function of logits to a few positions at a time, without keeping the logits.

    The gradient is also computed chunk by chunk, from recomputed logits (`jax.checkpoint`). Unlike
    a `custom_vjp`, this supports forward and reverse mode. Chunks are along t, so that the sharding
    of the batch does not change, and the gradient of `unembedding` is exchanged once.

    Args:
      read: function of logits `[b, c, v]` (at least float32) and the same c positions of `rows`
        that returns arrays `[b, c, ...]`.
      hidden: `[b, t, d]`.
      unembedding: `[v, d]`.
      *rows: arrays `[b, t, ...]`.
      bias: `[v]`, added to the logits.
      chunk: c; 0 takes `chunk_size`.

    Returns:
      The results of `read`, `[b, t, ...]`.
    """
    t = hidden.shape[1]
    chunk = min(chunk, t) or chunk_size(hidden.shape, len(unembedding))
    if chunk == t:
        return read(logits_of(hidden, unembedding, bias), *rows)

    def in_chunks(split: tuple[Array, ...], unembedding: Array, bias: Array | None) -> Any:
        def one(part: tuple[Array, ...]) -> Any:
            return read(logits_of(part[0], unembedding, bias), *part[1:])

        parts = jax.lax.map(jax.checkpoint(one), tuple(_cut(x, chunk) for x in split))
        return jax.tree.map(lambda x: _joined(x, t), parts)

    return partition.by_rows(in_chunks, ((hidden, *rows),), (unembedding, bias))


def _cut(x: Array, chunk: int) -> Array:
    """Cuts `[b, t, ...]` into `[n, b, chunk, ...]`, the last one filled with zeros."""
    b, t, *rest = x.shape
    n = math.ceil(t / chunk)
    x = jnp.pad(x, ((0, 0), (0, n * chunk - t), *((0, 0),) * len(rest)))
    return x.reshape(b, n, chunk, *rest).swapaxes(0, 1)


def _joined(x: Array, t: int) -> Array:
    """Undoes `_cut`."""
    n, b, chunk, *rest = x.shape
    return x.swapaxes(0, 1).reshape(b, n * chunk, *rest)[:, :t]


def logits_of(hidden: Array, unembedding: Array, bias: Array | None = None) -> Array:
    """Returns logits `[b, t, v]` of at least float32 from `[b, t, d]` and `[v, d]`."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    b, t, d = hidden.shape
    product = jax.lax.dot_general(
        hidden.reshape(b * t, d),
        unembedding.astype(hidden.dtype),
        (((1,), (1,)), ((), ())),
        preferred_element_type=wide,
    ).reshape(b, t, -1)
    return product if bias is None else product + bias.astype(wide)[None, None]


def log_probs_of(
    hidden: Array,
    unembedding: Array,
    ask: Array,
    *,
    bias: Array | None = None,
    temperature: float = 1.0,
    chunk: int = 0,
) -> Array:
    """Returns the log-probabilities of some tokens at each position, `[b, t, k]`.

    The full logits `[b, t, v]` are never stored, neither in the forward pass nor for derivatives;
    see `over_logits`.

    Args:
      hidden: `[b, t, d]`.
      unembedding: `[v, d]`.
      ask: ids of the tokens, int `[b, t, k]`.
      bias: `[v]`, added to the logits.
      temperature: T of the softmax.
      chunk: positions at a time; 0 takes `chunk_size`.
    """

    def read(logits: Array, ask: Array) -> Array:
        logits = logits / temperature
        asked = jnp.take_along_axis(logits, ask, axis=-1, mode="fill")
        return asked - jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    return over_logits(read, hidden, unembedding, ask, bias=bias, chunk=chunk)


def top_log_probs(logits: Array, k: int, *, temperature: float = 1.0) -> TopLogProbs:
    """Returns the k most probable tokens of logits `[b, t, v]`, and the probability of the rest.

    The tail is a sum over the other tokens, so that it is accurate when it is tiny. It is -inf if
    there are none.
    """
    logits = logits / temperature
    total = jax.nn.logsumexp(logits, axis=-1)
    top, index = partition.top_k(logits, k)
    # The index breaks ties with the last of the top k, in the order of `jax.lax.top_k`. A slice
    # such as `top[..., -1:]` would make XLA sort all logits on CPUs, 27 times slower.
    last = top.min(axis=-1, keepdims=True)
    last_id = jnp.where(top == last, index, -1).max(axis=-1, keepdims=True)
    ids = jax.lax.broadcasted_iota(index.dtype, logits.shape, logits.ndim - 1)
    others = (logits < last) | ((logits == last) & (ids > last_id))
    tail = jax.nn.logsumexp(jnp.where(others, logits, -jnp.inf), axis=-1) - total
    return TopLogProbs(index, top - total[..., None], tail)


def top_log_probs_of(
    hidden: Array,
    unembedding: Array,
    k: int,
    *,
    bias: Array | None = None,
    temperature: float = 1.0,
    chunk: int = 0,
) -> TopLogProbs:
    """Returns `top_log_probs` of `[b, t, d]` and `[v, d]`, a few positions at a time.

    Args:
      hidden: `[b, t, d]`.
      unembedding: `[v, d]`.
      k: number of tokens, at most v.
      bias: `[v]`, added to the logits.
      temperature: T of the softmax.
      chunk: positions at a time; 0 takes `chunk_size`.
    """

    def read(logits: Array) -> TopLogProbs:
        return top_log_probs(logits, k, temperature=temperature)

    return over_logits(read, hidden, unembedding, bias=bias, chunk=chunk)


def rotation(mask: Array, order: Array) -> Array:
    """Returns an order of positions, int32 `[b, t]`, in which the chosen ones are rotated by one.

    Each chosen position gets what the next one has, the last what the first has; others stay.

    Args:
      mask: bool `[b, t]`, the chosen positions.
      order: numbers `[b, t]` by which these follow each other.
    """
    b, t = mask.shape
    place = jnp.argsort(jnp.where(mask, order, jnp.inf), axis=1)
    i, n = jnp.arange(t)[None], mask.sum(1, keepdims=True)
    after = jnp.take_along_axis(place, jnp.where(i + 1 < n, i + 1, 0), axis=1)
    rows = jnp.arange(b)[:, None]
    moved = jnp.where(i < n, after, place)
    return jnp.zeros((b, t), jnp.int32).at[rows, place].set(moved.astype(jnp.int32))
