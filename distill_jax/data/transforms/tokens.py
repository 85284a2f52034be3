"""Inputs and targets of language models, from rows of tokens."""

from collections.abc import Mapping

import jax.numpy as jnp

from distill_jax.core import ranges, sequences
from distill_jax.core.api import Array, Batch, Key, Transform
from distill_jax.data.transforms._draws import integer, require, uniform


def next_token(tokens: Array, segments: Array, loss_mask: Array | None = None) -> dict[str, Array]:
    """Returns `tokens`, `segments`, `target` int32 and `target_mask` float32, `[b, t]` each.

    The mask is 0 where the target is padding or not to be learned. The target of the last token of
    a document is the end token behind it.

    Args:
      tokens: ids `[b, t + 1]`.
      segments: number of the document of each token within its row, `[b, t + 1]`; negative for
        padding.
      loss_mask: `[b, t + 1]`, 0 for tokens that are no targets, such as those of a question; None
        where all are.
    """
    tokens, segments = tokens.astype(jnp.int32), segments.astype(jnp.int32)
    learned = segments >= 0 if loss_mask is None else (segments >= 0) & (loss_mask > 0)
    return {
        "tokens": tokens[:, :-1],
        "segments": segments[:, :-1],
        "target": tokens[:, 1:],
        "target_mask": learned[:, 1:].astype(jnp.float32),
    }


def make_next_token(*, whole: bool = False) -> Transform:
    """Returns a transform of rows into inputs and targets, see `next_token`.

    `input` becomes a dictionary of `tokens` and `segments`, which a transformer reads; `target` and
    `target_mask` are entries of the batch.

    Args:
      whole: whether all tokens are targets, those of questions too.
    """

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del key, step
        rows = batch["input"]
        is_text = isinstance(rows, Mapping) and {"tokens", "segments"} <= set(rows)
        require(is_text, "the input is no rows of tokens", "next_token")
        loss_mask = None if whole else rows.get("loss_mask")
        made = next_token(rows["tokens"], rows["segments"], loss_mask)
        view = {"tokens": made["tokens"], "segments": made["segments"]}
        return {
            **batch,
            "input": view,
            "target": made["target"],
            "target_mask": made["target_mask"],
        }

    return apply


def make_masked_thought(
    *, vocabulary: int, rate: float = 0.4, ramp: int = 0, mask_token: int = -1
) -> Transform:
    """Returns a transform that hides input tokens which are targets themselves.

    Masked thought fine-tuning (Chen et al. 2024, arXiv:2403.02178): an answer is learned from its
    question and from a part of the answer before. It comes after `next_token`. Tokens of a question
    are no targets, and stay; so do the targets, padding, and the end tokens between documents.

    Args:
      vocabulary: v, number of token ids.
      rate: p, largest share of the answer's tokens that is hidden, in [0, 1].
      ramp: number of steps over which p rises from 0; 2/3 of training in the authors' program. 0
        starts with p.
      mask_token: id in place of a hidden token; -1 takes a random id.

    Raises:
      ArgumentError: an argument is out of range; as it is applied, a batch without `target_mask`.
    """
    ranges.sizes(vocabulary=vocabulary)
    ranges.within("[0, 1]", rate=rate)
    ranges.counts(ramp=ramp)
    ranges.within(f"[-1, {vocabulary})", whole=True, mask_token=mask_token)

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        require("target_mask" in batch, "there are no targets: next_token comes before", "rate")
        view = batch["input"]
        tokens, segments = view["tokens"], view["segments"]
        u = uniform(key, batch, 2, tokens.shape[1])
        share = rate * jnp.minimum(1, step / ramp) if ramp else rate
        substitute = integer(u[:, 1], vocabulary) if mask_token < 0 else mask_token
        answer = (batch["target_mask"][:, :-1] > 0) & (segments[:, 1:] == segments[:, :-1])
        hidden = jnp.pad(answer, ((0, 0), (1, 0))) & (u[:, 0] < share)
        return {**batch, "input": {**view, "tokens": jnp.where(hidden, substitute, tokens)}}

    return apply


def make_token_courses(*, rate: float = 0.15) -> Transform:
    """Returns a transform that draws where the courses of the objective `mcl` corrupt a row.

    It comes after `next_token`, and adds `course_valid` float32 `[b, t]`, 0 on padding;
    `course_masked` bool `[b, t]`; `course_order` int32 `[b, t]`, the position whose token comes to
    each place after the swaps; `course_inserted` int32 `[b, t]`, the same after insertions, -1 for
    an inserted token, where the end of the row is lost; and `course_draws` float32 `[b, 3, t]`,
    uniform numbers by which a generator's tokens are drawn.

    Args:
      rate: share of the positions that are masked, swapped and inserted, in (0, 1).
    """
    ranges.within("(0, 1)", rate=rate)

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        view = batch["input"]
        is_text = isinstance(view, Mapping) and "segments" in view and "target" in batch
        require(is_text, "there are no rows of tokens: next_token comes before", "token_courses")
        valid = view["segments"] >= 0
        t = valid.shape[1]
        count = max(1, round(rate * t))
        u = uniform(key, batch, 6, t)

        def chosen(x: Array, among: Array) -> Array:
            rank = jnp.argsort(jnp.argsort(jnp.where(among, x, 2.0), axis=1), axis=1)
            return among & (rank < count)

        # An insertion at the first place would come before any token.
        later = valid & (jnp.arange(t)[None] > 0)
        inserted = chosen(u[:, 2], later)
        source = jnp.cumsum(~inserted, axis=1, dtype=jnp.int32) - 1
        return {
            **batch,
            "course_valid": valid.astype(jnp.float32),
            "course_masked": chosen(u[:, 0], valid),
            "course_order": sequences.rotation(chosen(u[:, 1], valid), u[:, 1]),
            "course_inserted": jnp.where(inserted, -1, source),
            "course_draws": u[:, 3:],
        }

    return apply
