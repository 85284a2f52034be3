"""SALT_DS: SALT whose first stage is on selected rows (Rawat et al. 2024, arXiv:2410.18779).

An early checkpoint of the teacher, the scout, reads the training part once. The score of a row is
the median, over its targets that are among the scout's k most probable tokens, of their negative
log-probability (equation 10 as its reviewers describe it): rows that are hard, yet learnable. The
first stage is on the `share` of the rows with the highest scores; the second on all.

Deviation: rows that are not selected count 0 in the first stage, so that a batch has fewer targets
there. Rows without a target among the k come last.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core import ranges
from distill_jax.core.api import Array, Batch, Key, Nets, Objective, PyTree, Terms
from distill_jax.objectives import _tokens
from distill_jax.objectives.next_token import NextToken
from distill_jax.objectives.salt import Salt


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaltDS(Salt):
    """SALT on selected rows; see `Salt` for other arguments.

    Attributes:
      num_examples: n; all ids of rows are below it; from the data.
      share: share of the rows in the first stage, in (0, 1].
      top: k of the score.
    """

    num_examples: int
    share: float = 0.5
    top: int = 10

    needs_dataset_pass: ClassVar[bool] = True
    auxiliary: ClassVar[tuple[str, ...]] = ("student", "teacher", "teacher_scout")

    def __post_init__(self):
        super().__post_init__()
        ranges.within("(0, 1]", share=self.share)
        ranges.sizes(top=self.top)

    @property
    def roles(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (*super().roles, "teacher_scout")

    def phases(self) -> Sequence[tuple[int | float | str, Objective]]:
        first, *second = super().phases()
        return (first, *((start, _OnAll(num_examples=self.num_examples)) for start, _ in second))

    def memory(self, key: Key, batch: Batch) -> PyTree:
        return {"selected": jnp.ones(self.num_examples, jnp.float32)}

    def dataset_pass(
        self, nets: Nets, batch: Batch, memory: PyTree, step: Array
    ) -> dict[str, Array]:
        _tokens.check_text(batch)
        scout, _ = nets("teacher_scout", batch["input"])
        logits, mask = scout["logits"], batch["target_mask"]
        return {"score": learnable_loss(logits, batch["target"], mask, top=self.top)}

    def init_memory(
        self,
        rows: Mapping[str, np.ndarray],
        ids: np.ndarray,
        memory: PyTree,
        random: np.random.Generator,
    ) -> PyTree:
        count = math.ceil(self.share * len(ids))
        selected = np.zeros_like(memory["selected"])
        selected[ids[np.argsort(-rows["score"], kind="stable")[:count]]] = 1
        return {"selected": selected}

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        terms = super().loss(nets, batch, memory, step)
        taught = step < self._steps("teaching") + self._steps("ramp")
        chosen = memory["selected"][batch["index"]][:, None]
        chosen = jnp.where(taught, chosen, jnp.ones_like(chosen))
        values = {name: chosen * value for name, value in terms.values.items()}
        counts = {name: chosen * count for name, count in terms.counts.items()}
        return dataclasses.replace(terms, values=values, counts=counts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OnAll(NextToken):
    """The second stage, which keeps the memory of the first."""

    num_examples: int

    def memory(self, key: Key, batch: Batch) -> PyTree:
        return {"selected": jnp.ones(self.num_examples, jnp.float32)}


def learnable_loss(logits: Array, target: Array, mask: Array, *, top: int) -> Array:
    """Returns the median loss of the targets among the k most probable tokens, `[b]`.

    It is -inf for a row without one.

    Args:
      logits: `[b, t, v]`.
      target: ids `[b, t]`.
      mask: `[b, t]`, 0 where a position has no target.
      top: k.
    """
    logs = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.take_along_axis(logs, target[..., None], axis=-1)
    known = ((logs > own).sum(-1) < top) & (mask > 0)
    median = jnp.nanmedian(jnp.where(known, -own[..., 0], jnp.nan), axis=1)
    return jnp.where(known.any(1), median, -jnp.inf)


make = SaltDS
