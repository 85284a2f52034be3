"""The means of a batch: the one place that averages over examples and tokens."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array, Terms


class Totals(NamedTuple):
    """The denominators of the means of a batch, scalars; 1 where they would be 0.

    Attributes:
      examples: number of examples, the denominator of terms without counts.
      terms: sum of the counts of each other term.
    """

    examples: Array
    terms: Mapping[str, Array]

    @classmethod
    def of(cls, mask: Array, counts: Mapping[str, Array]) -> "Totals":
        """Returns the totals of a whole batch from its mask `[b]` and `counts_of` its terms."""
        counts = {name: jnp.where(count > 0, count, 1) for name, count in counts.items()}
        return cls(jnp.maximum(mask.sum(), 1), jax.lax.stop_gradient(counts))

    def total(self, name: str) -> Array:
        """Returns the denominator of a term."""
        return self.terms.get(name, self.examples)

    def mean(self, name: str, x: Array, mask: Array) -> Array:
        """Returns the part of the mean of a term that `x` `[b]` or `[b, t]` contributes."""
        return (per_row(mask, x) * x).sum() / self.total(name)


def counts_of(terms: Terms, mask: Array) -> dict[str, Array]:
    """Returns the sum of the counts of each term that has any, without padding."""
    return {name: (per_row(mask, x) * x).sum() for name, x in terms.counts.items()}


def totals_of(terms: Terms, mask: Array) -> Totals:
    """Returns the denominators of the means, for terms of a whole batch."""
    return Totals.of(mask, counts_of(terms, mask))


def per_row(mask: Array, x: Array) -> Array:
    """Returns a mask `[b]` with as many axes as `x` `[b, ...]`."""
    return mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim))


def mean_loss(
    terms: Terms, mask: Array, totals: Totals | None = None
) -> tuple[Array, dict[str, Array]]:
    """Returns the loss and the metrics of a batch.

    Args:
      terms: from an objective.
      mask: float `[b]`.
      totals: of the whole batch if `terms` cover only a part of it.

    Returns:
      `sum_i coef_i * sum_b mask_b * weight_ib * value_ib / total_i`, and as metrics the loss, the
      mean of each value without its weights, the mean of each weight as `weight/<term>`, the sum of
      the counts as `counts/<term>`, and the facts. Where values are `[b, t]`, sums are over b and
      t.
    """
    totals = totals or totals_of(terms, mask)
    means = {k: totals.mean(k, v, mask) for k, v in terms.values.items()}
    weighted = {k: totals.mean(k, w * terms.values[k], mask) for k, w in terms.weights.items()}
    loss: Any = sum(terms.coef.get(k, 1.0) * v for k, v in {**means, **weighted}.items())
    shares = {k: w * terms.counts[k] if k in terms.counts else w for k, w in terms.weights.items()}
    shares = {f"weight/{k}": totals.mean(k, w, mask) for k, w in shares.items()}
    counts = {f"counts/{k}": n for k, n in counts_of(terms, mask).items()}
    part = mask.sum() / totals.examples  # facts of micro-batches are averaged by their examples
    metrics = {k: part * jax.lax.stop_gradient(v) for k, v in terms.metrics.items()}
    return loss, {"loss": loss, **means, **shares, **counts, **metrics}
