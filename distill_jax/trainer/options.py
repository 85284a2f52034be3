"""Options of a step that do not belong to the method, the networks or the optimizer."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh

from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.core.precision import COMPUTE_DTYPES

NONFINITE = ("keep", "report", "skip")


class LookAhead(NamedTuple):
    """Virtual steps that advance the moving averages before each real one.

    Attributes:
      steps: number of virtual steps.
      kind: "deep", on the same batch, or "wide", on as many batches as steps.
      restore: parts of the state to restore afterwards: "all", "params+opt" or "params".
    """

    steps: int
    kind: str = "deep"
    restore: str = "all"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a `Trainer`.

    Attributes:
      precision: compute type of the networks, "float32", "bfloat16" or "float64". Parameters,
        losses and optimizer state stay float32 (float64 where that is the compute type).
      accum_steps: number of micro-batches; divides the batch size.
      grad_norm: whether the metrics include the global norm of the gradient.
      nonfinite: handling of a step whose loss or gradient is not finite. "keep" applies it.
        "report" applies it and sets the metric `nonfinite` to 1. "skip" does not change parameters,
        averages and optimizer, and sets the metric `skipped` to 1.
      watch_every: steps between two measurements of the spread of the embeddings, see
        `core.collapse`; 0 turns it off.
      lookahead: virtual steps before each step, see `core.lookahead`; None turns it off.
      mesh: devices, from `core.partition.make_mesh`; by default all devices share the batch.
      partition_rules: `{regular expression: mesh axis or None for each array axis}` over the paths
        of the parameters, see `core.partition.infer`.
      frozen_partition_rules: the same for the frozen networks.
      partition_min_size: smallest number of elements of a parameter that `fsdp` splits.
      total_steps: length of training, for phases of the objective that begin at a share of it.
      steps_per_epoch: length of an epoch, for phases that begin at an epoch.

    Raises:
      ArgumentError: a value is unknown or out of range.
    """

    precision: str = "float32"
    accum_steps: int = 1
    grad_norm: bool = False
    nonfinite: str = "keep"
    watch_every: int = 0
    lookahead: LookAhead | None = None
    mesh: Mesh | None = None
    partition_rules: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    frozen_partition_rules: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    partition_min_size: int = 2**14
    total_steps: int | None = None
    steps_per_epoch: float | None = None

    def __post_init__(self):
        for name, options in (("precision", tuple(COMPUTE_DTYPES)), ("nonfinite", NONFINITE)):
            if (value := getattr(self, name)) not in options:
                raise ArgumentError(f"unknown {name} {value!r}", hint=nearest(value, options))
        if self.accum_steps < 1:
            raise ArgumentError(f"accum_steps is {self.accum_steps}", hint="1 or more")
