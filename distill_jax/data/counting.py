"""A label source that counts: SS3 (Burdisso et al. 2019, arXiv:1905.08772, section 3).

The confidence that a word gives to a class is the product of three numbers:

* the local value, `(P(w | c) / max_w' P(w' | c))^smoothness`;
* the significance, how far the local value stands out from those of the other classes,
  `(tanh(4 (lv - median) / (significance MAD) - 2) + 1) / 2`, MAD the median absolute deviation;
* the sanction for words that are significant for other classes too,
  `((k - 1 - s) / ((k - 1) (s + 1)))^sanction`, with s the sum of their significances there.

The confidences of the words of an example add up, one word at a time if need be.
"""

import dataclasses

import numpy as np

from distill_jax.core import ranges


@dataclasses.dataclass(frozen=True)
class Counting:
    """A fitted classifier; `fit` makes one.

    Attributes:
      confidence: of each word for each class, `[v, k]`, in [0, 1].
    """

    confidence: np.ndarray

    def scores(self, counts: np.ndarray) -> np.ndarray:
        """Returns the sum of confidences for each class, `[n, k]`, of counts of words `[n, v]`."""
        return np.asarray(counts, np.float64) @ self.confidence


def fit(
    counts: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    smoothness: float = 0.45,
    significance: float = 0.5,
    sanction: float = 1.0,
) -> Counting:
    """Counts words by class.

    Args:
      counts: how often each word occurs in each example, `[n, v]`.
      labels: classes `[n]`.
      num_classes: k, at least 2.
      smoothness: exponent of the local value, above 0; near 0 makes rare words equal to frequent.
      significance: how far a value must stand out, above 0.
      sanction: exponent of the sanction, 0 or more; 0 leaves it out.
    """
    ranges.within("[2, inf)", whole=True, num_classes=num_classes)
    ranges.within("(0, inf)", smoothness=smoothness, significance=significance)
    ranges.within("[0, inf)", sanction=sanction)
    words = np.asarray(counts, np.float64)
    by_class = np.stack([words[labels == c].sum(0) for c in range(num_classes)], axis=1)
    local = (by_class / np.maximum(by_class.max(0), 1)) ** smoothness
    local[by_class == 0] = 0
    middle = np.median(local, axis=1, keepdims=True)
    spread = np.median(np.abs(local - middle), axis=1, keepdims=True)
    scale = significance * np.maximum(spread, np.finfo(np.float64).tiny)
    apart = np.clip((local - middle) / scale, -1e3, 1e3)
    significant = (np.tanh(4 * apart - 2) + 1) / 2
    elsewhere = significant.sum(1, keepdims=True) - significant
    most = num_classes - 1
    sanctioned = (np.maximum(most - elsewhere, 0) / (most * (elsewhere + 1))) ** sanction
    return Counting(local * significant * sanctioned)
