"""FT-Transformer (Gorishniy et al. 2021, arXiv:2106.11959): a transformer over columns."""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from distill_jax.core import ranges, tokens
from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.models import _tables
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import Dense, LayerNorm
from distill_jax.models.vit import Block, Size


class TabularTransformer(nn.Module):
    """The network of `make`."""

    num_classes: int
    cardinalities: tuple[int, ...]
    size: Size
    mlp_ratio: int
    dropout: float
    drop_path: float
    registers: int
    pool: str

    @nn.compact
    def __call__(
        self, x: Mapping[str, Array], keep: Array | None = None, train: bool = False
    ) -> Outputs:
        width, depth, heads = self.size
        ids, numeric = _tables.read(x, self.cardinalities)
        uniform = _tables.unit_uniform
        columns = _tables.Fields(self.cardinalities, width, uniform, name="fields")(ids, numeric)
        bias = self.param("bias", uniform, columns.shape[1:]).astype(columns.dtype)
        h = columns + bias[None]
        h = h if keep is None else tokens.take(h, keep)
        if self.registers:
            cls = self.param("cls", uniform, (self.registers, width)).astype(h.dtype)
            cls = jnp.broadcast_to(cls[None], (h.shape[0], self.registers, width))
            h = jnp.concatenate([cls, h], axis=1)
        outputs = {}
        for index in range(depth):
            rate = self.drop_path * index / max(1, depth - 1)
            h = Block(heads, self.mlp_ratio, self.dropout, rate)(h, train=train)
            outputs[f"block{index + 1}"] = h
        for stage in range(1, 4):
            outputs[f"stage{stage}"] = outputs[f"block{math.ceil(stage * depth / 3)}"]
        h = outputs["tokens"] = LayerNorm()(h)
        if self.pool == "cls":
            embedding = jax.nn.relu(h[:, 0])
        else:
            embedding = h.mean(1) if self.pool == "mean" else h.reshape(h.shape[0], -1)
        outputs["embedding"] = embedding
        if self.num_classes:
            outputs["logits"] = Dense(self.num_classes)(embedding)
        return outputs


def make(
    *,
    num_classes: int,
    cardinalities: tuple[int, ...],
    width: int = 192,
    depth: int = 3,
    heads: int = 8,
    mlp_ratio: int = 2,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    registers: int = 1,
    pool: str = "cls",
) -> Model:
    """Returns an FT-Transformer for tables `{"categorical": [b, c], "numeric": [b, m]}`.

    A second input may follow, `keep`, int `[b, n]`, for masked methods: the network then reads only
    these columns, categorical ones counted first, and its class tokens.

    Tokens are a class token and one per column, categorical ones first: the row of an id or a
    vector times the value, plus the column's bias (section 3.3); logits come from the normalized
    class token through a ReLU. An id outside its column's range counts as the nearest one inside.
    The blocks are those of `vit`, which differ from the paper's: GELU in place of ReGLU (a ratio
    of 2 then has as many weights as the paper's 4/3), one dropout rate, on the residual branches
    (the paper has its own for attention and hidden units), and a normalization before the first
    attention too.

    Endpoints: `block<i>` `[b, r + c + m, d]` of every block, `stage1` to `stage3` (the blocks at
    a third, two thirds and the end), `tokens` (normalized), `embedding` (input of the last layer)
    and `logits`.

    Args:
      num_classes: k; 0 leaves the last layer and `logits` out.
      cardinalities: number of values of each categorical column.
      width: d, size of a token.
      depth: number of blocks.
      heads: number of attention heads.
      mlp_ratio: hidden width of the perceptrons over the token width.
      dropout: rate on every residual branch.
      drop_path: rate of the last block's stochastic depth, growing linearly from 0.
      registers: r, number of tokens without a column; the first one is the class token.
      pool: how `embedding` is computed: "cls" (the class token behind a ReLU), "mean" (of all
        tokens) or "flat" (all tokens side by side).

    Raises:
      ArgumentError: an unknown pool, one of a class token without registers, a size below 1, a rate
        outside [0, 1), or a width that the heads do not divide; when the network is first called,
        also an input that is not a table with these columns.
    """
    ranges.counts(num_classes=num_classes)
    ranges.depths(depth=depth)
    ranges.within(f"[0, {ranges.DEEPEST}]", whole=True, registers=registers)
    cardinalities = tuple(cardinalities)
    _tables.check(
        cardinalities=cardinalities,
        width=width,
        depth=depth,
        heads=heads,
        mlp_ratio=mlp_ratio,
        dropout=dropout,
        drop_path=drop_path,
    )
    if width % heads:
        raise ArgumentError(
            f"{heads} heads do not divide a width of {width}",
            where="heads",
            hint=f"divisors: {tokens.divisors(width)}",
        )
    if pool not in (pools := ("cls", "mean", "flat")):
        raise ArgumentError(f"no pooling {pool!r}", where="pool", hint=nearest(pool, pools))
    if registers < (least := int(pool == "cls")):
        raise ArgumentError(
            f"registers is {registers}", where="registers", hint=f"{least} or more with {pool!r}"
        )
    size = Size(width, depth, heads)
    return from_linen(
        TabularTransformer(
            num_classes, cardinalities, size, mlp_ratio, dropout, drop_path, registers, pool
        )
    )
