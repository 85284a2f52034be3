"""Transformers over tokens, decoders and encoders: GPT-2, Llama, Qwen2, SmolLM, BERT, CLIP text."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from distill_jax.core import sequences
from distill_jax.core.api import Array, Decode, Model, Outputs
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.core.partition import Rules
from distill_jax.core.tokens import divisors
from distill_jax.models._attention import Attention, frequencies, visible, visible_in_cache
from distill_jax.models._layouts import CHOICES, LAYOUTS, Architecture, architecture
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import Dense, LayerNorm, RMSNorm

INPUTS = ("tokens", "mask", "segments", "positions", "types", "ask")
"""Entries of an input that is a mapping; `tokens` alone must be there."""

_COLUMNS, _ROWS = ("fsdp", "model"), ("model", "fsdp")

RULES: Mapping[str, tuple[tuple[str | None, ...], tuple[str | None, ...]]] = {
    "attention/query": (_COLUMNS, ("model",)),
    "attention/(key|value)": (_COLUMNS, ("model",)),
    "attention/out": (_ROWS, (None,)),
    "mlp/(up|gate)": (_COLUMNS, ("model",)),
    "mlp/down": (_ROWS, (None,)),
}
"""Axes of kernel and bias of the products in a block, used by `partition_rules`."""

_ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
}

_normal = nn.initializers.normal(0.02)


def _norm(arch: Architecture, name: str) -> nn.Module:
    return (LayerNorm if arch.norm == "layer" else RMSNorm)(epsilon=arch.epsilon, name=name)


class Embedding(nn.Module):
    """A table `[v, d]`; a row that does not exist is NaN."""

    size: int
    width: int

    @nn.compact
    def __call__(self, ids: Array | None = None) -> Array:
        table = self.param("embedding", _normal, (self.size, self.width))
        return table if ids is None else jnp.take(table, ids, axis=0, mode="fill")


class MLP(nn.Module):
    """Two products with an activation between, gated as SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    arch: Architecture
    out_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        arch = self.arch
        act = _ACTIVATIONS[arch.activation]
        y = Dense(arch.mlp_width, _normal, arch.mlp_bias, name="up")(x)
        if arch.gated:
            y = act(Dense(arch.mlp_width, _normal, arch.mlp_bias, name="gate")(x)) * y
        else:
            y = act(y)
        return Dense(x.shape[-1], self.out_init, arch.mlp_bias, name="down")(y)


class Block(nn.Module):
    """Attention and perceptron on residual branches, normalized before or after the sum."""

    arch: Architecture
    train: bool

    @nn.compact
    def __call__(
        self,
        x: Array,
        positions: Array,
        seen: Array | None,
        cache: Mapping[str, Array] | None = None,
        at: Array | None = None,
    ) -> tuple[Array, Mapping[str, Array] | None]:
        arch = self.arch
        rope = arch.positions == "rope"
        scaling = dict(arch.rope_scaling) or None
        # Radford et al. 2019, section 2.3: residual branches start smaller the more there are.
        out_init = nn.initializers.normal(0.02 / math.sqrt(2 * arch.depth))
        attention = Attention(
            heads=arch.heads,
            groups=arch.groups,
            head_width=arch.head_width,
            bias=arch.qkv_bias,
            out_bias=arch.out_bias,
            causal=arch.causal,
            angles=(
                tuple(frequencies(arch.head_width, arch.rope_theta, scaling).tolist())
                if rope
                else None
            ),
            implementation=arch.attention,
            kernel_init=_normal,
            out_init=out_init,
            name="attention",
        )

        def attend(x: Array) -> Array:
            nonlocal cache
            y, cache = attention(x, positions, seen, cache, at)
            return y

        def branch(x: Array, function: Callable[[Array], Array], name: str) -> Array:
            norm = _norm(arch, name)
            y = function(norm(x) if arch.norm_first else x)
            if arch.dropout:
                y = nn.Dropout(arch.dropout)(y, deterministic=not self.train)
            return x + y if arch.norm_first else norm(x + y)

        x = branch(x, attend, "attention_norm")
        return branch(x, MLP(arch, out_init, name="mlp"), "mlp_norm"), cache


class Transformer(nn.Module):
    """The network of `make`."""

    arch: Architecture

    @nn.compact
    def __call__(
        self,
        x: Array | Mapping[str, Any],
        cache: tuple[Any, ...] | None = None,
        at: Array | None = None,
        start: Array | None = None,
        train: bool = False,
    ) -> Outputs | tuple[Array, tuple[Any, ...]]:
        """Returns the outputs, or for a cache the last logits `[b, v]` and the cache."""
        arch = self.arch
        given = _read(x)
        tokens, mask, segments = given["tokens"], given.get("mask"), given.get("segments")
        b, t = tokens.shape
        if cache is None or at is None or start is None:
            positions = given.get("positions")
            if positions is None:
                positions = sequences.positions_of(mask, segments, (b, t))
            causal = arch.causal and not (
                arch.attention != "plain" and mask is None and segments is None
            )
            seen = visible(t, causal=causal, mask=mask, segments=segments)
            caches: tuple[Any, ...] = (None,) * arch.depth
            if arch.positions == "learned" and t > arch.max_length:
                raise ArgumentError(
                    f"{t} tokens, and positions of {arch.max_length} were learned",
                    where="max_length",
                    hint="shorter sequences, or rotary positions",
                )
        else:
            length = cache[0]["key"].shape[1] if cache else t
            positions = jnp.maximum(at + jnp.arange(t)[None] - start[:, None], 0)
            seen, caches = visible_in_cache(t, length, at, start), cache
        embedding = Embedding(arch.vocabulary, arch.width, name="token_embedding")
        h = embedding(tokens)
        if arch.positions == "learned":
            h += Embedding(arch.max_length, arch.width, name="position_embedding")(positions)
        if arch.token_types:
            types = given.get("types")
            types = jnp.zeros((b, t), jnp.int32) if types is None else types
            h += Embedding(arch.token_types, arch.width, name="type_embedding")(types)
        if arch.embedding_norm:
            h = _norm(arch, "embedding_norm")(h)
        if arch.dropout:
            h = nn.Dropout(arch.dropout)(h, deterministic=not train)
        outputs = {"embedded": h}
        kind = nn.remat(Block) if arch.remat else Block
        kept = []
        for i in range(arch.depth):
            block = kind(arch, train, name=f"block{i}")
            h, one = block(h, positions, seen, caches[i], at)
            outputs[f"block{i + 1}"] = h
            kept.append(one)
        for stage in range(1, 4 if arch.depth else 1):
            outputs[f"stage{stage}"] = outputs[f"block{math.ceil(stage * arch.depth / 3)}"]
        h = _norm(arch, "final_norm")(h) if arch.final_norm else h
        outputs["hidden"] = outputs["tokens"] = h
        if cache is not None:
            h = h[:, -1:]
        else:
            outputs |= self.pooled(h, tokens, mask)
        if arch.head != "none":
            outputs |= self.read_out(h, embedding(), given.get("ask"))
        elif "ask" in given:
            raise ArgumentError(
                "the input has `ask`, and the network has no logits of tokens",
                where="ask",
                hint='head "tied", "untied" or "masked"',
            )
        return outputs if cache is None else (outputs["logits"][:, 0], tuple(kept))

    def pooled(self, h: Array, tokens: Array, mask: Array | None) -> dict[str, Array]:
        """Returns `embedding` `[b, d]`, and `logits` `[b, k]` where there are classes."""
        arch = self.arch
        seen = jnp.ones(tokens.shape, h.dtype) if mask is None else (mask > 0).astype(h.dtype)
        if arch.pool == "mean":
            total = jnp.maximum(seen.sum(1, keepdims=True), 1)
            e = (h * seen[:, :, None]).sum(1) / total
        else:
            if arch.pool == "cls":
                index = jnp.argmax(seen, axis=1)
            elif arch.pool == "last":
                index = h.shape[1] - 1 - jnp.argmax(seen[:, ::-1], axis=1)
            else:
                index = jnp.argmax(tokens if arch.end < 0 else tokens == arch.end, axis=1)
            e = jnp.take_along_axis(h, index[:, None, None], axis=1)[:, 0]
        if arch.pooler:
            e = _ACTIVATIONS[arch.pooler](Dense(arch.width, _normal, name="pooler")(e))
        if arch.projection:
            e = Dense(arch.projection, _normal, use_bias=False, name="projection")(e)
        outputs = {}
        if arch.num_classes:
            outputs["logits"] = Dense(arch.num_classes, _normal, name="classifier")(e)
        if arch.normalize:
            e = e / jnp.maximum(jnp.linalg.norm(e, axis=-1, keepdims=True), 1e-12)
        return {"embedding": e, **outputs}

    def read_out(self, h: Array, table: Array, ask: Array | None) -> dict[str, Array]:
        """Returns `logits` `[b, t, v]`, and the outputs for `ask` and `top`."""
        arch = self.arch
        bias = None
        if arch.head == "masked":
            act = _ACTIVATIONS[arch.activation]
            h = act(Dense(arch.width, _normal, name="head_dense")(h))
            h = _norm(arch, "head_norm")(h)
            bias = self.param("head_bias", nn.initializers.zeros, (arch.vocabulary,))
        elif arch.head == "untied":
            table = Embedding(arch.vocabulary, arch.width, name="head")()
        outputs = {"logits": sequences.logits_of(h, table, bias)}
        if ask is not None:
            outputs["log_probs"] = sequences.log_probs_of(h, table, ask, bias=bias)
        if arch.top:
            top = sequences.top_log_probs_of(h, table, arch.top, bias=bias)
            outputs |= {"top_index": top.index, "top_log_probs": top.log_probs}
            outputs["tail_log_prob"] = top.tail
        return outputs


def _read(x: Array | Mapping[str, Any]) -> Mapping[str, Array]:
    """Returns the entries of an input.

    Raises:
      ArgumentError: an unknown entry, no tokens, or shapes that do not fit.
    """
    given: Mapping[str, Any] = x if isinstance(x, Mapping) else {"tokens": x}
    for name in given:
        if name not in INPUTS:
            what = f"a transformer has no input {name!r}"
            raise ArgumentError(what, where="input", hint=nearest(name, INPUTS))
    if "tokens" not in given:
        raise ArgumentError("the input has no tokens", where="input", hint=f"one of {INPUTS}")
    tokens = given["tokens"]
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ArgumentError(
            f"tokens are {tokens.dtype.name} of shape {tuple(tokens.shape)}",
            where="input.tokens",
            hint="ids, integers [b, t]",
        )
    for name, value in given.items():
        per_token = value.shape[:2] if name == "ask" and value.ndim == 3 else value.shape
        if per_token != tokens.shape or (name == "ask") != (value.ndim == 3):
            raise ArgumentError(
                f"{name} has the shape {tuple(value.shape)}, tokens have {tuple(tokens.shape)}",
                where=f"input.{name}",
                hint="ask is [b, t, k], everything else [b, t]",
            )
    return given


def make(
    *,
    vocabulary: int,
    layout: str = "llama",
    width: int = 256,
    depth: int = 4,
    heads: int = 4,
    groups: int = 0,
    head_width: int = 0,
    mlp_width: int = 0,
    max_length: int | None = None,
    causal: bool | None = None,
    norm: str | None = None,
    norm_first: bool | None = None,
    epsilon: float | None = None,
    activation: str | None = None,
    gated: bool | None = None,
    positions: str | None = None,
    rope_theta: float | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
    qkv_bias: bool | None = None,
    out_bias: bool | None = None,
    mlp_bias: bool | None = None,
    token_types: int | None = None,
    embedding_norm: bool | None = None,
    final_norm: bool | None = None,
    head: str | None = None,
    pool: str | None = None,
    pooler: str | None = None,
    end: int | None = None,
    projection: int | None = None,
    normalize: bool | None = None,
    num_classes: int = 0,
    top: int = 0,
    dropout: float = 0.0,
    attention: str = "plain",
    remat: bool = False,
) -> Model:
    """Returns a transformer over tokens; its input is ids, int `[b, t]`, or a mapping.

    A mapping has `tokens` and any of: `mask` `[b, t]`, 0 on padding, on either side; `segments` int
    `[b, t]`, equal within each of several documents packed in a row, which do not attend to each
    other; `positions` int `[b, t]`, by default counted from the first unmasked token and anew in
    each segment; `types` int `[b, t]`, BERT's token types, by default 0; and `ask` int `[b, t, k]`,
    the tokens whose log-probabilities are computed. An id that does not exist gives NaN.

    Outputs: `embedded` `[b, t, d]`, the input of the first block; `block<i>` of every block;
    `stage1` to `stage3`, the blocks at a third, two thirds and the end; `hidden` `[b, t, d]`,
    normalized where there is a last norm, and the same as `tokens`; `embedding` `[b, d]`, pooled;
    `logits` `[b, t, v]`, for the next token at each position (for the token itself with
    `head="masked"`), or of `num_classes`; `log_probs` `[b, t, k]` where `ask` is given; with `top`,
    also `top_index` and `top_log_probs` `[b, t, top]` and `tail_log_prob` `[b, t]`. Logits that are
    not used cost nothing under `jit`; `log_probs` and `top_*` never hold all logits of a large
    vocabulary at once, see `core.sequences`.

    A causal network with logits of the next token can be sampled from: it has `decode`, in which
    dropout is off. Arguments that are None are the layout's.

    Args:
      vocabulary: v, number of token ids.
      layout: "gpt2", "llama", "qwen2", "smollm", "bert", "minilm", "distilbert" or "clip_text".
      width: d.
      depth: number of blocks.
      heads: number of attention heads.
      groups: heads of keys and values; 0 is as many as `heads`.
      head_width: of a head; 0 is width / heads.
      mlp_width: hidden width; 0 is 4 d, or 8/3 d where it is gated, in multiples of 8.
      max_length: number of learned positions.
      causal: whether a token attends only to those before it.
      norm: "layer" or "rms".
      norm_first: whether the input of a branch is normalized, else the sum after it.
      epsilon: epsilon of the norms.
      activation: "gelu" (exact), "gelu_tanh", "quick_gelu", "silu" or "relu".
      gated: whether the hidden units are multiplied by a second linear map.
      positions: "learned" or "rope".
      rope_theta: base of the wavelengths of "rope".
      rope_scaling: of "rope", a dict as in `config.json`: "linear" or "llama3".
      qkv_bias: whether queries, keys and values have a bias.
      out_bias: whether the output of attention has one.
      mlp_bias: whether the perceptron has biases.
      token_types: number of BERT's token types.
      embedding_norm: whether the embedded tokens are normalized.
      final_norm: whether the last block's output is normalized.
      head: "tied" to the embedding, "untied", "masked" (BERT's, for hidden tokens) or "none".
      pool: "mean" over the mask, "cls" (the first unmasked token), "last", or "end", at the first
        token with the id `end`.
      pooler: activation of a linear map behind the pooling, "tanh" or "relu"; "" for no map.
      end: see `pool`; -1 is the largest id in the sequence.
      projection: width of a last linear map of the embedding; 0 for none.
      normalize: whether the embedding has length 1.
      num_classes: k of a linear classifier of the embedding; needs `head="none"`.
      top: number of most probable tokens in the outputs.
      dropout: rate on the embedded tokens and every residual branch.
      attention: "plain", or "xla" or "cudnn" of `jax.nn.dot_product_attention`; "cudnn" is for GPUs
        and 16 bits, and lacks the forward derivative that bilevel steps need.
      remat: whether blocks are computed again in the backward pass, to save memory.

    Raises:
      ArgumentError: an unknown layout or choice, or sizes that do not fit; as the network is first
        called, also an input that does not fit.
    """
    arch = _architecture(**locals())
    return from_linen(Transformer(arch))._replace(decode=_decode(arch))


def _architecture(layout: str, **arguments: Any) -> Architecture:
    given = {name: value for name, value in arguments.items() if value is not None}
    return architecture(layout, given)


def partition_rules(*, devices: int, layout: str = "llama", **arguments: Any) -> Rules:
    """Returns tensor parallelism of the blocks (Shoeybi et al. 2019, arXiv:1909.08053, section 3).

    Of the two products in each branch the first is split by output columns, which are whole heads,
    the second by input rows, so that a branch exchanges one sum forwards and one backwards. Keys
    and values of fewer groups than devices stay whole. Embeddings follow the default of "fsdp".

    Args:
      devices: size of the axis "model" of the mesh.
      layout: as of `make`.
      **arguments: as of `make`.

    Raises:
      ArgumentError: as `make`, or a number of devices that does not divide the heads, the groups
        (unless it is larger) or the hidden width.
    """
    arch = _architecture(layout, **{"vocabulary": 2**20, **arguments})  # on which no rule depends
    shared = arch.groups < devices
    sizes = {"heads": arch.heads, "mlp_width": arch.mlp_width}
    for name, size in {**sizes, **({} if shared else {"groups": arch.groups})}.items():
        if size % devices:
            raise ArgumentError(
                f"{name} {size} does not split over model={devices}",
                where="mesh.model",
                hint=f"divisors: {divisors(size)}",
            )
    biases = {
        "attention/query": arch.qkv_bias,
        "attention/(key|value)": arch.qkv_bias,
        "attention/out": arch.out_bias,
    }
    rules = {}
    for layer, (kernel, bias) in RULES.items():
        if shared and "key" in layer:
            kernel, bias = ("fsdp", None), (None,)
        rules[f"{layer}/kernel$"] = kernel
        if biases.get(layer, arch.mlp_bias):
            rules[f"{layer}/bias$"] = bias
    return rules


def _decode(arch: Architecture) -> Decode | None:
    """Returns the decoder with a cache; None for a network without logits of the next token."""
    if not arch.causal or arch.head not in ("tied", "untied"):
        return None
    net = Transformer(arch._replace(dropout=0.0, top=0))

    def cache(b: int, length: int, dtype: Any) -> tuple[Any, ...]:
        if arch.positions == "learned" and length > arch.max_length:
            raise ArgumentError(
                f"{length} tokens with the prompt, and positions of {arch.max_length} were learned",
                where="steps",
                hint="a shorter prompt or fewer steps",
            )
        shape = (b, length, arch.groups, arch.head_width)
        zeros = {name: jnp.zeros(shape, dtype) for name in ("key", "value")}
        return tuple(dict(zeros) for _ in range(arch.depth))

    def step(
        params: Any, tokens: Array, cache: tuple[Any, ...], at: Array, start: Array
    ) -> tuple[Array, tuple[Any, ...]]:
        result: Any = net.apply({"params": params}, tokens, cache, at, start)
        return result

    return Decode(cache, step, arch.vocabulary)


__all__ = ["CHOICES", "INPUTS", "LAYOUTS", "RULES", "make", "partition_rules"]
