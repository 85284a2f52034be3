"""Contrastive representation distillation (Tian, Krishnan, Isola 2020, arXiv:1910.10699).

`L = CE + weight (contrast of the student with the teacher + of the teacher with the student)`.
Embeddings of both networks are mapped to unit vectors by two trained heads, `projector` and
`projector_of_teacher`; embeddings of one example attract, those of different examples repel.

`negatives="memory"` is the published method (section 3.1). Two banks `[n, d]` hold one embedding of
each training example, one bank for each network. After each use an entry moves towards the new
embedding. The embedding of one network is compared with the other network's bank at the same
example and at N sampled ones by noise-contrastive estimation: `-log h+ - sum_j log(1 - h-_j)`,
`h = p / (p + N / n)` and `p = exp(s . t / T) / Z`. Z is n times the mean of `exp(s . t / T)` over
the first batch and stays fixed, as in the authors' program.

`negatives="batch"` needs no bank: the other examples of the batch are the negatives of InfoNCE
(`losses/contrastive_distillation.py:batch_contrast`).

Deviations of the memory form: negatives are sampled with replacement, by default once for the whole
batch, as a function of the step alone. The example itself and, with `class_aware`, the examples of
its class are left out; the sum over the remaining negatives is scaled to N. `log h` has no small
constant inside. If an index occurs twice in a batch, its later occurrence is written; padding is
never written.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from distill_jax.core import ranges
from distill_jax.core.api import TASKS, Array, Batch, Key, Nets, Outputs, PyTree, Role
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.losses.contrastive_distillation import (
    batch_contrast,
    estimate_log_z,
    noise_contrast,
)
from distill_jax.losses.selection import rows_to_write, written_after
from distill_jax.losses.ties import normalized
from distill_jax.objectives._distillation import Distillation, Signals, check_positive
from distill_jax.objectives._embeddings import flat_pair, project_pair

NEGATIVES = ("batch", "memory")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CRD(Distillation):
    """Contrast between embeddings of student and teacher, term `contrast`.

    Attributes:
      weight: usually 0.8.
      negatives: one of `NEGATIVES`.
      contrast_temperature: T, positive; 0.02 to 0.3 in the paper, best between 0.05 and 0.2.
      class_aware: whether examples of the same class are excluded from the negatives. In the memory
        form, examples that have not occurred yet have no class and count as negatives.
      feature: output of both networks that is embedded.
      num_negatives: N of the memory form, at most n - 1; 4 to 16384 in the paper, where more are
        better.
      shared_negatives: whether one sample of negatives is shared by the whole batch, so that
        `[N, d]` numbers are gathered instead of `[b, N, d]`.
      momentum: share of the old row of a bank in the new one, in [0, 1).
      dim: d of the memory form: the width of both projectors.
      num_examples: n of the memory form; taken from the data if not set.
    """

    weight: float = 0.8
    negatives: str = "batch"
    contrast_temperature: float = 0.07
    class_aware: bool = False
    feature: str = "embedding"
    num_negatives: int = 16384
    shared_negatives: bool = True
    momentum: float = 0.5
    dim: int = 128
    num_examples: int = 0

    roles: ClassVar[tuple[Role, ...]] = ("student", "teacher", "projector", "projector_of_teacher")
    couples_batch: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = TASKS

    def __post_init__(self):
        super().__post_init__()
        check_positive(contrast_temperature=self.contrast_temperature)
        if self.class_aware and self.task != "classification":
            raise ArgumentError(
                f"negatives of other classes need classes, and the task is {self.task}",
                where="class_aware",
                hint="False",
            )
        if self.negatives not in NEGATIVES:
            raise ArgumentError(
                f"unknown negatives {self.negatives!r}",
                where="negatives",
                hint=nearest(self.negatives, NEGATIVES),
            )
        check_positive(num_negatives=self.num_negatives, dim=self.dim)
        ranges.within("[0, 1)", momentum=self.momentum)
        if self.negatives == "batch":
            return
        if self.num_examples < 2:
            raise ArgumentError(
                f"num_examples is {self.num_examples}",
                where="num_examples",
                hint="a memory needs the number of training examples, at least 2",
            )

    def memory(self, key: Key, batch: Batch) -> PyTree:
        """Banks of both networks, uniform rows of about unit length; `log Z`, infinite until set.

        With `class_aware`, also the labels seen so far, -1 where there is none.
        """
        if self.negatives == "batch":
            return {}
        keys, shape = jax.random.split(key), (self.num_examples, self.dim)
        bound = (3 / self.dim) ** 0.5
        memory: dict[str, Any] = {
            name: jax.random.uniform(k, shape, jnp.float32, -bound, bound)
            for name, k in zip(("student", "teacher"), keys, strict=True)
        }
        memory["log_z"] = jnp.full(2, jnp.inf, jnp.float32)
        if self.class_aware:
            memory["label"] = jnp.full(self.num_examples, -1, jnp.int32)
        return memory

    def loss_terms(
        self,
        nets: Nets,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        memory: PyTree,
        step: Array,
    ) -> Signals:
        pair, state = project_pair(nets, *flat_pair(student, teacher, self.feature))
        s, t = map(normalized, pair)
        if self.negatives == "memory":
            value, memory = self._against_memory(s, t, batch, memory, step)
            return Signals(values={"contrast": value}, state=state, memory=memory)
        allowed = jnp.broadcast_to(batch["mask"][None] > 0, (len(s), len(s)))
        if self.class_aware:
            allowed &= batch["label"][:, None] != batch["label"][None]
        value = batch_contrast(s, t, allowed, temperature=self.contrast_temperature)
        return Signals(values={"contrast": value}, state=state)

    def _against_memory(
        self, s: Array, t: Array, batch: Batch, memory: PyTree, step: Array
    ) -> tuple[Array, PyTree]:
        if s.shape[1] != self.dim:
            raise ArgumentError(
                f"the projectors give {s.shape[1]} features and the memory has {self.dim}",
                where="dim",
                hint=f"set it to {s.shape[1]}",
            )
        index, mask, n = batch["index"], batch["mask"], self.num_examples
        q = min(self.num_negatives, n - 1)
        rows = 1 if self.shared_negatives else len(index)
        drawn = jax.random.randint(jax.random.fold_in(jax.random.key(0), step), (rows, q), 0, n)
        allowed = drawn != index[:, None]
        if self.class_aware:
            allowed &= memory["label"][drawn] != batch["label"][:, None]
        weights = allowed * (q / jnp.maximum(allowed.sum(1, keepdims=True), 1))

        values, log_zs = [], []
        for i, (anchor, bank) in enumerate(((s, memory["teacher"]), (t, memory["student"]))):
            positive = (anchor * bank[index]).sum(1) / self.contrast_temperature
            if self.shared_negatives:
                negative = anchor @ bank[drawn[0]].T / self.contrast_temperature
            else:
                negative = jnp.einsum("bd,bqd->bq", anchor, bank[drawn]) / self.contrast_temperature
            estimate = estimate_log_z(positive, negative, weights, mask, num_examples=n)
            known = memory["log_z"][i]
            log_z = jnp.where(jnp.isinf(known), estimate.astype(known.dtype), known)
            values.append(noise_contrast(positive, negative, weights, log_z=log_z, num_examples=n))
            log_zs.append(log_z)

        target = written_after(rows_to_write(index, mask, n), *values)
        new = {"log_z": jnp.stack(log_zs)}
        for name, embedding in (("student", s), ("teacher", t)):
            old = memory[name]
            moved = self.momentum * old[index] + (1 - self.momentum) * embedding
            moved = jax.lax.stop_gradient(normalized(moved)).astype(old.dtype)
            new[name] = old.at[target].set(moved, mode="drop")
        if self.class_aware:
            label = batch["label"].astype(jnp.int32)
            new["label"] = memory["label"].at[target].set(label, mode="drop")
        return values[0] + values[1], new


make = CRD
