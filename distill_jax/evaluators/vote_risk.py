"""The risk of a label source's votes, by a network that learned from all (POLAR, Zhao et al. 2023).

arXiv:2306.16564, section 4: the risk of a vote is 1 minus the probability that the network gives
to it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from distill_jax.core import ranges
from distill_jax.core.errors import ArgumentError
from distill_jax.evaluators._logits import log_softmax, read_labels, read_logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class VoteRisk:
    """Risk and error of the votes of one source; see `make`."""

    role: str = "student"
    source: int | None = None
    bins: int = 10
    riskiest: float = 0.1

    @property
    def outputs(self) -> Mapping[str, tuple[str, ...]]:
        return {self.role: ("logits",)}

    def __call__(
        self, outputs: Mapping[str, Mapping[str, np.ndarray]], batch: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        logits = read_logits(outputs, self.role)
        labels, k = read_labels(batch, logits), logits.shape[1]
        if "votes" not in batch:  # shapes alone: a run asks which metrics there are
            return dict.fromkeys(("vote_error", "risk_ece", "vote_error_rest"), 0.0)
        votes = np.asarray(batch["votes"])
        source = votes.shape[1] - 1 if self.source is None else self.source
        if source >= votes.shape[1]:
            what = f"source is {source}, and there are {votes.shape[1]} sources"
            raise ArgumentError(what, where="source", hint="they are counted from 0")
        counts = (votes[:, :, None] == np.arange(k)).sum(1)
        metrics = {"majority_accuracy": float((counts.argmax(1) == labels).mean())}
        vote = votes[:, source]
        some = vote >= 0
        if not some.any():
            return metrics
        p = np.exp(log_softmax(logits))[some, vote[some]]
        risk, wrong = 1 - p, (vote != labels)[some].astype(np.float64)
        which = np.minimum((risk * self.bins).astype(int), self.bins - 1)
        gaps = [abs((risk - wrong)[which == i].sum()) for i in range(self.bins)]
        left = np.argsort(-risk, kind="stable")[round(self.riskiest * len(risk)) :]
        metrics |= {
            "vote_error": float(wrong.mean()),
            "vote_error_rest": float(wrong[left].sum() / len(wrong)),
            "risk_ece": float(sum(gaps) / len(risk)),
        }
        if np.ptp(risk) > 0 and np.ptp(wrong) > 0:
            metrics["risk_correlation"] = float(np.corrcoef(risk, wrong)[0, 1])
        return metrics


def make(
    *, role: str = "student", source: int | None = None, bins: int = 10, riskiest: float = 0.1
) -> VoteRisk:
    """Makes the evaluator of a source's risk; the batch has `votes` int `[n, m]`, -1 for none.

    Metrics:
      vote_error: share of wrong votes of the source.
      risk_ece: expected calibration error of the risk for the vote being wrong, in bins of equal
        width.
      risk_correlation: Pearson's correlation of risk and error; left out if either is constant.
      vote_error_rest: share of votes that are wrong and not among the riskiest: the error after
        the riskiest votes are corrected. Correcting as many at random leaves
        `(1 - riskiest) vote_error` on average.
      majority_accuracy: of the class with most votes of all sources; ties go to the lower class.

    Args:
      role: the network.
      source: number of the source, from 0; the last by default.
      bins: number of bins, at least 1.
      riskiest: share of votes to correct, in (0, 1).
    """
    ranges.sizes(bins=bins)
    ranges.within("(0, 1)", riskiest=riskiest)
    ranges.counts(source=source)
    return VoteRisk(role=role, source=source, bins=bins, riskiest=riskiest)
