"""Lists of digits to be ranked for a query image; relevance is nearness of the classes.

A list is a query and other images of its part of the digits of scikit-learn (see `digits`), drawn
without replacement. A candidate of class c has for a query of class a the relevance
`max(0, 3 - |a - c|)`. Images of the parts are disjoint (60, 20 and 20 %).

The first stage is a weak ranker, whose scores can say which candidates are easy: a bilinear form of
images averaged to 4 x 4 pixels, the least-squares fit of the relevances among a few training
images.
"""

from typing import Any

import numpy as np

from distill_jax.core import ranges
from distill_jax.core.api import Dataset, Provenance
from distill_jax.data import digits, source

GRADES = 3
"""Largest relevance, of candidates of the query's class."""

FITTED = 100
"""Training images from which the first stage is fitted."""

SHARES = (0.6, 0.2)
"""Shares of the images in the training and the held-out part."""


def make(
    *, lists: int = 12_800, measured: int = 400, candidates: int = 20, split_seed: int = 0
) -> Dataset:
    """Returns lists with relevances `label` float32 `[n]` and scores `first_stage` float32 `[n]`.

    `input` is a dict of `query` float32 `[64]` and `candidates` float32 `[n, 64]`, pixels in
    [0, 1]. The task is "regression": a network gives each candidate a score, `logits` `[b, n]`.

    Args:
      lists: number of lists of the training part.
      measured: number of lists of the held-out and of the test part.
      candidates: n, at most 300.
      split_seed: seed of the division of images, of the lists and of the first stage; in a config
        "run" stands for the seed of the run.

    Raises:
      DataUnavailable: scikit-learn is not installed.
    """
    ranges.sizes(lists=lists, measured=measured)
    ranges.within("[2, 300]", whole=True, candidates=candidates)
    ranges.counts(split_seed=split_seed)
    whole = digits.make(held_out=0.0)
    read: list[Any] = [part.read(np.arange(len(part))) for part in (whole.train, whole.test)]
    images, digit = (np.concatenate([rows[key] for rows in read]) for key in ("input", "label"))
    random = np.random.Generator(np.random.Philox(key=[split_seed, 13]))
    order = random.permutation(len(digit))
    cuts = np.cumsum([int(share * len(digit)) for share in SHARES])
    names = ("train", "held_out", "test")
    members: dict[str, np.ndarray] = dict(zip(names, np.split(order, cuts), strict=True))
    form = first_stage(images[members["train"][:FITTED]], digit[members["train"][:FITTED]])

    def part(name: str, count: int) -> "Lists":
        rows = [random.choice(members[name], candidates + 1, replace=False) for _ in range(count)]
        title = f"scikit-learn digits, lists of {candidates} ({name}, split {split_seed})"
        return Lists(images, digit, np.stack(rows), form, whole.train.provenance, title)

    return Dataset(
        train=part("train", lists),
        held_out=part("held_out", measured),
        test=part("test", measured),
        classes=tuple(f"candidate_{i + 1}" for i in range(candidates)),
        task="regression",
    )


class Lists:
    """Queries with candidates.

    Args:
      images: uint8 `[m, 8, 8, 1]`.
      digit: classes `[m]`.
      rows: images of each list, int `[lists, n + 1]`, the query first.
      form: the first stage, `[16, 16]`.
      origin: provenance of the images.
      name: of this part.
    """

    def __init__(
        self,
        images: np.ndarray,
        digit: np.ndarray,
        rows: np.ndarray,
        form: np.ndarray,
        origin: Provenance,
        name: str,
    ):
        self.images, self.rows = images, rows
        self.labels = relevance(digit[rows[:, :1]], digit[rows[:, 1:]])
        low = digits.pooled(images)
        self.scores = np.einsum("lp,pq,lnq->ln", low[rows[:, 0]], form, low[rows[:, 1:]])
        self.scores = self.scores.astype(np.float32)
        arrays = {"images": images, "rows": rows, "label": self.labels}
        sha = source.checksum(arrays)
        self.provenance = origin._replace(name=name, n=len(rows), sha256=sha)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: np.ndarray) -> dict[str, Any]:
        """Returns `input`, `label` and `first_stage` of the lists at `indices` `[b]`."""
        pixels = self.images[self.rows[indices]].reshape(len(indices), -1, 64) / np.float32(255)
        return {
            "input": {"query": pixels[:, 0], "candidates": pixels[:, 1:]},
            "label": self.labels[indices],
            "first_stage": self.scores[indices],
        }


def relevance(query: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Returns `max(0, 3 - |a - c|)` of classes that broadcast, float32."""
    apart = np.abs(query.astype(int) - candidates.astype(int))
    return np.maximum(0, GRADES - apart).astype(np.float32)


def first_stage(images: np.ndarray, digit: np.ndarray, *, ridge: float = 1e-2) -> np.ndarray:
    """Returns the form M `[16, 16]` that minimizes `||X M X' - R||^2`, with a ridge.

    Args:
      images: uint8 `[m, 8, 8, 1]`; X are their pooled pixels.
      digit: classes `[m]`; R are the relevances of all pairs.
      ridge: added to the diagonal of `X' X`.
    """
    x = digits.pooled(images)
    left = np.linalg.solve(x.T @ x + ridge * np.eye(16), x.T)
    return left @ relevance(digit[:, None], digit[None]) @ left.T
