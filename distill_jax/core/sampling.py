"""Sampling from a causal network: one prefill, then one token at a time for all sequences.

Everything is a function of parameters, prompts and keys, so that it may stand inside a loss.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.core import partition, ranges, rng
from distill_jax.core.api import Array, Batch, Decode, Key, Model, Params, Role, Samples, State
from distill_jax.core.errors import ArgumentError


def uncached(apply: Callable[[Params, Array, Array], Array], vocabulary: int) -> Decode:
    """Returns a decoder that reads the whole sequence again at each step.

    Use it for networks without a cache, and as a reference for caches.

    Args:
      apply: `(params, tokens, mask) -> logits`, `[b, t] x 2 -> [b, t, v]`, of a causal network.
      vocabulary: v.
    """

    def cache(b: int, length: int, dtype: Any) -> Array:
        del dtype
        return jnp.zeros((b, length), jnp.int32)

    def step(
        params: Params, tokens: Array, cache: Array, at: Array, start: Array
    ) -> tuple[Array, Array]:
        cache = jax.lax.dynamic_update_slice_in_dim(cache, tokens.astype(jnp.int32), at, axis=1)
        mask = (jnp.arange(cache.shape[1])[None] >= start[:, None]).astype(jnp.float32)
        logits = apply(params, cache, mask)
        last = at + tokens.shape[1] - 1
        return jax.lax.dynamic_index_in_dim(logits, last, axis=1, keepdims=False), cache

    return Decode(cache, step, vocabulary)


def keys_of(key: Key, batch: Batch, count: int = 1) -> Array:
    """Returns one key per draw, `[b, count]`, a function of (key, epoch, example, draw) alone.

    Pass the key of the seed and the step, not that of a micro-batch. Otherwise, accumulation would
    change the samples.
    """
    draws = jnp.arange(count)
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    return fold(rng.example_keys(key, batch), draws)


def check_prompts(prompt: Array, start: Array | None, batch: Batch) -> None:
    """Raises `ArgumentError` unless there are ids `[b, p]` for the examples of a batch."""
    ids = {name: batch[name] for name in ("epoch", "index") if name in batch}
    integers = prompt.ndim == 2 and jnp.issubdtype(prompt.dtype, jnp.integer)
    fits = integers and len(ids) == 2 and len(prompt) == len(ids["index"])
    if not fits or prompt.shape[1] < 1:
        raise ArgumentError(
            f"prompts of shape {prompt.shape} and type {prompt.dtype.name} for a batch whose "
            f"examples are named by {', '.join(f'{n} {x.shape}' for n, x in ids.items()) or None}",
            where="prompt",
            hint="ids, int [b, p], p at least 1, a row for each `index` and `epoch` of the batch",
        )
    if start is not None and start.shape != prompt.shape[:1]:
        what = f"start has the shape {start.shape}, prompts {prompt.shape}"
        raise ArgumentError(what, where="start", hint="one column for each prompt, int [b]")


def of_network(
    role: Role,
    model: Model,
    params: Params,
    state: State,
    prompt: Array,
    start: Array | None,
    *,
    batch: Batch,
    key: Key,
    count: int = 1,
    **options: Any,
) -> Samples:
    """Samples continuations of the prompts of a batch from a network: `Nets.sample`.

    Args:
      role: name of the network, for errors.
      model: the network.
      params: its parameters, in the compute type.
      state: its state, which must be empty.
      prompt: ids, int `[b, p]`, padded on the left.
      start: int `[b]`, the first column of each prompt that is not padding, or None.
      batch: the examples, whose `epoch` and `index` give the keys.
      key: of the seed, the step and the call.
      count: k.
      **options: of `sample`.

    Raises:
      ArgumentError: the network cannot be sampled from, or an argument is invalid.
    """
    if model.decode is None:
        raise ArgumentError(
            f"{role} cannot be sampled from: it has no `decode`",
            where=role,
            hint="a causal transformer with logits of the next token, or "
            "model._replace(decode=sampling.uncached(...))",
        )
    if jax.tree.leaves(state):
        raise ArgumentError(
            f"{role} cannot be sampled from: it has a state, such as batch statistics",
            where=role,
            hint="a network whose outputs depend on parameters and inputs alone",
        )
    check_prompts(prompt, start, batch)
    ranges.sizes(count=count)
    keys = keys_of(key, batch, count)
    return sample(model.decode, params, prompt, keys, start=start, **options)


def sample(
    decode: Decode,
    params: Params,
    prompt: Array,
    keys: Array,
    *,
    steps: int,
    start: Array | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    end: int = -1,
) -> Samples:
    """Samples k continuations of each prompt.

    Each prompt is read once for any k. The loop ends when all sequences have ended. No gradient
    flows to the parameters.

    Args:
      decode: the network.
      params: its parameters; the cache has the same dtype.
      prompt: ids, int `[b, p]`, padded on the left.
      keys: `[b, k]`, see `keys_of`.
      steps: maximum number of sampled tokens.
      start: int `[b]`, the first column of each prompt that is not padding; None for no padding.
      temperature: T of the softmax; 0 takes the most probable token.
      top_k: number of most probable tokens to sample from; 0 samples from all tokens.
      end: the token that ends a sequence; -1 for none.

    Raises:
      ArgumentError: an argument is invalid.
    """
    b, p = prompt.shape
    if p < 1 or keys.ndim != 2 or len(keys) != b or keys.shape[1] < 1:
        raise ArgumentError(
            f"prompts of shape {(b, p)} and keys of shape {keys.shape}",
            where="prompt",
            hint="at least one token, and keys [b, k] of the same b",
        )
    ranges.sizes(steps=steps)
    ranges.within("[0, inf)", temperature=temperature)
    ranges.within(f"[0, {decode.vocabulary}]", whole=True, top_k=top_k)
    ranges.within(f"[-1, {decode.vocabulary})", whole=True, end=end)
    k, length = keys.shape[1], p + steps
    params = jax.lax.stop_gradient(params)
    dtypes = {x.dtype for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.floating)}
    dtype = jnp.result_type(*dtypes) if dtypes else jnp.float32
    start = jnp.zeros((b,), jnp.int32) if start is None else start.astype(jnp.int32)
    cache = decode.cache(b, length, dtype)
    logits, cache = decode.step(params, prompt, cache, jnp.int32(0), start)

    def repeated(x: Array) -> Array:
        return jnp.repeat(x, k, axis=0)

    logits, cache, starts = jax.tree.map(repeated, (logits, cache, start))
    flat = keys.reshape(b * k)
    filler = max(end, 0)
    buffers = (
        jnp.full((b * k, steps), filler, jnp.int32),
        jnp.zeros((b * k, steps), jnp.float32),
        jnp.zeros((b * k, steps), jnp.promote_types(dtype, jnp.float32)),
    )

    def draw(i: Array, logits: Array, ended: Array, buffers: tuple[Array, ...]) -> Any:
        token, log_prob = _draw(flat, i, logits, temperature=temperature, top_k=top_k)
        live = ~ended
        token = jnp.where(live, token, filler).astype(jnp.int32)
        values = (token, live, jnp.where(live, log_prob, 0))
        buffers = tuple(
            jax.lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype)[:, None], i, axis=1)
            for x, y in zip(buffers, values, strict=True)
        )
        return token, ended | (token == end), buffers

    def more(carry: Any) -> Array:
        i, _, _, ended, _ = carry
        return (i < steps) & ~ended.all()

    def body(carry: Any) -> Any:
        i, token, cache, ended, buffers = carry
        logits, cache = decode.step(params, token[:, None], cache, p + i - 1, starts)
        token, ended, buffers = draw(i, logits, ended, buffers)
        return i + 1, token, cache, ended, buffers

    none = jnp.zeros((b * k,), bool)
    token, ended, buffers = draw(jnp.int32(0), logits, none, buffers)
    carry = (jnp.int32(1), token, cache, ended, buffers)
    *_, buffers = jax.lax.while_loop(more, body, carry)
    drawn = [x.reshape(b, k, steps) for x in buffers]
    before = jnp.broadcast_to(prompt[:, None].astype(jnp.int32), (b, k, p))
    ahead = (before, *(jnp.zeros((b, k, p), x.dtype) for x in drawn[1:]))
    return Samples(*(jnp.concatenate(x, -1) for x in zip(ahead, drawn, strict=True)))


def _draw(
    keys: Array, i: Array, logits: Array, *, temperature: float, top_k: int
) -> tuple[Array, Array]:
    """Returns tokens and their log-probabilities `[n]` from logits `[n, v]`, draw i of each key."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if not temperature:
        token = jnp.argmax(logits, axis=-1)
        return token, _of(token, logits)
    logits = logits / temperature
    index = None
    if top_k:
        logits, index = partition.top_k(logits, top_k)
    draw = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, i), row))
    choice = draw(keys, logits)
    token = choice if index is None else jnp.take_along_axis(index, choice[:, None], axis=1)[:, 0]
    return token, _of(choice, logits)


def _of(choice: Array, logits: Array) -> Array:
    chosen = jnp.take_along_axis(logits, choice[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
