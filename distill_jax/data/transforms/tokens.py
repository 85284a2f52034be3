"""Inputs and targets of language models, from rows of tokens."""

from collections.abc import Mapping

import jax.numpy as jnp

from distill_jax.core.api import Array, Batch, Key, Transform
from distill_jax.data.transforms._draws import require


def next_token(tokens: Array, segments: Array) -> dict[str, Array]:
    """Returns `tokens`, `segments`, `target` int32 and `target_mask` float32, `[b, t]` each.

    The mask is 0 where the target is padding. The target of the last token of a document is the end
    token behind it.

    Args:
      tokens: ids `[b, t + 1]`.
      segments: number of the document of each token within its row, `[b, t + 1]`; negative for
        padding.
    """
    tokens, segments = tokens.astype(jnp.int32), segments.astype(jnp.int32)
    return {
        "tokens": tokens[:, :-1],
        "segments": segments[:, :-1],
        "target": tokens[:, 1:],
        "target_mask": (segments[:, 1:] >= 0).astype(jnp.float32),
    }


def make_next_token() -> Transform:
    """Returns a transform of rows into inputs and targets, see `next_token`.

    `input` becomes a dictionary of `tokens` and `segments`, which a transformer reads; `target` and
    `target_mask` are entries of the batch.
    """

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del key, step
        rows = batch["input"]
        is_text = isinstance(rows, Mapping) and {"tokens", "segments"} <= set(rows)
        require(is_text, "the input is no rows of tokens", "next_token")
        made = next_token(rows["tokens"], rows["segments"])
        view = {"tokens": made["tokens"], "segments": made["segments"]}
        return {
            **batch,
            "input": view,
            "target": made["target"],
            "target_mask": made["target_mask"],
        }

    return apply
