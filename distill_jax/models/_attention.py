"""Attention of `models.transformer`: rotary positions, masks, grouped heads, a cache."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core.api import Array
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.models.layers import Dense

IMPLEMENTATIONS = ("plain", "xla", "cudnn")

_HIDDEN = -1e30
"""Score of a hidden column: finite, so that a row that sees nothing is uniform, not NaN."""


def frequencies(width: int, theta: float, scaling: Mapping[str, Any] | None = None) -> np.ndarray:
    """Returns the angles per position of rotary embeddings, float32 `[width / 2]`.

    Su et al. 2021, arXiv:2104.09864, section 3.4.2: pair i turns by `theta^(-2 i / width)`.

    Args:
      width: of a head, even.
      theta: base of the wavelengths.
      scaling: None, `{"rope_type": "linear", "factor": f}`, or "llama3" as in Llama 3.1: waves
        longer than `original_max_position_embeddings / low_freq_factor` are stretched by `factor`,
        those shorter than that over `high_freq_factor` are kept, with a linear transition.

    Raises:
      ArgumentError: another kind of scaling, or one that lacks a number.
    """
    angles = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    if scaling is None or kind == "default":
        return angles.astype(np.float32)
    if kind not in ("linear", "llama3"):
        raise ArgumentError(
            f"no scaling of rotary positions {kind!r}",
            where="rope_scaling",
            hint=nearest(kind, ("default", "linear", "llama3")),
        )
    try:
        factor = float(scaling["factor"])
        if kind == "linear":
            return (angles / factor).astype(np.float32)
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        length = float(scaling["original_max_position_embeddings"])
    except KeyError as error:
        raise ArgumentError(
            f"rope_scaling of type {kind!r} has no {error.args[0]}", where="rope_scaling"
        ) from error
    turns = length * angles / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (kept * angles + (1 - kept) * angles / factor).astype(np.float32)


def rotate(x: Array, positions: Array, angles: np.ndarray) -> Array:
    """Turns `[b, t, h, c]` by its positions `[b, t]`: component i of a head with i + c / 2."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    phase = (positions.astype(jnp.float32)[:, :, None] * jnp.asarray(angles)[None, None])[
        :, :, None
    ]
    cos, sin = jnp.cos(phase).astype(wide), jnp.sin(phase).astype(wide)
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def visible(t: int, *, causal: bool, mask: Array | None, segments: Array | None) -> Array | None:
    """Returns the columns visible to each row, bool `[b or 1, t, t]`; None where all are visible.

    Args:
      t: tokens.
      causal: whether a token attends only to itself and to earlier tokens.
      mask: `[b, t]`, 0 for tokens that are not attended to.
      segments: int `[b, t]`; tokens attend only within their own segment.
    """
    parts = []
    if causal:
        parts.append(jnp.tril(jnp.ones((1, t, t), bool)))
    if mask is not None:
        parts.append((mask > 0)[:, None, :])
    if segments is not None:
        parts.append(segments[:, :, None] == segments[:, None, :])
    if not parts:
        return None
    seen = functools.reduce(jnp.logical_and, parts)
    return jnp.broadcast_to(seen, (len(seen), t, t))


def visible_in_cache(t: int, length: int, at: Array, start: Array) -> Array:
    """Returns which of `length` columns the t rows from `at` on see, bool `[b, t, length]`.

    Args:
      t: rows.
      length: of the cache.
      at: column of the first row, a scalar.
      start: int `[b]`, the first column that is not padding.
    """
    column = jnp.arange(length)[None, None]
    row = at + jnp.arange(t)[None, :, None]
    return (column <= row) & (column >= start[:, None, None])


def attend(q: Array, k: Array, v: Array, seen: Array | None) -> Array:
    """Softmax attention, `[b, t, h, c]` of `[b, s, g, c]` to `[b, t, h, c]`.

    Heads are in g groups of h / g that share keys and values (Ainslie et al. 2023,
    arXiv:2305.13245); the rows of a group's heads are one matrix.

    Args:
      q: queries `[b, t, h, c]`.
      k: keys `[b, s, g, c]`.
      v: values `[b, s, g, c]`.
      seen: bool `[b or 1, t, s]`; None where all columns are visible.
    """
    b, t, h, c = q.shape
    g = k.shape[2]
    q = (q * c**-0.5).reshape(b, t, g, h // g, c).transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum("bgqc,bkgc->bgqk", q.reshape(b, g, -1, c), k)
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    if seen is not None:
        scores = scores.reshape(b, g, h // g, t, -1)
        scores = jnp.where(seen[:, None, None], scores, _HIDDEN).reshape(b, g, h // g * t, -1)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("bgqk,bkgc->bgqc", weights, v)
    return mixed.reshape(b, g, h // g, t, c).transpose(0, 3, 1, 2, 4).reshape(b, t, h, c)


def fused(
    q: Array, k: Array, v: Array, seen: Array | None, *, causal: bool, implementation: str
) -> Array:
    """`attend` by `jax.nn.dot_product_attention`, whose cuDNN kernel has a `custom_vjp`.

    Args:
      q: as of `attend`.
      k: as of `attend`.
      v: as of `attend`.
      seen: None where nothing but the causal order hides columns, which the kernel then skips.
      causal: whether that order holds.
      implementation: "xla", or "cudnn", which takes 16-bit types only.

    Raises:
      ArgumentError: another type.
    """
    if implementation == "cudnn" and q.dtype.itemsize != 2:
        raise ArgumentError(
            f"attention by cuDNN computes in 16 bits, not in {q.dtype.name}",
            where="attention",
            hint='precision "bfloat16", or attention "plain"',
        )
    chosen: Any = implementation
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=None if seen is None else seen[:, None],
        is_causal=causal and seen is None,
        implementation=chosen,
    )


class Attention(nn.Module):
    """Multi-head self-attention, `[b, t, d]` to `[b, t, d]`.

    Query, key and value have kernels of their own, whose columns are ordered by head, so that a
    split of them over devices gives each whole heads (Shoeybi et al. 2019, arXiv:1909.08053,
    section 3).

    Attributes:
      heads: h, of queries.
      groups: g, of keys and values; a divisor of h.
      head_width: c.
      bias: whether query, key and value have one.
      out_bias: whether the output has one.
      causal: whether a token attends only to itself and to earlier tokens.
      angles: of rotary positions, `[c / 2]`; None for none.
      implementation: one of `IMPLEMENTATIONS`.
      kernel_init: of query, key and value.
      out_init: of the output kernel.
    """

    heads: int
    groups: int
    head_width: int
    bias: bool
    out_bias: bool
    causal: bool
    angles: tuple[float, ...] | None
    implementation: str
    kernel_init: nn.initializers.Initializer
    out_init: nn.initializers.Initializer

    @nn.compact
    def __call__(
        self,
        x: Array,
        positions: Array,
        seen: Array | None,
        cache: Mapping[str, Array] | None = None,
        at: Array | None = None,
    ) -> tuple[Array, Mapping[str, Array] | None]:
        """Returns the output and the cache with these tokens in it.

        Args:
          x: `[b, t, d]`.
          positions: int `[b, t]`.
          seen: bool `[b or 1, t, s]`, s the columns of the cache or t; None where nothing but the
            causal order hides any.
          cache: `key` and `value` `[b, s, g, c]` of the columns before.
          at: the column of the first of the t tokens, a scalar.
        """

        def heads_of(name: str, n: int) -> Array:
            y = Dense(n * self.head_width, self.kernel_init, self.bias, name=name)(x)
            return y.reshape(*x.shape[:2], n, self.head_width)

        q, k = heads_of("query", self.heads), heads_of("key", self.groups)
        v = heads_of("value", self.groups)
        if self.angles is not None:
            angles = np.asarray(self.angles, np.float32)
            q, k = rotate(q, positions, angles), rotate(k, positions, angles)
        if cache is not None and at is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(
                    cache[name], new.astype(cache[name].dtype), at, axis=1
                )
                for name, new in (("key", k), ("value", v))
            )
            cache = {"key": k, "value": v}
        # Parameters are made in float32, which cuDNN does not take.
        if cache is not None or self.implementation == "plain" or self.is_initializing():
            mixed = attend(q, k.astype(q.dtype), v.astype(q.dtype), seen)
        else:
            how = {"causal": self.causal, "implementation": self.implementation}
            mixed = fused(q, k, v, seen, **how)
        mixed = mixed.reshape(*x.shape[:2], -1)
        return Dense(x.shape[-1], self.out_init, self.out_bias, name="out")(mixed), cache
