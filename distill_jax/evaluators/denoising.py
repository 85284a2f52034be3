"""How well a language model fills in and continues text: bits per token of both tasks."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from distill_jax.core.api import TASKS, Array, Batch, Nets
from distill_jax.core.errors import ArgumentError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoising:
    """Bits of the views that `denoised_views` makes; see `make`."""

    role: str = "student"

    tasks: ClassVar[tuple[str, ...]] = TASKS

    @property
    def outputs(self) -> Mapping[str, tuple[str, ...]]:
        return {}

    def measure(self, nets: Nets, batch: Batch, step: Array) -> dict[str, Array]:
        """Returns sums over the targets of each row, `[b]`."""
        del step
        if "denoised" not in batch:
            raise ArgumentError(
                "a batch has no denoised views",
                where="denoising",
                hint="the transform denoised_views, before next_token",
            )
        found = {}
        for name, view in batch["denoised"].items():
            mask = view["target_mask"]
            seen = {key: view[key] for key in ("tokens", "segments")}
            outputs, _ = nets(self.role, {**seen, "ask": view["target"][..., None]})
            found[f"{name}/nats"] = -(outputs["log_probs"][..., 0] * mask).sum(1)
            found[f"{name}/targets"] = mask.sum(1)
        return {name: x.astype(jnp.float32) for name, x in found.items()}

    def __call__(
        self, outputs: Mapping[str, Mapping[str, np.ndarray]], batch: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        del batch
        sums = {
            name: float(np.sum(x, dtype=np.float64)) for name, x in outputs["denoising"].items()
        }
        names = [name.removesuffix("/nats") for name in sums if name.endswith("/nats")]
        return {
            f"{name}_bits": sums[f"{name}/nats"] / math.log(2) / (sums[f"{name}/targets"] or 1.0)
            for name in names
        }


def make(*, role: str = "student") -> Denoising:
    """Makes the evaluator of hidden spans and ends of texts, in bits per token.

    Metrics:
      infill_bits: of a span in the middle, given both sides, in the form of a denoiser.
      infill_left_bits: of the same tokens in plain text, given what is before them.
      continuation_bits: of the end of a text, in the form of a denoiser.
      continuation_left_bits: of the same tokens in plain text.

    A network that has learned shorter spans alone expects a sentinel behind so many tokens: let the
    views' `span` and `share` be lengths that it has seen.

    Args:
      role: the network to measure.
    """
    return Denoising(role=role)
