"""Stateless named random streams: every key is a function of seed, names and step."""

import zlib

import jax

from distill_jax.core.api import Array, Batch, Key

_FIRST_NAMES = {"weighting": "weigher"}
"""Original names of streams, kept so that a seed still gives the same run."""


def stream(key: Key, *names: str) -> Key:
    """Returns the key of a named stream; streams are independent of each other."""
    for name in names:
        key = jax.random.fold_in(key, zlib.crc32(_FIRST_NAMES.get(name, name).encode()))
    return key


def example_keys(key: Key, batch: Batch) -> Array:
    """Returns one key per example, `[b]`: a function of (key, epoch, example) alone.

    Independent of batch size, step, device count and position in the batch.
    """

    def one(epoch, index):
        return jax.random.fold_in(jax.random.fold_in(key, epoch), index)

    return jax.vmap(one)(batch["epoch"], batch["index"])
