"""Fidelity of one classifier to another."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from distill_jax.core.errors import ArgumentError
from distill_jax.evaluators._logits import log_softmax, read_labels, read_logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """Fidelity of `role` to `reference`; see `make`."""

    role: str = "student"
    reference: str = "teacher"
    unlabelled = True

    @property
    def outputs(self) -> Mapping[str, tuple[str, ...]]:
        return {self.role: ("logits",), self.reference: ("logits",)}

    def __call__(
        self, outputs: Mapping[str, Mapping[str, np.ndarray]], batch: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        logits, reference = (read_logits(outputs, r) for r in (self.role, self.reference))
        if logits.shape != reference.shape:
            raise ArgumentError(
                f"{self.role} has logits {logits.shape}, {self.reference} has {reference.shape}",
                where="agreement",
                hint="agreement needs two networks over the same classes",
            )
        labels = read_labels(batch, logits)
        log_p, log_q = log_softmax(reference), log_softmax(logits)
        choice = reference.argmax(axis=1)
        same, right = logits.argmax(axis=1) == choice, choice == labels
        known = np.asarray(batch.get("labelled", np.ones(len(labels)))) > 0
        metrics = {
            "agreement": float(same.mean()),
            "kl": float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()),
        }
        for name, part in (("right", right & known), ("wrong", ~right & known)):
            if part.any():
                metrics[f"agreement_reference_{name}"] = float(same[part].mean())
        return metrics


def make(*, role: str = "student", reference: str = "teacher") -> Agreement:
    """Makes the evaluator of the fidelity of one network to another (Stanton et al., 2021).

    Metrics:
      agreement: share of examples with the same top class; ties go to the lower class.
      kl: mean KL(reference || role) at temperature 1, in nats.
      agreement_reference_right, agreement_reference_wrong: `agreement` among the examples that
        the reference classifies correctly, or incorrectly; omitted if there are none. Examples
        without a known class count in neither.

    Args:
      role: the network to measure.
      reference: the network it is compared with.

    Raises:
      ArgumentError: `role` and `reference` are equal.
      NonFiniteError: on evaluation, if a logit is NaN or infinite.
    """
    if role == reference:
        raise ArgumentError(
            f"role and reference are both {role!r}",
            where="agreement",
            hint="name two different roles",
        )
    return Agreement(role=role, reference=reference)
