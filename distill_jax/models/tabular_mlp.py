"""A multilayer perceptron over embedded categorical and numeric columns."""

from collections.abc import Mapping

import flax.linen as nn

from distill_jax.core import ranges
from distill_jax.core.api import Array, Model, Outputs
from distill_jax.models import _tables
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import Dense


class TabularMLP(nn.Module):
    """The network of `make`."""

    num_classes: int
    cardinalities: tuple[int, ...]
    embedding_dim: int
    hidden: tuple[int, ...]
    dropout: float
    batch_norm: bool

    @nn.compact
    def __call__(self, x: Mapping[str, Array], train: bool = False) -> Outputs:
        ids, numeric = _tables.read(x, self.cardinalities)
        flat = _tables.features(ids, numeric, self.cardinalities, self.embedding_dim)
        tower = _tables.Tower(self.hidden, self.dropout, self.batch_norm, name="deep")
        embedding, outputs = tower(flat, train=train)
        return {**outputs, "embedding": embedding, "logits": Dense(self.num_classes)(embedding)}


def make(
    *,
    num_classes: int,
    cardinalities: tuple[int, ...],
    embedding_dim: int = 16,
    hidden: tuple[int, ...] = (256, 128),
    dropout: float = 0.0,
    batch_norm: bool = False,
) -> Model:
    """Returns a perceptron for tables `{"categorical": [b, c], "numeric": [b, m]}`.

    All categorical columns share one table, `fields/embedding`, whose rows a mesh axis can split;
    an id outside its column's range counts as the nearest one inside. Numeric columns enter as
    they are: the data set standardizes them.

    Endpoints: `stage<i>` `[b, hidden_i]` and `stage<i>_pre` of every hidden layer, `embedding`
    (input of the last layer) and `logits`.

    Args:
      num_classes: k.
      cardinalities: number of values of each categorical column.
      embedding_dim: size of the vector of an id.
      hidden: widths of the hidden layers; none makes a linear model of the embeddings.
      dropout: rate after every hidden layer.
      batch_norm: whether to normalize before every activation.

    Raises:
      ArgumentError: a size below 1 or a rate outside [0, 1); when the network is first called, also
        an input that is not a table with these columns.
    """
    ranges.counts(num_classes=num_classes)
    cardinalities, hidden = tuple(cardinalities), tuple(hidden)
    _tables.check(
        cardinalities=cardinalities, embedding_dim=embedding_dim, hidden=hidden, dropout=dropout
    )
    return from_linen(
        TabularMLP(num_classes, cardinalities, embedding_dim, hidden, dropout, batch_norm)
    )
