"""Self-distillation with progressive targets (PS-KD; Kim et al. 2021, arXiv:2006.12000).

`L = CE((1 - alpha_t) y + alpha_t P_{t-1}, P_t)`, eq. 5, with `alpha_t = alpha (t + 1) / T` for
epochs t = 0..T-1 (eq. 7). `P_{t-1}(x)` is the network's prediction for the same example one epoch
earlier. It is the training-mode output on the augmented example, before the update, stored in a
table with one row per training example, so that no second network is needed.

The past prediction of an example that has not occurred yet is its label.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array, Batch, Key, Nets, Objective, PyTree, Terms
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.losses.classification import cross_entropy, soft_cross_entropy
from distill_jax.losses.selection import rows_to_write, written_after

TABLES = ("predictions", "label", "uniform")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PSKD(Objective):
    """Cross-entropy with labels that are gradually replaced by the network's past predictions.

    Terms: `cross_entropy` and `self_distillation`, with coefficients `1 - alpha_t` and `alpha_t`.
    The table is `num_examples * num_classes` floats.

    Attributes:
      alpha: alpha_T, the share of past predictions in the last epoch, in [0, 1]. Published: 0.8
        on CIFAR-100 and 0.3 on ImageNet.
      table: source of the past predictions: "predictions"; "label", which is plain cross-entropy;
        or "uniform", which is label smoothing that grows. The last two are controls.
      num_classes: k, from the data.
      num_examples: n; all example ids are below it; from the data.
      total_steps: number of training steps, from the run.
      steps_per_epoch: length of an epoch; set by a run. By default an epoch is one step, so that
        durations in epochs are numbers of steps.
    """

    alpha: float = 0.8
    table: str = "predictions"
    num_classes: int
    num_examples: int
    total_steps: int
    steps_per_epoch: float = 1.0

    roles: ClassVar[tuple[str, ...]] = ("student",)
    couples_batch: ClassVar[bool] = False

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ArgumentError(
                f"alpha is {self.alpha}",
                where="alpha",
                hint="the share of past predictions in the last epoch, in [0, 1]",
            )
        if self.table not in TABLES:
            raise ArgumentError(
                f"unknown table {self.table!r}",
                where="table",
                hint=nearest(self.table, TABLES),
            )

    def memory(self, key: Key, batch: Batch) -> PyTree:
        """`past` `[n, k]`: rows of zeros for examples that have not occurred yet."""
        del key, batch
        if self.table != "predictions":
            return {}
        return {"past": jnp.zeros((self.num_examples, self.num_classes), jnp.float32)}

    def share(self, step: Array) -> Array:
        """Returns alpha_t of the epoch of a step."""
        epochs = max(1, round(self.total_steps / self.steps_per_epoch))
        epoch = jnp.floor(step / self.steps_per_epoch)
        return self.alpha * jnp.minimum(epoch + 1, epochs) / epochs

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        if "label_probs" in batch:
            raise ArgumentError(
                "a mixed example has no past prediction of its own",
                where="batch",
                hint="leave out mixup and cutmix",
            )
        student, state = nets("student", batch["input"], train=True)
        logits = student["logits"]
        label = jax.nn.one_hot(batch["label"], self.num_classes, dtype=logits.dtype)
        past, memory = self._past(logits, label, batch, memory)
        alpha: Any = self.share(step)
        return Terms(
            values={
                "cross_entropy": cross_entropy(logits, batch["label"]),
                "self_distillation": soft_cross_entropy(logits, past),
            },
            coef={"cross_entropy": 1 - alpha, "self_distillation": alpha},
            state={"student": state},
            memory=memory,
            logits={"student": logits},
        )

    def _past(
        self, logits: Array, label: Array, batch: Batch, memory: PyTree
    ) -> tuple[Array, PyTree]:
        """Returns past predictions `[b, k]` and the memory with the present predictions."""
        if self.table == "label":
            return label, memory
        if self.table == "uniform":
            return jnp.full_like(label, 1 / self.num_classes), memory
        table, index = memory["past"], batch["index"]
        past = table[index]
        past = jnp.where(past.sum(-1, keepdims=True) > 0, past, label)
        rows = rows_to_write(index, batch["mask"], self.num_examples)
        rows = written_after(rows, past)
        probs = jax.lax.stop_gradient(jax.nn.softmax(logits)).astype(table.dtype)
        return past.astype(logits.dtype), {"past": table.at[rows].set(probs, mode="drop")}


make = PSKD
