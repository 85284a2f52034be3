"""DCN-V2 (Wang et al. 2021, arXiv:2008.13535): explicit feature crosses beside a perceptron."""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp

from distill_jax.core import ranges
from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.models import _tables
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import Dense

STRUCTURES = ("parallel", "stacked")


class Cross(nn.Module):
    """x_{l+1} = x_0 * (W x_l + b) + x_l (eq. 1); at low rank r, W = U V^T.

    Attributes:
      rank: r, or 0 for a full matrix.
    """

    rank: int

    @nn.compact
    def __call__(self, first: Array, x: Array) -> Array:
        low = _tables.Linear(self.rank)(x) if self.rank else x
        return first * Dense(x.shape[-1])(low) + x


class DCNV2(nn.Module):
    """The network of `make`."""

    num_classes: int
    cardinalities: tuple[int, ...]
    embedding_dim: int
    hidden: tuple[int, ...]
    cross_layers: int
    low_rank: int
    structure: str
    dropout: float
    batch_norm: bool

    @nn.compact
    def __call__(self, x: Mapping[str, Array], train: bool = False) -> Outputs:
        ids, numeric = _tables.read(x, self.cardinalities)
        first = _tables.features(ids, numeric, self.cardinalities, self.embedding_dim)
        crossed, crosses = first, {}
        for layer in range(1, self.cross_layers + 1):
            crossed = Cross(self.low_rank, name=f"cross{layer}")(first, crossed)
            crosses[f"cross{layer}"] = crossed
        parallel = self.structure == "parallel"
        tower = _tables.Tower(self.hidden, self.dropout, self.batch_norm, name="deep")
        embedding, outputs = tower(first if parallel else crossed, train=train)
        if parallel:
            embedding = jnp.concatenate([crossed, embedding], axis=1)
        logits = Dense(self.num_classes)(embedding)
        return {**crosses, **outputs, "embedding": embedding, "logits": logits}


def make(
    *,
    num_classes: int,
    cardinalities: tuple[int, ...],
    embedding_dim: int = 16,
    hidden: tuple[int, ...] = (256, 128),
    cross_layers: int = 3,
    low_rank: int = 0,
    structure: str = "parallel",
    dropout: float = 0.0,
    batch_norm: bool = False,
) -> Model:
    """Returns DCN-V2 for tables `{"categorical": [b, c], "numeric": [b, m]}`.

    x_0 `[b, c d + m]` is the embedded ids and the numeric values, as the data set gives them. An
    id outside its column's range counts as the nearest one inside. The paper's mixture of low-rank
    experts is left out.

    Endpoints: `cross<i>` `[b, c d + m]`, `stage<i>` and `stage<i>_pre` of every hidden layer,
    `embedding` (input of the last layer) and `logits`.

    Args:
      num_classes: k.
      cardinalities: number of values of each categorical column.
      embedding_dim: d, size of the vector of an id.
      hidden: widths of the perceptron's layers; stacked, none leaves the cross layers alone.
      cross_layers: number of cross layers.
      low_rank: rank of their matrices; 0 for full ones.
      structure: "parallel" (the perceptron reads x_0, and the last layer reads both) or "stacked"
        (the perceptron reads the last cross layer).
      dropout: rate after every hidden layer.
      batch_norm: whether to normalize before every activation of the perceptron.

    Raises:
      ArgumentError: an unknown structure, a size below 1, a rate outside [0, 1), or a parallel
        perceptron without layers; when the network is first called, also an input that is not a
        table with these columns.
    """
    ranges.counts(num_classes=num_classes)
    ranges.depths(cross_layers=cross_layers)
    ranges.counts(low_rank=low_rank)
    cardinalities, hidden = tuple(cardinalities), tuple(hidden)
    _tables.check(
        cardinalities=cardinalities,
        embedding_dim=embedding_dim,
        hidden=hidden,
        cross_layers=cross_layers,
        dropout=dropout,
    )
    if structure not in STRUCTURES:
        hint = nearest(structure, STRUCTURES)
        raise ArgumentError(f"no structure {structure!r}", where="structure", hint=hint)
    if structure == "parallel" and not hidden:
        raise ArgumentError(
            "a perceptron beside the cross layers needs at least one width",
            where="hidden",
            hint='structure="stacked" without hidden layers is the cross layers alone',
        )
    return from_linen(
        DCNV2(
            num_classes,
            cardinalities,
            embedding_dim,
            hidden,
            cross_layers,
            low_rank,
            structure,
            dropout,
            batch_norm,
        )
    )
