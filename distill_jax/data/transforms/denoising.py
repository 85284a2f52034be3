"""Hidden spans of text as inputs and targets: the mixture of denoisers of UL2, and span corruption.

UL2 (Tay et al. 2022, arXiv:2205.05131, section 3.1, table 1) for a causal network. A sequence is

    [mode] text, each span a sentinel [separator] sentinel, span, sentinel, span, ..., last sentinel

and what is behind the separator is the target. A denoiser is (mode, mean length of a span, share of
the tokens in spans). R has short spans and few, X long ones or many, S one at the end: a prefix
language model. Span corruption alone is that of T5 (Raffel et al. 2020, arXiv:1910.10683).

Ids from `first` on are those of the modes (R, S, X), the separator, and the sentinels in order.

Deviations: one causal sequence, where the paper has an encoder and a decoder; spans lie anywhere,
where T5's masks begin with text and end with a span; S hides the last quarter.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.core import ranges, rng
from distill_jax.core.api import Array, Batch, Key, Transform
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.data.transforms._draws import require

MODES = ("R", "S", "X")

UL2 = (
    *(("R", 3.0, 0.15), ("R", 8.0, 0.15)),
    *(("X", 3.0, 0.5), ("X", 8.0, 0.5), ("X", 64.0, 0.15), ("X", 64.0, 0.5)),
    ("S", 0.0, 0.25),
)
"""The seven denoisers of table 1, as (mode, mean length, share); 0 is one span at the end."""


class Plan(NamedTuple):
    """A denoiser for rows of one length: everything that shapes depend on.

    Attributes:
      mode: its mode token, one of `MODES`.
      hidden: number of tokens in spans.
      spans: number of spans, each of at least one token, with text between them.
      last: whether the one span is at the end.
    """

    mode: str
    hidden: int
    spans: int
    last: bool = False

    def size(self, length: int) -> int:
        """Returns the tokens of a sequence with its mode token, of a row of `length`."""
        return length + 2 * self.spans + 3


def plan(denoiser: Sequence[Any], length: int, *, scale: float = 1.0) -> Plan:
    """Returns the numbers of hidden tokens and spans, rounded as in T5.

    Args:
      denoiser: (mode, mean length of a span, share), see `UL2`.
      length: L, tokens of a row, at least 2.
      scale: factor of the mean length.
    """
    mode, span, share = denoiser
    hidden = min(max(round(length * share), 1), length - 1)
    if not span:
        return Plan(mode, hidden, 1, last=True)
    # Neighbouring spans have a token of text between them.
    spans = min(max(round(hidden / (scale * span)), 1), hidden, length - hidden + 1)
    return Plan(mode, hidden, spans)


def draw_spans(key: Key, made: Plan, length: int) -> tuple[Array, Array]:
    """Returns starts and lengths of the spans, int32 `[n]` each, in order.

    Lengths are a uniform division of the hidden tokens into n parts of at least one token, and so
    are the texts between them; the texts at both ends may be empty.
    """
    n, hidden = made.spans, made.hidden
    if made.last:
        return jnp.array([length - hidden], jnp.int32), jnp.array([hidden], jnp.int32)
    first, second = jax.random.split(key)
    lengths = _divide(first, hidden, n)
    texts = _divide(second, length - hidden + 2, n + 1).at[0].add(-1)
    starts = jnp.cumsum(texts[:-1]) + jnp.cumsum(lengths) - lengths
    return starts, lengths


def _divide(key: Key, total: int, parts: int) -> Array:
    """Returns int32 `[parts]`, each at least 1, that sum to `total`: a uniform draw."""
    if parts == 1:
        return jnp.full(1, total, jnp.int32)
    cuts = jnp.sort(jax.random.permutation(key, total - 1)[: parts - 1]) + 1
    edges = jnp.concatenate([jnp.zeros(1, jnp.int32), cuts, jnp.full(1, total, jnp.int32)])
    return jnp.diff(edges).astype(jnp.int32)


def corrupt(
    ids: Array, starts: Array, lengths: Array, made: Plan, *, first: int, modes: bool, size: int
) -> tuple[Array, Array, Array]:
    """Returns a sequence, and for each of its tokens where it comes from.

    Args:
      ids: the text, int32 `[L]`.
      starts: of the spans, int32 `[n]`.
      lengths: of the spans, int32 `[n]`.
      made: the plan that they follow.
      first: id of the first token that no text has, see the module.
      modes: whether the sequence begins with its mode token.
      size: length of the result; what is left is padding.

    Returns:
      tokens: int32 `[size]`, filled with the separator.
      source: int32 `[size]`, position in the text of a copied token, -1 of all others.
      part: int32 `[size]`, 0 before the targets, 1 for targets, -1 for padding.
    """
    length, n = ids.shape[0], made.spans
    separator, sentinels = first + len(MODES), first + len(MODES) + 1 + jnp.arange(n + 1)
    position = jnp.arange(length)
    begins, ends = starts[None], (starts + lengths)[None]
    hidden = (position[:, None] >= begins) & (position[:, None] < ends)
    is_hidden, span = hidden.any(1), jnp.argmax(hidden, axis=1)
    before = jnp.cumsum(lengths) - lengths  # hidden tokens before each span
    rank = jnp.cumsum(is_hidden) - is_hidden  # and before each position
    begun = (position[:, None] >= begins).sum(1)
    lead = int(modes)
    behind = lead + length - made.hidden + n + 1
    place = jnp.where(is_hidden, behind + rank + span + 1, lead + position - rank + begun)
    tokens = jnp.full(size, separator, jnp.int32).at[place].set(ids.astype(jnp.int32))
    source = jnp.full(size, -1, jnp.int32).at[place].set(position.astype(jnp.int32))
    tokens = tokens.at[lead + starts - before + jnp.arange(n)].set(sentinels[:-1])
    targets = jnp.append(before + jnp.arange(n), made.hidden + n)
    tokens = tokens.at[behind + targets].set(sentinels)
    if modes:
        tokens = tokens.at[0].set(first + MODES.index(made.mode))
    column = jnp.arange(size)
    end = behind + made.hidden + n + 1
    part = jnp.where(column < behind, 0, jnp.where(column < end, 1, -1))
    return tokens, source, part.astype(jnp.int32)


def extra_tokens(
    length: int, denoisers: Sequence[Sequence[Any]] = UL2, *, scale: float = 1.0
) -> int:
    """Returns how many ids from `first` on the sequences of rows of `length` need."""
    most = max(plan(denoiser, length, scale=scale).spans for denoiser in denoisers)
    return len(MODES) + 1 + most + 1


def make_denoise(
    *,
    vocabulary: int,
    first: int,
    denoisers: Sequence[Sequence[Any]] = UL2,
    rates: Sequence[float] = (),
    scale: float = 1.0,
    modes: bool = True,
) -> Transform:
    """Returns a transform of rows of text into inputs and targets; see the module.

    It takes the place of `next_token`. Of each row it takes all tokens but the first, which is the
    last of the row before. The denoiser of an example is drawn anew in each epoch. `input` becomes
    a dictionary of `tokens` and `segments`, 0 and -1 for padding; `target` and `target_mask` are
    entries of the batch; `bytes`, which is of the whole row, is left out.

    Args:
      vocabulary: v, of the data with its reserved tokens (`reserved` of `text_folder`).
      first: id of the first reserved token: 257 for bytes.
      denoisers: (mode, mean length of a span, share of hidden tokens) each; a mean length of 0
        hides the last tokens of the row.
      rates: of the denoisers, in proportion to which they are drawn; all alike by default.
      scale: factor of the mean lengths, such as 4 for bytes.
      modes: whether sequences begin with a mode token.

    Raises:
      ArgumentError: an argument is out of range; as it is applied, rows of another kind, or fewer
        reserved tokens than rows of that length need.
    """
    ranges.sizes(vocabulary=vocabulary)
    ranges.counts(first=first)
    ranges.within("(0, inf)", scale=scale)
    _check_denoisers(denoisers)
    shares = tuple(rates) or (1.0,) * len(denoisers)
    ranges.within("[0, inf)", rates=shares)
    if len(shares) != len(denoisers) or not sum(shares):
        raise ArgumentError(
            f"{len(shares)} rates of {len(denoisers)} denoisers, with the sum {sum(shares)}",
            where="rates",
            hint="one for each, not all 0",
        )
    check_reserved(vocabulary, first, len(MODES) + 3)
    total = sum(shares)
    edges = [sum(shares[: i + 1]) / total for i in range(len(shares) - 1)]

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        ids, padding, length = _text(batch)
        check_reserved(vocabulary, first, extra_tokens(length, denoisers, scale=scale))
        plans = [plan(denoiser, length, scale=scale) for denoiser in denoisers]
        size = max(made.size(length) for made in plans) - int(not modes)

        def one(key: Key, ids: Array) -> tuple[Array, Array, Array]:
            choose, *keys = jax.random.split(key, 1 + len(plans))
            options = []
            for made, own in zip(plans, keys, strict=True):
                spans = draw_spans(own, made, length)
                how = {"first": first, "modes": modes, "size": size}
                options.append(corrupt(ids, *spans, made, **how))
            which = (jax.random.uniform(choose) >= jnp.array(edges)).sum() if edges else 0
            return jax.tree.map(lambda *xs: jnp.stack(xs)[which], *options)

        made = jax.vmap(one)(rng.example_keys(key, batch), ids)
        return {
            **{name: x for name, x in batch.items() if name != "bytes"},
            **view_of(*made, padding=padding),
        }

    return apply


def view_of(
    tokens: Array, source: Array, part: Array, *, padding: Array, spans_only: bool = False
) -> dict[str, Any]:
    """Returns `input`, `target` and `target_mask` of sequences `[b, s]`.

    Args:
      tokens: see `corrupt`, as the next two.
      source: `[b, s]`.
      part: `[b, s]`.
      padding: whether a token of the row is padding, `[b, L]`; it is no target.
      spans_only: whether sentinels are no targets.
    """
    at = jnp.maximum(source, 0)
    empty = (source >= 0) & jnp.take_along_axis(padding, at, axis=1)
    learned = (part == 1) & ~empty & ((source >= 0) | (not spans_only))
    return {
        "input": {"tokens": tokens[:, :-1], "segments": jnp.minimum(part[:, :-1], 0)},
        "target": tokens[:, 1:],
        "target_mask": learned[:, 1:].astype(jnp.float32),
    }


def make_denoised_views(
    *,
    vocabulary: int,
    first: int,
    span: int = 16,
    share: float = 0.25,
    infill_mode: str = "R",
    continuation_mode: str = "S",
) -> Transform:
    """Returns a transform that adds what the evaluator `denoising` measures, as `denoised`.

    Two tasks in two forms each, `{name: {tokens, segments, target, target_mask}}`: a span in the
    middle of the text (`infill`) and its end (`continuation`), as sequences of a denoiser, and as
    plain text from the left (`infill_left`, `continuation_left`), where the same tokens are
    targets. It comes before `next_token`.

    Args:
      vocabulary: v, as in `denoise`.
      first: as in `denoise`.
      span: number of tokens to fill in. The span is drawn for each example, with at least as much
        text before it, and some behind it.
      share: of the text that is to be continued, in (0, 1).
      infill_mode: mode token of `infill`; "" for none.
      continuation_mode: of `continuation`.

    Raises:
      ArgumentError: an argument is out of range; as it is applied, rows that are too short, or too
        few reserved tokens.
    """
    ranges.sizes(vocabulary=vocabulary, span=span)
    ranges.counts(first=first)
    ranges.within("(0, 1)", share=share)
    for name, mode in (("infill_mode", infill_mode), ("continuation_mode", continuation_mode)):
        if mode and mode not in MODES:
            raise ArgumentError(f"no mode {mode!r}", where=name, hint=nearest(mode, MODES))
    check_reserved(vocabulary, first, len(MODES) + 3)

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        ids, padding, length = _text(batch)
        if length < 2 * span + 2:
            raise ArgumentError(
                f"rows of {length} tokens, and spans of {span}",
                where="span",
                hint=f"rows of {2 * span + 2} tokens or more",
            )
        keys = rng.example_keys(key, batch)
        start = jax.vmap(lambda k: jax.random.randint(k, (), span, length - span))(keys)
        end = plan(("S", 0, share), length)
        tasks = {
            "infill": (start, Plan(infill_mode or "R", span, 1), infill_mode),
            "continuation": (
                jnp.full(len(ids), length - end.hidden),
                end._replace(mode=continuation_mode or "S"),
                continuation_mode,
            ),
        }
        views = {}
        for name, (begin, made, mode) in tasks.items():
            how = {"first": first, "modes": bool(mode), "size": made.size(length) - (not mode)}
            lengths = jnp.full(1, made.hidden)

            def one(ids: Array, begin: Array, made=made, how=how, lengths=lengths) -> Any:
                return corrupt(ids, begin[None], lengths, made, **how)

            view = view_of(*jax.vmap(one)(ids, begin), padding=padding, spans_only=True)
            views[name] = {**view.pop("input"), **view}
            position = jnp.arange(length)[None]
            asked = (position >= begin[:, None]) & (position < begin[:, None] + made.hidden)
            views[f"{name}_left"] = {
                "tokens": ids[:, :-1],
                "segments": jnp.zeros_like(ids[:, 1:]),
                "target": ids[:, 1:],
                "target_mask": (asked & ~padding)[:, 1:].astype(jnp.float32),
            }
        return {**batch, "denoised": views}

    return apply


def check_reserved(vocabulary: int, first: int, needed: int) -> None:
    """Raises `ArgumentError` for fewer reserved ids than sequences need."""
    if vocabulary - first < needed:
        raise ArgumentError(
            f"{max(vocabulary - first, 0)} reserved tokens, and {needed} are needed",
            where="first",
            hint=f"data with reserved={needed}, such as text_folder; first is the first of them",
        )


def _check_denoisers(denoisers: Sequence[Sequence[Any]]) -> None:
    for one in denoisers:
        if len(one) != 3 or one[0] not in MODES:
            raise ArgumentError(
                f"{tuple(one)} is no denoiser",
                where="denoisers",
                hint=f"(mode, mean length of a span, share), modes {', '.join(MODES)}",
            )
        ranges.within("[0, inf)", where="denoisers", span=one[1])
        ranges.within("(0, 1)", where="denoisers", share=one[2])
    if not denoisers:
        raise ArgumentError("no denoiser", where="denoisers", hint="such as ('R', 3, 0.15)")


def _text(batch: Batch) -> tuple[Array, Array, int]:
    """Returns the tokens of rows `[b, L]`, whether they are padding, and L."""
    rows = batch["input"]
    is_text = isinstance(rows, Mapping) and {"tokens", "segments"} <= set(rows)
    require(is_text and "target" not in batch, "the input is no rows of tokens", "batch")
    ids = rows["tokens"][:, 1:].astype(jnp.int32)
    if ids.shape[1] < 2:
        raise ArgumentError(f"rows of {ids.shape[1]} tokens", where="length", hint="2 or more")
    return ids, rows["segments"][:, 1:] < 0, ids.shape[1]
