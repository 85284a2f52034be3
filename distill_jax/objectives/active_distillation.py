"""Active distillation with a budget of teacher queries (RAD, Baykal et al. 2023, arXiv:2210.01213).

`L = (sum_{i in A} CE(student, y_i) + sum_{i in Q} T^2 KL(teacher || student)) / (|A| + |Q|)`. A is
the set of labelled examples (`data.corrupt.labels_per_class`). Q is a set of `budget` other
examples, drawn once before the first step. A scout, a network trained on A, estimates the gain from
querying each example; `losses.policies` computes the sampling distribution from the gains, and the
rounding.

Deviations: there is one round of queries; the paper's T is 1. Without a survey, outside a run, all
examples count as labelled and as queried.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core.api import Array, Batch, Key, Nets, Objective, PyTree, Terms
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.losses import policies
from distill_jax.losses.classification import cross_entropy, distillation_kl, shift_logits
from distill_jax.objectives._distillation import (
    ask_teacher,
    check_not_negative,
    check_positive,
    check_same_classes,
)
from distill_jax.objectives._labels import shown

POLICIES = ("robust", "margin", "entropy", "uniform")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActiveDistillation(Objective):
    """Hard labels of labelled examples, and soft labels of a teacher for selected examples.

    The selection sets the weight of each example and does not change the value of a term. On
    held-out examples, from which none is selected, both terms are therefore plain losses.

    Attributes:
      num_classes: k; from the data.
      num_examples: n; all example ids are below it; from the data.
      budget: number of queries, at least 0.
      policy: "robust" samples as RAD; "margin" and "entropy" select the examples with the least
        certain scout predictions; "uniform" samples evenly.
      error_rate: estimated share of the pool on which the teacher is wrong, m / n, in [0, 1); for
        "robust". Measure it on held-out data.
      kappa: cost of a wrong teacher label, as a share of its gain, in [0, 1]; for "robust".
      temperature: T of the soft-label term, positive.
      planted: share of the pool, the examples of largest gain, on which the teacher is made wrong.
        This is the case that the robust policy is designed for. A control, 0 in use.
    """

    num_classes: int
    num_examples: int
    budget: int = 100
    policy: str = "robust"
    error_rate: float = 0.1
    kappa: float = 1.0
    temperature: float = 1.0
    planted: float = 0.0

    roles: ClassVar[tuple[str, ...]] = ("student", "teacher", "teacher_scout")
    couples_batch: ClassVar[bool] = False
    needs_dataset_pass: ClassVar[bool] = True

    def __post_init__(self):
        check_positive(temperature=self.temperature)
        check_not_negative(budget=self.budget)
        for name, top in (("error_rate", 1), ("kappa", 1), ("planted", 1)):
            if not 0 <= getattr(self, name) <= top:
                raise ArgumentError(
                    f"{name} is {getattr(self, name)}",
                    where=name,
                    hint="a share in [0, 1]",
                )
        if self.policy not in POLICIES:
            raise ArgumentError(
                f"unknown policy {self.policy!r}",
                where="policy",
                hint=nearest(self.policy, POLICIES),
            )

    def memory(self, key: Key, batch: Batch) -> PyTree:
        n = self.num_examples
        return {
            "hard": jnp.ones(n, jnp.float32),
            "soft": jnp.ones(n, jnp.float32),
            "shift": jnp.zeros(n, jnp.int32),
        }

    def dataset_pass(
        self, nets: Nets, batch: Batch, memory: PyTree, step: Array
    ) -> dict[str, Array]:
        scout, _ = nets("teacher_scout", batch["input"])
        shown = batch["labelled"] if "labelled" in batch else jnp.zeros_like(batch["mask"])
        return {"probs": jax.nn.softmax(scout["logits"]), "labelled": shown}

    def init_memory(
        self,
        rows: Mapping[str, np.ndarray],
        ids: np.ndarray,
        memory: PyTree,
        random: np.random.Generator,
    ) -> PyTree:
        labelled = rows["labelled"] > 0
        pool = np.flatnonzero(~labelled)
        if self.budget > len(pool):
            raise ArgumentError(
                f"a budget of {self.budget} for {len(pool)} examples without a label",
                where="budget",
                hint="a smaller budget, or fewer labels: labels_per_class",
            )
        probs = rows["probs"][pool]
        gains = policies.margin_gains(probs)
        shift = np.zeros(len(labelled), np.int32)
        worst = pool[np.argsort(-gains, kind="stable")[: round(self.planted * len(pool))]]
        shift[worst] = random.integers(1, self.num_classes, len(worst))
        chosen = pool[self._choose(probs, gains, random)]
        scale = len(labelled) / max(labelled.sum() + len(chosen), 1)
        tables = {name: np.zeros_like(table) for name, table in memory.items()}
        tables["hard"][ids[labelled]] = scale
        tables["soft"][ids[chosen]] = scale
        tables["shift"][ids] = shift
        return tables

    def _choose(self, probs, gains, random: np.random.Generator) -> np.ndarray:
        """Returns bool `[n]` over the pool, `budget` of them true."""
        n = len(gains)
        if self.policy in ("margin", "entropy"):
            score = gains if self.policy == "margin" else policies.entropy(probs)
            chosen = np.zeros(n, bool)
            chosen[np.argsort(-score, kind="stable")[: self.budget]] = True
            return chosen
        p = np.full(n, 1 / n)
        if self.policy == "robust":
            p = policies.robust_distribution(gains, wrong=self.error_rate * n, kappa=self.kappa)
        inclusion = policies.inclusion_probabilities(p, budget=self.budget)
        return policies.dependent_rounding(inclusion, random)

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        student, state = nets("student", batch["input"], train=True)
        ids = batch["index"]
        teacher = shift_logits(ask_teacher(nets, batch)["logits"], memory["shift"][ids])
        check_same_classes(student["logits"], teacher)
        hard = shown(batch) * cross_entropy(student["logits"], batch["label"])
        soft = distillation_kl(student["logits"], teacher, temperature=self.temperature)
        return Terms(
            values={"cross_entropy": hard, "distillation": soft},
            weights={"cross_entropy": memory["hard"][ids], "distillation": memory["soft"][ids]},
            state={"student": state},
            logits={"student": student["logits"], "teacher": teacher},
        )


make = ActiveDistillation
