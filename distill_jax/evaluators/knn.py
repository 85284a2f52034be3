"""Nearest-neighbour classification of embeddings."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.core import ranges
from distill_jax.core.errors import ArgumentError
from distill_jax.evaluators._features import (
    CONTROLS,
    OfEmbedding,
    Part,
    Split,
    Whitening,
    accuracies,
    check_positive,
    normalized,
    parts_of,
    read_split,
)

WHERE = "knn"
BLOCK = 1024
"""Number of queries whose similarities to the whole bank are stored at once."""


def nearest(
    queries: np.ndarray, bank: np.ndarray, k: int, *, own: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (positions in the bank, cosine similarities) `[n, k]`, the most similar first.

    Args:
      queries: unit rows `[n, d]`.
      bank: unit rows `[m, d]`.
      k: at most m.
      own: position of each query in the bank `[n]`, excluded from its neighbours; -1 if it is not
        in the bank.
    """
    indices, similar = [], []
    for start in range(0, len(queries), BLOCK):
        block = queries[start : start + BLOCK] @ bank.T
        if own is not None:
            mine = own[start : start + BLOCK]
            rows = np.flatnonzero(mine >= 0)
            block[rows, mine[rows]] = -np.inf
        top = np.argpartition(-block, k - 1, axis=1)[:, :k] if k < block.shape[1] else None
        top = np.tile(np.arange(k), (len(block), 1)) if top is None else np.sort(top, axis=1)
        values = np.take_along_axis(block, top, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        indices.append(np.take_along_axis(top, order, axis=1))
        similar.append(np.take_along_axis(values, order, axis=1))
    return np.concatenate(indices), np.concatenate(similar)


def vote(labels: np.ndarray, similar: np.ndarray, classes: int, temperature: float) -> np.ndarray:
    """Returns the class `[n]` with the most votes; ties go to the lower class.

    Args:
      labels: of the neighbours, `[n, k]`.
      similar: their similarities, `[n, k]`; -inf has no vote.
      classes: number of classes.
      temperature: a vote has weight `exp(similar / temperature)`.
    """
    top = similar.max(axis=1, keepdims=True)
    weight = np.exp((similar - np.where(np.isfinite(top), top, 0)) / temperature)
    n = len(labels)
    flat = (np.arange(n)[:, None] * classes + labels).ravel()
    votes = np.bincount(flat, weights=weight.ravel(), minlength=n * classes)
    return votes.reshape(n, classes).argmax(axis=1)


def own_positions(index: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """Returns the position in `bank` `[m]` of each entry of `index` `[n]`, -1 if absent."""
    order = np.argsort(bank, kind="stable")
    at = np.minimum(np.searchsorted(bank, index, sorter=order), len(bank) - 1)
    return np.where(bank[order[at]] == index, order[at], -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knn(OfEmbedding):
    """Weighted nearest neighbours in the training part; see `make`."""

    k: tuple[int, ...]
    temperature: float
    bank: int | None
    whiten: tuple[float, ...]

    @property
    def parts(self) -> Mapping[str, int | None]:
        chosen = {"held_out": self.bank} if len(self.whiten) > 1 else {}
        return {"train": self.bank, **chosen}

    def __call__(
        self,
        outputs: Mapping[str, Mapping[str, np.ndarray]],
        batch: Mapping[str, np.ndarray],
        *,
        parts: Mapping[str, Part] | None = None,
        split: str = "test",
    ) -> dict[str, Any]:
        read = [
            read_split(part, self.role, self.output, most=self.bank)
            for part in parts_of(parts, *self.parts, where=WHERE)
        ]
        bank, query = read[0], read_split((outputs, batch), self.role, self.output)
        own = own_positions(query.index, bank.index) if split == "train" else None
        metrics = self._classify(query, bank, own)
        if self.whiten:
            whitening, floor = Whitening.fit(bank.z), self.whiten[0]

            def classify(part: Split, own: np.ndarray | None, floor: float) -> dict[str, float]:
                asked, kept = (p._replace(z=whitening(p.z, floor)) for p in (part, bank))
                return self._classify(asked, kept, own)

            if len(read) > 1:
                tried = {x: classify(read[1], None, x)["knn_accuracy"] for x in self.whiten}
                floor = max(tried, key=lambda x: tried[x])
            found = classify(query, own, floor)
            metrics |= {key.replace("_", "_whitened_", 1): x for key, x in found.items()}
            metrics["knn_whitened_floor"] = floor
        return metrics

    def _classify(self, query: Split, bank: Split, own: np.ndarray | None) -> dict[str, float]:
        most = len(bank.z) if own is None else max(1, len(bank.z) - 1)
        asked, kept = (normalized(part.z).astype(np.float32) for part in (query, bank))
        where, similar = nearest(asked, kept, min(max(self.k), most), own=own)
        classes = int(max(bank.label.max(), query.label.max())) + 1
        metrics: dict[str, float] = {}
        for i, k in enumerate(self.k):
            said = vote(bank.label[where[:, :k]], similar[:, :k], classes, self.temperature)
            plain, balanced = accuracies(query.label, said)
            name = "knn" if i == 0 else f"knn{k}"
            metrics |= {f"{name}_accuracy": plain, f"{name}_balanced_accuracy": balanced}
        return metrics


def make(
    *,
    role: str = "student",
    output: str = "embedding",
    k: int | tuple[int, ...] = 20,
    temperature: float = 0.07,
    bank: int | None = 50_000,
    whiten: float | tuple[float, ...] = (),
    controls: bool = True,
) -> Knn:
    """Makes the evaluator of weighted nearest neighbours (Wu et al. 2018, arXiv:1805.01978).

    Embeddings `[n, d]` are scaled to length 1. The k training examples with the largest cosine vote
    for their classes with weights exp(cosine / temperature) (Caron et al. 2021, arXiv:2104.14294,
    appendix F.4). An example is never its own neighbour. On small data, k should stay below the
    number of examples of a class.

    The cosine of embeddings whose variance lies in few directions sees these alone. With `whiten`
    the votes are also taken after centring and principal component whitening by the training part
    (Su et al. 2021, arXiv:2103.15316); raw inputs gain from it too.

    Metrics, and those of the controls with the suffixes `_raw` and `_initial`:
      knn_accuracy, knn_balanced_accuracy: with the first k; the mean over the classes that occur.
      knn<k>_accuracy, knn<k>_balanced_accuracy: with each further k.
      knn_whitened_accuracy and the like, knn_whitened_floor: with `whiten`, and the chosen floor.

    Args:
      role: the encoder; `target` for its moving average.
      output: name of the encoder's output; further axes are flattened.
      k: number of neighbours, or several; the whole bank if it is smaller.
      temperature: of the votes.
      bank: most training examples to compare with, spread evenly; none for all.
      whiten: smallest variance as a share of the largest, below which directions are not made
        larger; of several, the one with the highest held-out accuracy. None for no whitening.
      controls: whether to evaluate the test split also on the raw input and on the encoder at
        initialisation.

    Raises:
      ArgumentError: a number is not positive, a floor not in (0, 1), or several floors and an empty
        held-out part.
      NonFiniteError: on evaluation, if an embedding is NaN or infinite.
    """
    ks = (k,) if isinstance(k, int) else tuple(k)
    if not ks or not all(isinstance(x, int) and x > 0 for x in ks):
        raise ArgumentError(f"k is {k}", where=f"{WHERE}.k", hint="positive, or several: (20, 5)")
    check_positive(WHERE, temperature=temperature, bank=bank)
    ranges.within("(0, 1)", where=WHERE, whiten=whiten)
    floors = tuple(whiten) if isinstance(whiten, Sequence) else (whiten,)
    return Knn(
        role=role,
        output=output,
        k=ks,
        temperature=temperature,
        bank=bank,
        whiten=floors,
        controls=CONTROLS if controls else (),
    )
