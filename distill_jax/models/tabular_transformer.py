"""FT-Transformer (Gorishniy et al. 2021, arXiv:2106.11959): a transformer over columns."""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ConfigError
from distill_jax.models import _tables
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import Dense
from distill_jax.models.vit import Block, Size


class TabularTransformer(nn.Module):
    """The network of `make`."""

    num_classes: int
    cardinalities: tuple[int, ...]
    size: Size
    mlp_ratio: int
    dropout: float
    drop_path: float

    @nn.compact
    def __call__(self, x: Mapping[str, Array], train: bool = False) -> Outputs:
        width, depth, heads = self.size
        ids, numeric = _tables.read(x, self.cardinalities)
        uniform = _tables.unit_uniform
        columns = _tables.Fields(self.cardinalities, width, uniform, name="fields")(ids, numeric)
        bias = self.param("bias", uniform, columns.shape[1:]).astype(columns.dtype)
        cls = self.param("cls", uniform, (1, width)).astype(columns.dtype)
        cls = jnp.broadcast_to(cls[None], (len(columns), 1, width))
        tokens = jnp.concatenate([cls, columns + bias[None]], axis=1)
        outputs = {}
        for index in range(depth):
            rate = self.drop_path * index / max(1, depth - 1)
            tokens = Block(heads, self.mlp_ratio, self.dropout, rate)(tokens, train=train)
            outputs[f"block{index + 1}"] = tokens
        for stage in range(1, 4):
            outputs[f"stage{stage}"] = outputs[f"block{math.ceil(stage * depth / 3)}"]
        tokens = outputs["tokens"] = nn.LayerNorm(epsilon=1e-6)(tokens)
        embedding = outputs["embedding"] = jax.nn.relu(tokens[:, 0])
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
) -> Model:
    """Returns an FT-Transformer for tables `{"categorical": [b, c], "numeric": [b, m]}`.

    Tokens are a class token and one per column, categorical ones first: the row of an id or a
    vector times the value, plus the column's bias (section 3.3); logits come from the normalized
    class token through a ReLU. An id outside its column's range counts as the nearest one inside.
    The blocks are those of `vit`, which differ from the paper's: GELU in place of ReGLU (a ratio
    of 2 then has as many weights as the paper's 4/3), one dropout rate, on the residual branches
    (the paper has its own for attention and hidden units), and a normalization before the first
    attention too.

    Endpoints: `block<i>` `[b, 1 + c + m, d]` of every block, `stage1` to `stage3` (the blocks at
    a third, two thirds and the end), `tokens` (normalized), `embedding` (input of the last layer)
    and `logits`.

    Args:
      num_classes: k.
      cardinalities: number of values of each categorical column.
      width: d, size of a token.
      depth: number of blocks.
      heads: number of attention heads.
      mlp_ratio: hidden width of the perceptrons over the token width.
      dropout: rate on every residual branch.
      drop_path: rate of the last block's stochastic depth, growing linearly from 0.

    Raises:
      ConfigError: a size below 1, a rate outside [0, 1), or a width that the heads do not divide;
        when the network is first called, also an input that is not a table with these columns.
    """
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
        divisors = ", ".join(str(n) for n in range(1, width + 1) if width % n == 0)
        raise ConfigError(
            f"{heads} heads do not divide a width of {width}",
            where="heads",
            hint=f"divisors: {divisors}",
        )
    size = Size(width, depth, heads)
    return from_linen(
        TabularTransformer(num_classes, cardinalities, size, mlp_ratio, dropout, drop_path)
    )
