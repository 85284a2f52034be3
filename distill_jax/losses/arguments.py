"""Arguments of a strong network for each class: the pixels that speak for it.

The kernel of debate for classifiers of images (after Lang et al. 2025, arXiv:2501.13124, where
language models argue): a weak network sees an image and, for each class, the few pixels with the
largest product of value and gradient of the strong network's logit.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array
from distill_jax.core.errors import ArgumentError, nearest

SIDES = ("both", "own", "answer", "neither")


def top_mask(x: Array, count: int) -> Array:
    """Returns 1 at the `count` largest entries of each row of `x` `[b, d]`, 0 elsewhere.

    Ties with the smallest of them are included.
    """
    least = jax.lax.top_k(x, min(count, x.shape[1]))[0][:, -1:]
    return (x >= least).astype(x.dtype)


def arguments(logits_of: Callable[[Array], Array], x: Array, *, pixels: int, sides: str) -> Array:
    """Returns images with the arguments as further channels, `[b, h, w, c + ...]`; no gradient.

    Args:
      logits_of: the strong network, `[b, h, w, c] -> [b, k]`.
      x: images `[b, h, w, c]`, 0 for background.
      pixels: number of pixel values of an argument.
      sides: "both": an argument for each class; "own": for the class of the largest logit alone;
        "answer": the probability of each class in place of its pixels, a control; "neither".
    """
    if sides not in SIDES:
        raise ArgumentError(f"unknown sides {sides!r}", where="sides", hint=nearest(sides, SIDES))
    x = jax.lax.stop_gradient(x)
    if sides == "neither":
        return x
    logits, pull = jax.vjp(logits_of, x)
    k = logits.shape[1]
    if sides == "answer":
        planes = jax.nn.softmax(logits)[:, None, None, :] * jnp.ones_like(x[..., :1])
        return jax.lax.stop_gradient(jnp.concatenate([x, planes], axis=-1))
    top = jax.nn.one_hot(logits.argmax(1), k, dtype=logits.dtype)
    wanted = [top] if sides == "own" else [jnp.zeros_like(top).at[:, c].set(1) for c in range(k)]
    channels = [x]
    for side in wanted:
        weight = (x * pull(side)[0]).reshape(x.shape[0], -1)
        channels.append(x * top_mask(weight, pixels).reshape(x.shape))
    return jax.lax.stop_gradient(jnp.concatenate(channels, axis=-1))
