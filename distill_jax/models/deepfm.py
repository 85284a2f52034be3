"""DeepFM (Guo et al. 2017, arXiv:1703.04247): a factorization machine and a perceptron.

Both read the same field vectors v_f x_f: the row of an id (x_f = 1), or a learned vector times a
numeric value.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp

from distill_jax.core import ranges
from distill_jax.core.api import Array, Model, Outputs
from distill_jax.models import _tables
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import Dense


def interactions(fields: Array) -> Array:
    """Returns the sum over pairs of fields f < g of their elementwise products, `[b, d]`.

    By 1/2 [(sum_f v_f)^2 - sum_f v_f^2] (Rendle 2010, lemma 3.1), at least in float32.

    Args:
      fields: `[b, f, d]`.
    """
    v = fields.astype(jnp.promote_types(fields.dtype, jnp.float32))
    return (0.5 * (jnp.square(v.sum(1)) - jnp.square(v).sum(1))).astype(fields.dtype)


class DeepFM(nn.Module):
    """The network of `make`."""

    num_classes: int
    cardinalities: tuple[int, ...]
    embedding_dim: int
    hidden: tuple[int, ...]
    dropout: float
    batch_norm: bool

    @nn.compact
    def __call__(self, x: Mapping[str, Array], train: bool = False) -> Outputs:
        binary = self.num_classes == 2
        scores = 1 if binary else self.num_classes
        ids, numeric = _tables.read(x, self.cardinalities)
        small = nn.initializers.normal(0.01)
        fields = _tables.Fields(self.cardinalities, self.embedding_dim, small, name="fields")
        v = fields(ids, numeric)
        pooled = interactions(v)
        tower = _tables.Tower(self.hidden, self.dropout, self.batch_norm, name="deep")
        embedding, outputs = tower(v.reshape(v.shape[0], -1), train=train)
        z = _tables.Wide(self.cardinalities, scores, name="wide")(ids, numeric)
        if binary:
            z += pooled.sum(1, keepdims=True)
        else:
            z += _tables.Linear(scores, name="interactions")(pooled)
        z += Dense(scores)(embedding)
        logits = jnp.concatenate([jnp.zeros_like(z), z], axis=1) if binary else z
        return {**outputs, "interactions": pooled, "embedding": embedding, "logits": logits}


def make(
    *,
    num_classes: int,
    cardinalities: tuple[int, ...],
    embedding_dim: int = 16,
    hidden: tuple[int, ...] = (256, 128),
    dropout: float = 0.0,
    batch_norm: bool = False,
) -> Model:
    """Returns DeepFM for tables `{"categorical": [b, c], "numeric": [b, m]}`.

    For two classes it is the paper's (eqs. 1-4) and the logits are [0, z], so that the probability
    of class 1 is sigmoid(z), with z = <w, x> + sum_{f<g} <v_f, v_g> x_f x_g + the perceptron's.
    The paper has no other number of classes. Here each of k != 2 classes has its own first-order
    weights and perceptron output, and weighs the d components of the interactions
    sum_{f<g} (v_f x_f) * (v_g x_g) by a vector of its own; for two classes that vector is all 1.
    The paper's network has embeddings of 10, hidden layers (400, 400, 400) and dropout 0.5. An id
    outside its column's range counts as the nearest one inside.

    Endpoints: `interactions` `[b, d]`, `stage<i>` and `stage<i>_pre` of every hidden layer,
    `embedding` (input of the perceptron's last layer) and `logits`.

    Args:
      num_classes: k.
      cardinalities: number of values of each categorical column.
      embedding_dim: d, size of the vector of a field.
      hidden: widths of the perceptron's layers.
      dropout: rate after every hidden layer.
      batch_norm: whether to normalize before every activation of the perceptron.

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
        DeepFM(num_classes, cardinalities, embedding_dim, hidden, dropout, batch_norm)
    )
