"""Evaluation of the teacher's share in a weighting."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from distill_jax.core.errors import ArgumentError, NonFiniteError
from distill_jax.evaluators._logits import log_softmax, read_labels, read_logits
from distill_jax.evaluators.ctr import area_under_roc

WHERE = "trust"


def teacher_share(weights: np.ndarray) -> np.ndarray:
    """Returns the ratio `[n]`: the last of the weights `[n, s]` over their sum.

    If the sum is not positive, no loss term counts, and the last weight itself is returned.
    """
    total = weights.sum(axis=1)
    return weights[:, -1] / np.where(total > 0, total, 1)


def teacher_margin(teacher: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns p_y - max_{c != y} p_c `[n]` of the teacher's logits `[n, k]`, k > 1."""
    probs = np.exp(log_softmax(teacher))
    rows = np.arange(len(labels))
    own = probs[rows, labels]
    probs[rows, labels] = -np.inf
    return own - probs.max(axis=1)


def ranks(values: np.ndarray) -> np.ndarray:
    """Returns the ranks `[n]` of values `[n]` from 1; ties get their mean rank."""
    _, group = np.unique(values, return_inverse=True)
    size = np.bincount(group)
    return (np.cumsum(size) - (size - 1) / 2)[group]


def four_groups(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, quantile: float
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, bool `[n]`) of "right_far", "right_near", "wrong_far" and "wrong_near".

    Among the examples that the teacher classifies correctly, and incorrectly, each group is the
    share `quantile` with the largest or the smallest distance between student and teacher
    probabilities (logits `[n, k]`): at least one example, including ties with the last one. Empty
    groups are omitted.
    """
    gap = np.exp(log_softmax(student)) - np.exp(log_softmax(teacher))
    distance = np.sqrt((gap**2).sum(axis=1))
    right = teacher.argmax(axis=1) == labels
    for name, part in (("right", right), ("wrong", ~right)):
        ordered = np.sort(distance[part])
        if len(ordered):
            m = max(1, round(quantile * len(ordered)))
            yield f"{name}_far", part & (distance >= ordered[-m])
            yield f"{name}_near", part & (distance <= ordered[m - 1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trust:
    """The ratio of a weighting compared with the teacher's correctness; see `make`."""

    quantile: float = 0.2

    @property
    def outputs(self) -> Mapping[str, tuple[str, ...]]:
        return {"example_weights": ("weights", "student", "teacher")}

    def __call__(
        self, outputs: Mapping[str, Mapping[str, np.ndarray]], batch: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        arrays = outputs["example_weights"]
        if np.ndim(arrays["weights"]) != 2:
            what = "are of tokens" if np.ndim(arrays["weights"]) == 3 else "have shape"
            raise ArgumentError(
                f"the weights {what} {np.shape(arrays['weights'])}",
                where=WHERE,
                hint="trust is measured on weights of examples; leave the evaluator out",
            )
        student, teacher = (_logits_of(arrays, role) for role in ("student", "teacher"))
        if student.shape != teacher.shape or student.shape[1] < 2:
            raise ArgumentError(
                f"the student has logits {student.shape}, the teacher has {teacher.shape}",
                where=WHERE,
                hint="trust is measured between two networks over the same two or more classes",
            )
        labels = read_labels(batch, student)
        ratio = teacher_share(_read_weights(arrays, len(labels)))
        wrong = teacher.argmax(axis=1) != labels
        metrics = {"ratio_mean": float(ratio.mean()), "ratio_std": float(ratio.std())}
        groups = dict(four_groups(student, teacher, labels, self.quantile))
        groups |= {"right": ~wrong, "wrong": wrong}
        for flag, names in (
            ("label_noisy", ("noisy", "clean")),
            ("outlier", ("outlier", "inlier")),
        ):
            if (marked := read_flag(batch, flag, len(labels))) is not None and _both(marked):
                groups |= {names[0]: marked, names[1]: ~marked}
        metrics |= {f"ratio_{n}": float(ratio[g].mean()) for n, g in groups.items() if g.any()}
        for name, fault in (
            ("teacher_wrong_auc", wrong),
            ("damaged_auc", read_flag(batch, "teacher_shift", len(labels))),
        ):
            if fault is not None and _both(fault):
                metrics[name] = area_under_roc(-ratio, fault)
        margin = teacher_margin(teacher, labels)
        if np.ptp(ratio) > 0 and np.ptp(margin) > 0:
            correlation = np.corrcoef(ranks(ratio), ranks(margin))[0, 1]
            metrics["ratio_margin_correlation"] = float(correlation)
        return metrics


def read_flag(batch: Mapping[str, Any], name: str, n: int) -> np.ndarray | None:
    """Returns the flag `[n]` as bool, None if absent; raises ArgumentError on a wrong shape."""
    if name not in batch:
        return None
    flag = np.asarray(batch[name])
    if flag.shape != (n,) or flag.dtype.kind not in "biu":
        raise ArgumentError(
            f"flags have shape {flag.shape} and type {flag.dtype}",
            where=name,
            hint=f"integers of shape {(n,)} are needed",
        )
    return flag != 0


def _both(mask: np.ndarray) -> bool:
    return bool(mask.any() and not mask.all())


def _logits_of(arrays: Mapping[str, np.ndarray], role: str) -> np.ndarray:
    logits = {"logits": arrays[role]} if role in arrays else {}
    return read_logits({f"trust, {role}": logits}, f"trust, {role}")


def _read_weights(arrays: Mapping[str, np.ndarray], n: int) -> np.ndarray:
    weights = np.asarray(arrays["weights"], np.float64)
    if weights.ndim != 2 or len(weights) != n or not weights.size:
        raise ArgumentError(
            f"weights have shape {weights.shape}",
            where=WHERE,
            hint=f"one weight for each of {n} examples and each signal is needed",
        )
    finite = np.isfinite(weights).all(axis=1)
    if not finite.all():
        raise NonFiniteError(
            f"weights of {np.count_nonzero(~finite)} of {n} examples are not finite, the first "
            f"at position {int(np.argmin(finite))}",
            where=WHERE,
            hint="the weighting diverged: lower its learning rate",
        )
    return weights


def make(*, quantile: float = 0.2) -> Trust:
    """Makes the evaluator of a weighting's ratio, the teacher's share of an example's weights.

    The inputs are the weights `[n, s]` of the loss terms, the teacher's last, and the logits
    `[n, k]` of student and teacher as given to the weighting. The ratio is the last weight over the
    sum of all, or the last weight itself if the sum is not positive. Means are over examples.
    Metrics that are undefined because a group or its complement is empty are omitted.

    Metrics:
      ratio_mean, ratio_std: over all examples.
      ratio_right, ratio_wrong: mean where the teacher's top class is the label, or is not.
      ratio_right_far, ratio_right_near, ratio_wrong_far, ratio_wrong_near: mean over the share
        `quantile` within either of those that has the largest or the smallest Euclidean distance
        between the probabilities of student and teacher (Hu et al., 2024, arXiv:2312.15112,
        table 4), ties with the last one included.
      teacher_wrong_auc: area under the ROC curve of 1 - ratio for the teacher being wrong: the
        share of pairs of a wrong and a right prediction with a lower ratio for the wrong one; ties
        count one half.
      ratio_margin_correlation: Spearman's rank correlation of the ratio with the teacher's margin
        p_y - max_{c != y} p_c; omitted if either is constant.

    For optional flags of the data:
      damaged_auc: as `teacher_wrong_auc`, for `teacher_shift` != 0.
      ratio_noisy, ratio_clean: mean over the changed labels (`label_noisy`) and the others.
      ratio_outlier, ratio_inlier: mean over noise images (`outlier`) and the others.

    Args:
      quantile: size of a group, as a share of the correct or incorrect examples.

    Raises:
      ArgumentError: `quantile` is outside (0, 0.5]; on evaluation, if shapes do not fit.
      NonFiniteError: on evaluation, if a weight or a logit is NaN or infinite.
    """
    if not 0 < quantile <= 0.5:
        raise ArgumentError(
            f"quantile is {quantile}", where=f"{WHERE}.quantile", hint="0 < x <= 0.5"
        )
    return Trust(quantile=quantile)
