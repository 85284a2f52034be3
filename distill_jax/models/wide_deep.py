"""Wide & Deep (Cheng et al. 2016, arXiv:1606.07792): a linear model and a perceptron, summed."""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from distill_jax.core import ranges
from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ArgumentError
from distill_jax.models import _tables
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import Dense

_GOLDEN = 2654435769
"""2^32 over the golden ratio, an odd number (Knuth, The Art of Computer Programming 3, 6.4)."""


def cross(first: Array, second: Array, cardinalities: tuple[int, int], buckets: int) -> Array:
    """Returns the number of pairs of ids in [0, buckets), int32 of the shape of `first`.

    That is n = `first` * c_2 + `second` where there are no more than `buckets` pairs, and its
    multiplicative hash otherwise: the top log2(buckets) bits of a n mod 2^32, for a fixed odd a.

    Args:
      first: ids below c_1.
      second: ids below c_2.
      cardinalities: c_1 and c_2.
      buckets: a power of two, at most 2^30.
    """
    if math.prod(cardinalities) <= buckets:
        return first * cardinalities[1] + second
    if buckets == 1:
        return jnp.zeros_like(first)
    number = first.astype(jnp.uint32) * np.uint32(cardinalities[1]) + second.astype(jnp.uint32)
    shift = np.uint32(33 - buckets.bit_length())
    return (number * np.uint32(_GOLDEN) >> shift).astype(jnp.int32)


class WideDeep(nn.Module):
    """The network of `make`."""

    num_classes: int
    cardinalities: tuple[int, ...]
    embedding_dim: int
    hidden: tuple[int, ...]
    crosses: tuple[tuple[int, int], ...]
    cross_buckets: int
    dropout: float
    batch_norm: bool

    @nn.compact
    def __call__(self, x: Mapping[str, Array], train: bool = False) -> Outputs:
        ids, numeric = _tables.read(x, self.cardinalities)
        flat = _tables.features(ids, numeric, self.cardinalities, self.embedding_dim)
        tower = _tables.Tower(self.hidden, self.dropout, self.batch_norm, name="deep")
        embedding, outputs = tower(flat, train=train)
        columns, counts = [ids], list(self.cardinalities)
        for i, j in self.crosses:
            sizes = self.cardinalities[i], self.cardinalities[j]
            columns.append(cross(ids[:, i], ids[:, j], sizes, self.cross_buckets)[:, None])
            counts.append(min(math.prod(sizes), self.cross_buckets))
        wide = _tables.Wide(tuple(counts), self.num_classes, name="wide")(
            jnp.concatenate(columns, axis=1), numeric
        )
        logits = Dense(self.num_classes)(embedding) + wide
        return {**outputs, "wide": wide, "embedding": embedding, "logits": logits}


def make(
    *,
    num_classes: int,
    cardinalities: tuple[int, ...],
    embedding_dim: int = 16,
    hidden: tuple[int, ...] = (256, 128),
    crosses: tuple[tuple[int, int], ...] = (),
    cross_buckets: int = 4096,
    dropout: float = 0.0,
    batch_norm: bool = False,
) -> Model:
    """Returns Wide & Deep for tables `{"categorical": [b, c], "numeric": [b, m]}`.

    The logits (eq. 3, one for each class) are those of a linear model of the one-hot ids, their
    crosses and the numeric values, plus those of a perceptron of the embedded ids and the numeric
    values; both learn together. An id outside its column's range counts as the nearest one inside.
    The paper's network has embeddings of 32 and hidden layers (1024, 512, 256), and FTRL with an
    L1 penalty for the wide part; here one optimizer serves all, and the wide part starts at 0.

    Endpoints: `wide` `[b, k]`, `stage<i>` and `stage<i>_pre` of every hidden layer, `embedding`
    (input of the deep part's last layer) and `logits`.

    Args:
      num_classes: k.
      cardinalities: number of values of each categorical column.
      embedding_dim: size of the vector of an id in the deep part.
      hidden: widths of the deep part's layers.
      crosses: pairs of different categorical columns, by position; the wide part has one weight
        for each pair of their values (eq. 1).
      cross_buckets: most weights of a cross, a power of two; where it has more pairs of values,
        they are hashed, and those that meet in a bucket share its weight.
      dropout: rate after every hidden layer.
      batch_norm: whether to normalize before every activation of the deep part.

    Raises:
      ArgumentError: a size below 1, a rate outside [0, 1), a cross of columns that do not exist, or
        buckets that are no power of two; when the network is first called, also an input that is
        not a table with these columns.
    """
    ranges.counts(num_classes=num_classes)
    cardinalities, hidden = tuple(cardinalities), tuple(hidden)
    _tables.check(
        cardinalities=cardinalities,
        embedding_dim=embedding_dim,
        hidden=hidden,
        cross_buckets=cross_buckets,
        dropout=dropout,
    )
    if cross_buckets.bit_count() != 1 or cross_buckets > 2**30:
        low = 2 ** min(30, cross_buckets.bit_length() - 1)
        raise ArgumentError(
            f"cross_buckets is {cross_buckets}",
            where="cross_buckets",
            hint=f"a power of two up to {2**30}, e.g. {low}",
        )
    columns = range(len(cardinalities))
    for pair in crosses:
        if len(pair) != 2 or pair[0] == pair[1] or not set(pair) <= set(columns):
            raise ArgumentError(
                f"{pair} is not a pair of categorical columns",
                where="crosses",
                hint=f"two different numbers below {len(columns)}",
            )
    return from_linen(
        WideDeep(
            num_classes,
            cardinalities,
            embedding_dim,
            hidden,
            tuple((i, j) for i, j in crosses),
            cross_buckets,
            dropout,
            batch_norm,
        )
    )
