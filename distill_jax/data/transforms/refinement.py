"""Drafts as context: a solution is learned from its question and from earlier attempts.

Progressive thought refinement (Du et al. 2024, arXiv:2410.13413): a sequence is question, drafts of
rising quality, solution, and the drafts are no targets. The further terms of the paper's loss are
not defined there, and its program has none of them; here the tokens of drafts may have a weight.
"""

import jax.numpy as jnp

from distill_jax.core import ranges
from distill_jax.core.api import Array, Batch, Key, Transform
from distill_jax.data.transforms._draws import require


def until_end(tokens: Array, end: int) -> Array:
    """Returns which tokens `[..., s]` are those up to the first end token, it included."""
    ended = jnp.cumsum(tokens == end, axis=-1)
    return (ended == 0) | ((ended == 1) & (tokens == end))


def joined(
    prompt: Array, start: Array, *parts: Array, end: int, left: bool = False
) -> tuple[Array, Array, Array]:
    """Joins questions and what follows them, without gaps.

    Args:
      prompt: ids, int `[b, p]`, padded on the left.
      start: int `[b]`, the first column of each that is not padding.
      *parts: ids, int `[b, s]`, of which those up to the first end token count.
      end: id of the end token.
      left: whether the result is padded on the left, as prompts are.

    Returns:
      tokens: int32 `[b, p + s + ...]`, filled with the end token.
      part: int32 of that shape: 0 for the question, i for part i from 1 on, -1 for padding.
      start: int32 `[b]`, the first column that is not padding.
    """
    column = jnp.arange(prompt.shape[1])[None]
    real = [column >= start[:, None], *(until_end(x, end) for x in parts)]
    number = [jnp.where(x, i, -1) for i, x in enumerate(real)]
    tokens = jnp.concatenate([prompt, *parts], axis=1)
    part = jnp.concatenate(number, axis=1)
    order = jnp.argsort((part >= 0) if left else (part < 0), axis=1, stable=True)
    tokens, part = (jnp.take_along_axis(x, order, axis=1) for x in (tokens, part))
    tokens = jnp.where(part < 0, end, tokens).astype(jnp.int32)
    return tokens, part.astype(jnp.int32), jnp.argmax(part >= 0, axis=1).astype(jnp.int32)


def make_refinement(*, end: int, draft_weight: float = 0.0) -> Transform:
    """Returns a transform of questions, drafts and solutions into inputs and targets.

    It takes the place of `next_token`, for batches with `prompt` `[b, p]` and `start` `[b]`,
    `drafts` `[b, n, s]` in their order, and `solution` `[b, s]`, see `data/arithmetic_chains.py`.
    `input` becomes a dictionary of `tokens` and `segments`; `target` and `target_mask` are entries
    of the batch. The mask of a draft's token is `draft_weight`, and the mean is over the weights.

    Args:
      end: id of the end token.
      draft_weight: of the tokens of drafts, in [0, 1]; 1 learns drafts as it does solutions.

    Raises:
      ArgumentError: a number out of its range; as it is applied, a batch without drafts.
    """
    ranges.counts(end=end)
    ranges.within("[0, 1]", draft_weight=draft_weight)

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del key, step
        whole = {"prompt", "start", "drafts", "solution"} <= set(batch)
        require(whole, "there are no drafts: prompt, start, drafts and solution", "batch")
        drafts = batch["drafts"]
        each = (drafts[:, i] for i in range(drafts.shape[1]))
        tokens, part, _ = joined(batch["prompt"], batch["start"], *each, batch["solution"], end=end)
        last = drafts.shape[1] + 1
        weight = jnp.where(part == last, 1.0, jnp.where(part > 0, draft_weight, 0.0))
        view = {"tokens": tokens[:, :-1], "segments": jnp.minimum(part[:, :-1], 0)}
        target = {"target": tokens[:, 1:], "target_mask": weight[:, 1:].astype(jnp.float32)}
        return {**batch, "input": view, **target}

    return apply
