"""How good rankings are: nDCG, reciprocal rank of the first relevant candidate, precision at 1."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from distill_jax.core import ranges
from distill_jax.evaluators._logits import read_columns, read_logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking:
    """Metrics of the scores of `role` against relevances; see `make`."""

    role: str = "student"
    cutoffs: tuple[int, ...] = (5, 10)
    relevant: float = 1.0

    tasks: ClassVar[tuple[str, ...]] = ("multilabel", "regression")

    @property
    def outputs(self) -> Mapping[str, tuple[str, ...]]:
        return {self.role: ("logits",)}

    def __call__(
        self, outputs: Mapping[str, Mapping[str, np.ndarray]], batch: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        scores = read_logits(outputs, self.role)
        relevance, known = read_columns(batch, scores)
        order = np.argsort(-np.where(known, scores, -np.inf), axis=1, kind="stable")
        gains = np.where(known, np.exp2(relevance) - 1, 0)
        found, best = np.take_along_axis(gains, order, 1), -np.sort(-gains, axis=1)
        discount = 1 / np.log2(np.arange(scores.shape[1]) + 2)
        metrics: dict[str, Any] = {}
        for cutoff in self.cutoffs:
            wanted = best[:, :cutoff] @ discount[:cutoff]
            dcg = found[:, :cutoff] @ discount[:cutoff]
            ndcg = np.where(wanted > 0, dcg / np.where(wanted > 0, wanted, 1), 0)
            metrics[f"ndcg{cutoff}"] = float(ndcg.mean())
        hits = np.take_along_axis(known & (relevance >= self.relevant), order, 1)
        last = max(self.cutoffs)
        first = np.where(hits.any(1), hits.argmax(1), last)
        metrics[f"mrr{last}"] = float(np.where(first < last, 1 / (first + 1), 0).mean())
        metrics["precision1"] = float(hits[:, 0].mean())
        return metrics


def make(
    *, role: str = "student", cutoffs: tuple[int, ...] = (5, 10), relevant: float = 1.0
) -> Ranking:
    """Makes the evaluator of rankings by the scores `logits` `[n, m]` of m candidates.

    Labels are relevances, 0 or more; candidates whose label is unknown are absent. Ties are ranked
    in the order of the candidates.

    Metrics:
      ndcg<c>: normalized discounted cumulative gain of the first c, see `losses.listwise.ndcg`.
      mrr<c>: one over the rank of the first relevant candidate, 0 if it is behind the largest
        cutoff (MRR@c).
      precision1: share of lists whose first candidate is relevant (P@1).

    Args:
      role: the network to measure.
      cutoffs: numbers of ranks that count.
      relevant: least relevance of a candidate that `mrr` and `precision1` take as relevant.

    Raises:
      NonFiniteError: on evaluation, if a score is NaN or infinite.
    """
    ranges.sizes(cutoffs=cutoffs)
    ranges.within("(0, inf)", relevant=relevant)
    return Ranking(role=role, cutoffs=tuple(cutoffs), relevant=relevant)
