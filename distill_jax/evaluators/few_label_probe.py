"""Accuracy of a linear classifier of frozen embeddings, trained on a few labels."""

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
    Scaler,
    accuracies,
    check_positive,
    fit_logistic,
    parts_of,
    read_split,
)

WHERE = "few_label_probe"


def draw(labels: np.ndarray, *, seed: int, number: int) -> np.ndarray:
    """Returns the rank `[n]`, from 0, of each example among those of its class in a random order.

    Ranks below m select m labels per class, so smaller sets are nested in larger ones.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, number]))
    order = random.random(len(labels))
    ranks = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        ranks[members[np.argsort(order[members], kind="stable")]] = np.arange(len(members))
    return ranks


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewLabelProbe(OfEmbedding):
    """A linear classifier trained on a few labels, averaged over draws; see `make`."""

    per_class: tuple[int, ...]
    percent: tuple[float, ...]
    draws: int
    seed: int
    c: float
    max_examples: int | None

    @property
    def parts(self) -> Mapping[str, int | None]:
        return {"train": self.max_examples}

    def __call__(
        self,
        outputs: Mapping[str, Mapping[str, np.ndarray]],
        batch: Mapping[str, np.ndarray],
        *,
        parts: Mapping[str, Part] | None = None,
        split: str = "test",
    ) -> dict[str, Any]:
        [given] = parts_of(parts, "train", where=WHERE)
        train = read_split(given, self.role, self.output, most=self.max_examples)
        query = read_split((outputs, batch), self.role, self.output)
        k = int(max(train.label.max(), query.label.max())) + 1
        scaler = Scaler.fit(train.z)
        z, asked = scaler(train.z), scaler(query.z)
        own = np.bincount(train.label, minlength=k)
        sizes = {f"{m}_per_class": np.full(k, m) for m in self.per_class}
        for share in self.percent:
            sizes[f"{share:g}_percent"] = np.maximum(1, np.rint(own * share / 100).astype(int))
        scores: dict[str, list[tuple[float, float]]] = {name: [] for name in sizes}
        for number in range(self.draws):
            ranks = draw(train.label, seed=self.seed, number=number)
            for name, size in sizes.items():
                rows = np.flatnonzero(ranks < size[train.label])
                linear = fit_logistic(z[rows], train.label[rows], k, c=self.c)
                scores[name].append(accuracies(query.label, linear.predict(asked)))
        metrics: dict[str, Any] = {}
        for name, pairs in scores.items():
            plain, balanced = np.array(pairs).T
            metrics[f"few_label_accuracy_{name}"] = float(plain.mean())
            metrics[f"few_label_balanced_accuracy_{name}"] = float(balanced.mean())
            if self.draws > 1:
                error = plain.std(ddof=1) / np.sqrt(self.draws)
                metrics[f"few_label_se_{name}"] = float(error)
            metrics[f"few_label_draws_{name}"] = plain
        return metrics


def make(
    *,
    role: str = "student",
    output: str = "embedding",
    per_class: tuple[int, ...] = (1, 2, 5, 10),
    percent: tuple[float, ...] = (),
    draws: int = 10,
    seed: int = 0,
    c: float = 1.0,
    max_examples: int | None = 20_000,
    controls: bool = True,
) -> FewLabelProbe:
    """Makes the evaluator of linear probes from a few labels of each class.

    Like `probe`, on a class-balanced random subset of the training labels and with a fixed
    penalty: no hyperparameter is selected, so no further label is read. Embeddings are standardised
    by all training examples, which needs no labels. A class with too few examples uses all of them.
    The draws depend on `seed` and the training labels alone, so they are the same for every
    encoder, state and control, and differences are paired. Smaller subsets are nested in larger
    ones.

    Metrics, and those of the controls with the suffixes `_raw` and `_initial`, for NAME in
    "<m>_per_class" and "<s>_percent":
      few_label_accuracy_NAME, few_label_balanced_accuracy_NAME: mean over the draws.
      few_label_se_NAME: standard error of the former over the draws; absent for one draw. It does
        not include the spread over training seeds.
      few_label_draws_NAME: array `[draws]` of accuracies.

    Args:
      role: the encoder.
      output: name of the encoder's output; further axes are flattened.
      per_class: numbers of labels of each class.
      percent: shares of the labels of each class, in percent, at least one label each.
      draws: number of random subsets.
      seed: seed of the draws.
      c: inverse penalty strength, see `probe`.
      max_examples: most training examples to draw from, spread evenly; none for all.
      controls: whether to evaluate the test split also on the raw input and on the encoder at
        initialisation.

    Raises:
      ArgumentError: a number is out of its range.
      NonFiniteError: on evaluation, if an embedding is NaN or infinite.
    """
    check_positive(WHERE, draws=draws, c=c, max_examples=max_examples)
    ranges.depths(where=WHERE, draws=draws)
    if not all(isinstance(m, int) and m > 0 for m in per_class):
        raise ArgumentError(
            f"per_class is {per_class}", where=f"{WHERE}.per_class", hint="1 or more"
        )
    if not all(0 < s <= 100 for s in percent):
        raise ArgumentError(f"percent is {percent}", where=f"{WHERE}.percent", hint="0 < x <= 100")
    if not per_class and not percent:
        raise ArgumentError("no number of labels", where=f"{WHERE}.per_class", hint="(1, 2, 5, 10)")
    if seed < 0:
        raise ArgumentError(f"seed is {seed}", where=f"{WHERE}.seed", hint="at least 0")
    return FewLabelProbe(
        role=role,
        output=output,
        per_class=tuple(per_class),
        percent=tuple(percent),
        draws=draws,
        seed=seed,
        c=c,
        max_examples=max_examples,
        controls=CONTROLS if controls else (),
    )
