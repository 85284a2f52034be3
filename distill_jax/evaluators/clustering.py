"""Clustering of embeddings, compared with the classes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from distill_jax.core import ranges
from distill_jax.core.errors import ArgumentError
from distill_jax.evaluators._features import (
    CONTROLS,
    OfEmbedding,
    Part,
    check_positive,
    normalized,
    read_split,
)

WHERE = "clustering"


def k_means(
    z: np.ndarray, k: int, random: np.random.Generator, *, steps: int = 100
) -> tuple[np.ndarray, float]:
    """Returns (cluster `[n]`, sum of squared distances) of Lloyd's algorithm on `z` `[n, d]`.

    Initial centres are drawn with probability proportional to the squared distance to the previous
    ones (Arthur and Vassilvitskii 2007). The iteration ends when no row changes its cluster. An
    empty cluster keeps its centre.
    """
    square = (z * z).sum(axis=1)

    def distances(centres: np.ndarray) -> np.ndarray:
        squared = square[:, None] - 2 * z @ centres.T + (centres * centres).sum(axis=1)[None, :]
        return np.maximum(squared, 0)

    centres = z[random.integers(len(z), size=1)]
    while len(centres) < k:
        near = distances(centres).min(axis=1)
        total = near.sum()
        share = near / total if total > 0 else np.full(len(z), 1 / len(z))
        centres = np.concatenate([centres, z[random.choice(len(z), size=1, p=share)]])
    cluster = np.full(len(z), -1)
    for _ in range(steps):
        moved = distances(centres).argmin(axis=1)
        if (moved == cluster).all():
            break
        cluster = moved
        for c in np.unique(cluster):
            centres[c] = z[cluster == c].mean(axis=0)
    return cluster, float(distances(centres)[np.arange(len(z)), cluster].sum())


def hungarian_accuracy(labels: np.ndarray, cluster: np.ndarray) -> float:
    """Returns the accuracy under the best one-to-one map of clusters to classes, a float.

    Labels and clusters are ints `[n]`, from 0 on.
    """
    from scipy.optimize import linear_sum_assignment  # imported lazily

    table = np.zeros((cluster.max() + 1, labels.max() + 1), np.int64)
    np.add.at(table, (cluster, labels), 1)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return float(table[rows, columns].sum() / len(labels))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clustering(OfEmbedding):
    """k-means on the embeddings of `role` against the classes; see `make`."""

    clusters: int | None
    restarts: int
    seed: int
    max_examples: int | None

    def __call__(
        self, outputs: Mapping[str, Mapping[str, np.ndarray]], batch: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        part: Part = (outputs, batch)
        rows = read_split(part, self.role, self.output, most=self.max_examples)
        z = normalized(rows.z)
        k = min(self.clusters or len(np.unique(rows.label)), len(z))
        random = np.random.Generator(np.random.Philox(key=[self.seed, 0]))
        runs = [k_means(z, k, random) for _ in range(self.restarts)]
        cluster = min(runs, key=lambda run: run[1])[0]
        return {"clustering_accuracy": hungarian_accuracy(rows.label, cluster)}


def make(
    *,
    role: str = "student",
    output: str = "embedding",
    clusters: int | None = None,
    restarts: int = 5,
    seed: int = 0,
    max_examples: int | None = 10_000,
    controls: bool = True,
) -> Clustering:
    """Makes the evaluator of k-means clusters of unit embeddings `[n, d]`.

    Metrics, and those of the controls with the suffixes `_raw` and `_initial`:
      clustering_accuracy: share of examples whose cluster is mapped to their class, by the best
        one-to-one map of all clusters to all classes of the split (Hungarian algorithm).

    Args:
      role: the encoder.
      output: name of the encoder's output; further axes are flattened.
      clusters: number of clusters; by default the number of classes that occur.
      restarts: number of random starts; the result with the smallest sum of squares is used.
      seed: seed of the starts.
      max_examples: maximum number of examples, spread evenly; None for all.
      controls: whether to evaluate the test split also on the raw input and on the encoder at
        initialisation.

    Raises:
      ArgumentError: a number is out of its range.
      NonFiniteError: on evaluation, if an embedding is NaN or infinite.
    """
    check_positive(WHERE, max_examples=max_examples)
    ranges.depths(where=WHERE, restarts=restarts)
    ranges.within(f"[1, {ranges.MOST}]", where=WHERE, whole=True, clusters=clusters)
    if seed < 0:
        raise ArgumentError(f"seed is {seed}", where=f"{WHERE}.seed", hint="at least 0")
    return Clustering(
        role=role,
        output=output,
        clusters=clusters,
        restarts=restarts,
        seed=seed,
        max_examples=max_examples,
        controls=CONTROLS if controls else (),
    )
