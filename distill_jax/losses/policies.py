"""Selection of the examples that a teacher labels: pure NumPy, on the host, once per run.

Letters: n examples of a pool, k classes.
"""

import numpy as np

from distill_jax.core.errors import ArgumentError, nearest


def margin_gains(probs: np.ndarray, *, floor: float = 1e-3) -> np.ndarray:
    """Returns 1 minus the difference of the two largest probabilities, `[n, k] -> [n]`.

    The result is at least `floor`, which deviates from the paper: for an over-confident student
    1 / gain would otherwise be unbounded.
    """
    top = np.partition(np.asarray(probs, np.float64), -2, axis=-1)
    return np.maximum(1 - (top[:, -1] - top[:, -2]), floor)


def entropy(probs: np.ndarray) -> np.ndarray:
    """Returns the entropies of rows in nats, `[n, k] -> [n]`."""
    p = np.asarray(probs, np.float64)
    return -(p * np.log(np.maximum(p, 1e-300))).sum(-1)


def robust_distribution(gains: np.ndarray, *, wrong: float, kappa: float = 1.0) -> np.ndarray:
    """Returns the sampling distribution of RAD (Baykal et al. 2023, arXiv:2210.01213).

    It maximizes over p the least value, over sets S of at most m examples on which the teacher is
    wrong, of `sum_{i not in S} p_i g_i - kappa sum_{i in S} p_i g_i`. With gains in descending
    order and `H_k = sum_{j <= k} 1 / g_j`, `k* = argmax_k (k - (1 + kappa) min(m, k)) / H_k` and
    `p_i = (1 / g_i) / H_{k*}` for the k* largest gains, 0 for the others. If every
    choice has a negative value (all teacher labels may be wrong), all examples are included.

    Args:
      gains: g, positive, `[n]`, in any order.
      wrong: m, an estimate of the number of wrong teacher labels, 0 or more.
      kappa: 0 if a wrong label gains nothing, 1 if it costs its gain.
    """
    n = len(gains)
    order = np.argsort(-gains, kind="stable")
    inverse = 1 / gains[order]
    total, count = np.cumsum(inverse), np.arange(1, n + 1)
    value = (count - (1 + kappa) * np.minimum(wrong, count)) / total
    best = int(np.argmax(value)) + 1 if value.max() > 0 else n
    p = np.zeros(n)
    p[order[:best]] = inverse[:best] / total[best - 1]
    return p


def inclusion_probabilities(p: np.ndarray, *, budget: int) -> np.ndarray:
    """Returns `min(1, c p)` with c chosen such that the sum is `budget`, `[n] -> [n]`.

    If p is positive on fewer than `budget` examples, these get probability 1 and the rest of the
    budget is spread evenly over the others.
    """
    p = np.asarray(p, np.float64)
    n, support = len(p), p > 0
    if support.sum() <= budget:
        left, others = budget - support.sum(), n - support.sum()
        return np.where(support, 1.0, left / others if others else 0.0)
    capped = np.zeros(n, bool)
    while True:
        scaled = np.where(capped, 1.0, p * ((budget - capped.sum()) / p[~capped].sum()))
        above = (scaled > 1) & ~capped
        if not above.any():
            return scaled
        capped |= above


def dependent_rounding(inclusion: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Draws a set of fixed size with the given inclusion probabilities, `[n] -> bool [n]`.

    In a random order, two fractional entries exchange mass until one of them is 0 or 1. This
    preserves the sum and the mean of every entry (Gandhi et al. 2006, "Dependent rounding").
    The sum of `inclusion` must be a whole number.
    """
    x, tiny = np.array(inclusion, np.float64), 1e-9
    fractional = list(random.permutation(np.flatnonzero((x > tiny) & (x < 1 - tiny))))
    while len(fractional) > 1:
        i, j = fractional.pop(), fractional.pop()
        up, down = min(1 - x[i], x[j]), min(x[i], 1 - x[j])
        if random.random() * (up + down) < down:
            x[i], x[j] = x[i] + up, x[j] - up
        else:
            x[i], x[j] = x[i] - down, x[j] + down
        fractional += [m for m in (i, j) if tiny < x[m] < 1 - tiny]
    return x > 0.5


def class_topk(probs: np.ndarray, *, per_class: int, rule: str = "argmax") -> np.ndarray:
    """Marks the most probable examples of each class, `[n, k] -> bool [n]`.

    Args:
      probs: class probabilities of a teacher.
      per_class: number of examples per class.
      rule: "argmax" selects among the examples whose most probable class it is; "column" selects
        among all, so that an example may be marked for several classes.

    Raises:
      ArgumentError: the rule is unknown.
    """
    if rule not in ("argmax", "column"):
        hint = nearest(rule, ("argmax", "column"))
        raise ArgumentError(f"unknown rule {rule!r}", where="rule", hint=hint)
    chosen, winner = np.zeros(len(probs), bool), probs.argmax(-1)
    for label in range(probs.shape[1]):
        score = probs[:, label]
        rows = np.flatnonzero(winner == label) if rule == "argmax" else np.arange(len(probs))
        chosen[rows[np.argsort(-score[rows], kind="stable")[:per_class]]] = True
    return chosen
