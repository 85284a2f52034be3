"""Distillation with mined unlabelled examples (SSLD, Cui et al. 2021, arXiv:2103.05959).

The loss is `objectives.divergence`, by default half of Jeffreys' divergence without labels. In a
survey before the first step, the teacher scores the examples without a label
(`data.corrupt.labels_per_class`), and the `per_class` highest of each class are kept. The loss is
the mean over these and the labelled examples. If no label is hidden, all examples are the pool.

Deviations: the paper does not specify whether an example may be kept for several classes, see
`rule`; near-duplicates of the evaluation data are not removed.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core.api import Array, Batch, Key, Nets, Outputs, PyTree
from distill_jax.core.errors import ArgumentError
from distill_jax.losses.policies import class_topk
from distill_jax.objectives._distillation import Signals, damaged
from distill_jax.objectives.divergence import Divergence


@dataclasses.dataclass(frozen=True, kw_only=True)
class SSLD(Divergence):
    """The loss term `divergence`, with weight 1 for kept examples and 0 for others.

    Attributes:
      num_examples: n; all example ids are below it; from the data.
      per_class: number of examples kept per class, at least 0; None keeps the whole pool.
      rule: "argmax", the highest among the examples that the teacher assigns to the class, or
        "column", the highest among all examples.
    """

    num_examples: int
    per_class: int | None = None
    rule: str = "argmax"

    needs_dataset_pass: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.per_class is not None and self.per_class < 0:
            raise ArgumentError(
                f"per_class is {self.per_class}",
                where="per_class",
                hint="0 or more, or none for the whole pool",
            )
        class_topk(np.ones((1, 1)), per_class=0, rule=self.rule)  # refuses an unknown rule

    def memory(self, key: Key, batch: Batch) -> PyTree:
        return {"kept": jnp.ones(self.num_examples, jnp.float32)}

    def dataset_pass(
        self, nets: Nets, batch: Batch, memory: PyTree, step: Array
    ) -> dict[str, Array]:
        teacher, _ = nets("teacher", batch["input"])
        shown = batch["labelled"] if "labelled" in batch else jnp.zeros_like(batch["mask"])
        return {"probs": jax.nn.softmax(damaged(teacher["logits"], batch)), "labelled": shown}

    def init_memory(
        self,
        rows: Mapping[str, np.ndarray],
        ids: np.ndarray,
        memory: PyTree,
        random: np.random.Generator,
    ) -> PyTree:
        kept = rows["labelled"] > 0
        pool = np.flatnonzero(~kept)
        if self.per_class is None:
            kept[:] = True
        else:
            probs = rows["probs"][pool]
            kept[pool] = class_topk(probs, per_class=self.per_class, rule=self.rule)
        table = np.zeros_like(memory["kept"])
        table[ids[kept]] = len(kept) / max(kept.sum(), 1)
        return {"kept": table}

    def loss_terms(
        self,
        nets: Nets,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        memory: PyTree,
        step: Array,
    ) -> Signals:
        signals = super().loss_terms(nets, student, teacher, batch, memory, step)
        kept = memory["kept"][batch["index"]]
        return dataclasses.replace(signals, weights=dict.fromkeys(signals.values, kept))


make = SSLD
