"""Invariant risk: equal, or simultaneously optimal, risks in several environments.

`L = (sum_e R_e + penalty_weight P) / max(1, penalty_weight)`, where `R_e` is the mean cross-entropy
in environment e. P is the penalty of IRMv1 (Arjovsky et al. 2019, arXiv:1907.02893),
`sum_e ||d/ds R_e(s logits)||^2` at s = 1, or of V-REx (Krueger et al. 2021, arXiv:2003.00688),
`Var_e R_e`. The division keeps the size of the gradient, as in the authors' programs and in that of
RFC (arXiv:2203.15516), whose features are fine-tuned with this loss.

Environments are given by the data as `domain`. Penalties are computed per batch. The IRMv1 penalty
of a small batch is biased upwards, so use large batches.
"""

import dataclasses
from typing import ClassVar

import jax

from distill_jax.core import ranges
from distill_jax.core.api import Array, Batch, Nets, Objective, PyTree, Terms
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.losses.classification import cross_entropy
from distill_jax.losses.groups import environment_risks, irm_penalty, vrex_penalty
from distill_jax.objectives._distillation import check_not_negative

PENALTIES = ("irm", "vrex")


def domain_of(batch: Batch) -> Array:
    """Returns the environment of each example, int `[b]`.

    Raises:
      ArgumentError: the data have no environments.
    """
    if "domain" not in batch:
        raise ArgumentError(
            "the examples have no domain",
            where="dataset",
            hint="data with domains, such as coloured_digits or rotated_digits",
        )
    return batch["domain"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Invariance(Objective):
    """Terms `cross_entropy` and `penalty`.

    Attributes:
      penalty: "irm" or "vrex".
      penalty_weight: 0 or more; the literature sweeps 10 to 1e5.
      environments: E; domains with higher numbers are ignored.
    """

    penalty: str = "irm"
    penalty_weight: float = 100.0
    environments: int = 2

    roles: ClassVar[tuple[str, ...]] = ("student",)
    couples_batch: ClassVar[bool] = True

    def __post_init__(self):
        check_not_negative(penalty_weight=self.penalty_weight)
        if self.penalty not in PENALTIES:
            raise ArgumentError(
                f"unknown penalty {self.penalty!r}",
                where="penalty",
                hint=nearest(self.penalty, PENALTIES),
            )
        most = f"[0, {ranges.MOST}]"
        ranges.within(most, environments=self.environments)
        if self.environments < 2:
            raise ArgumentError(
                f"environments is {self.environments}",
                where="environments",
                hint="at least 2: one environment has nothing to be compared with",
            )

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        student, state = nets("student", batch["input"], train=True)
        logits, label, mask = student["logits"], batch["label"], batch["mask"]
        member = jax.nn.one_hot(domain_of(batch), self.environments, dtype=logits.dtype)
        value = cross_entropy(logits, label)
        if self.penalty == "irm":
            penalty = irm_penalty(logits, label, member, mask)
        else:
            penalty = vrex_penalty(value, member, mask)
        size = max(1.0, self.penalty_weight)
        return Terms(
            values={"cross_entropy": environment_risks(value, member, mask), "penalty": penalty},
            coef={"cross_entropy": 1 / size, "penalty": self.penalty_weight / size},
            state={"student": state},
            logits={"student": logits},
        )


make = Invariance
