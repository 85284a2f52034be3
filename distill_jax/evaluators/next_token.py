"""How well a language model predicts text: bits per byte and per token, accuracy."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core.api import TASKS, Array, Batch, Nets

MOST_LOGITS = 2**28
"""Accuracy is not measured where a batch has more logits than this."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken:
    """Metrics of the next-token predictions of `role`; see `make`."""

    role: str = "student"

    tasks: ClassVar[tuple[str, ...]] = TASKS

    @property
    def outputs(self) -> Mapping[str, tuple[str, ...]]:
        return {}

    def measure(self, nets: Nets, batch: Batch, step: Array) -> dict[str, Array]:
        """Returns sums over the targets of each row, `[b]`."""
        del step
        target, mask = batch["target"], batch["target_mask"]
        view = batch["input"]
        view = view if isinstance(view, Mapping) else {"tokens": view}
        outputs, _ = nets(self.role, {**view, "ask": target[..., None]})
        found = {
            "nats": -(outputs["log_probs"][..., 0] * mask).sum(1),
            "targets": mask.sum(1),
        }
        if outputs["logits"].size <= MOST_LOGITS:
            right = jnp.argmax(outputs["logits"], axis=-1) == target
            found["right"] = (right * mask).sum(1)
        if "bytes" in batch:
            found["bytes"] = batch["bytes"]
        return jax.tree.map(lambda x: x.astype(jnp.float32), found)

    def __call__(
        self, outputs: Mapping[str, Mapping[str, np.ndarray]], batch: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        del batch
        sums = {
            name: float(np.sum(x, dtype=np.float64)) for name, x in outputs["next_token"].items()
        }
        targets = sums["targets"] or 1.0
        bits = sums["nats"] / math.log(2)
        metrics: dict[str, Any] = {"bits_per_token": bits / targets}
        if sums.get("bytes"):
            metrics["bits_per_byte"] = bits / sums["bytes"]
        if "right" in sums:
            metrics["token_accuracy"] = sums["right"] / targets
        return metrics


def make(*, role: str = "student") -> NextToken:
    """Makes the evaluator of a language model's predictions of the next token.

    Metrics:
      bits_per_byte: bits for all targets, ends of documents among them, per byte of the text in
        UTF-8. It compares networks with different tokenizers. Where the data do not tell the bytes
        (`token_file`), it is absent.
      bits_per_token: bits per target.
      token_accuracy: share of targets that are the most probable token; absent for batches of more
        than `MOST_LOGITS` logits.

    Args:
      role: the network to measure.
    """
    return NextToken(role=role)
