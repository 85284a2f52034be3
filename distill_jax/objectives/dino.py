"""DINO, self-distillation without labels (Caron et al. 2021, arXiv:2104.14294).

`L = mean over pairs of a whole view u and another view w of -sum_k P_k(u) log Q_k(w)`, eq. 3, with
`Q = softmax(s / 0.1)` of the student and `P = softmax((t - c) / tau)` of its moving average, eq. 1
and section 3.1. c is the moving average of t before the step, eq. 4. The moving-average network is
applied to `views` only, the student also to `local_views` where the batch has them. s and t are
cosines with learned prototypes (`models/prototypes.py`).

`centring="sinkhorn"` balances the assignments of the whole batch instead (`losses/clustering.py`;
Caron et al. 2020, SwAV; Ruan et al. 2023, arXiv:2210.07277; Oquab et al. 2023, DINOv2, section 4).

Deviation: the temperature of the moving average rises in every step and is final after
`temperature_warmup`. The authors' program raises it once per epoch and reaches the final value one
epoch earlier, in the last of these epochs.

If the networks have batch statistics, the student keeps those of its whole views, since evaluation
uses whole images. Moving-average networks are applied in training mode; one without dropout is a
role with its own `model`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.core import spectrum
from distill_jax.core.api import (
    TASKS,
    Array,
    Batch,
    Key,
    Nets,
    Objective,
    PyTree,
    Role,
    State,
    Terms,
)
from distill_jax.core.durations import steps
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.losses.clustering import (
    between_views,
    centred_softmax,
    move_centre,
    sinkhorn,
    view_entropies,
)
from distill_jax.objectives._distillation import check_durations, check_positive
from distill_jax.objectives._views import apply, encode, project, views_of

CENTRINGS = ("mean", "sinkhorn", "none")


class Clustered(NamedTuple):
    """The results of the heads on embeddings.

    Attributes:
      value: the loss, `[b]`.
      state: new states of the heads.
      memory: the memory with the updated centre.
      metrics: statistics of the assignments.
    """

    value: Array
    state: dict[Role, State]
    memory: dict[str, Array]
    metrics: dict[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DINO(Objective):
    """The loss term "clusters" on `views` and `local_views` of the batch.

    Metrics: "prototype_entropy", entropy of the mean assignment, log k if all prototypes are used
    equally and 0 if all assignments go to one; "assignment_entropy", the mean entropy of the
    assignments, log k if they are uniform; "assignment_information", the first minus the second,
    their mutual information with the views. It is 0 if all assignments are the same, in either way.
    They replace statistics of the bottleneck before the prototypes, which is narrow even in a
    healthy run.

    Attributes:
      num_prototypes: k, equal to that of `prototypes`; 65536 in the paper on ImageNet. Small data
        need fewer.
      centring: "mean", "sinkhorn", or "none", a control that collapses to one prototype.
      centre_decay: weight of the old centre in the moving average, in [0, 1).
      student_temperature: positive.
      temperature: temperature of the moving average's softmax, positive. Equal to the student's, it
        is a control in which assignments become uniform.
      first_temperature: initial value of this temperature, positive; 0.04 in the paper.
      temperature_warmup: duration of the linear change to `temperature`; 30 of 300 epochs in the
        paper.
      freeze_prototypes: duration in which prototypes are frozen; 1 epoch in the paper.
      heads_only: duration in which only the heads are trained and the encoder has no gradient, for
        a pretrained encoder. Its weight decay still applies.
      steps_per_epoch: length of an epoch; set by a run, required for durations in epochs.
    """

    num_prototypes: int = 1024
    centring: str = "mean"
    centre_decay: float = 0.9
    student_temperature: float = 0.1
    temperature: float = 0.04
    first_temperature: float = 0.04
    temperature_warmup: float | str = 0
    freeze_prototypes: float | str = 0
    heads_only: float | str = 0
    steps_per_epoch: float | None = None

    tasks: ClassVar[tuple[str, ...]] = TASKS
    couples_batch: ClassVar[bool] = True
    schedules: ClassVar[Mapping[str, str]] = {
        "temperature_warmup": "ramp",
        "freeze_prototypes": "hold",
        "heads_only": "hold",
    }
    roles: ClassVar[tuple[Role, ...]] = (
        "student",
        "projector",
        "prototypes",
        "target",
        "target_projector",
        "target_prototypes",
    )

    def __post_init__(self):
        check_positive(
            num_prototypes=self.num_prototypes,
            student_temperature=self.student_temperature,
            temperature=self.temperature,
            first_temperature=self.first_temperature,
        )
        check_durations(self, *self.schedules)
        if self.centring not in CENTRINGS:
            raise ArgumentError(
                f"unknown centring {self.centring!r}",
                where="centring",
                hint=nearest(self.centring, CENTRINGS),
            )
        if not 0 <= self.centre_decay < 1:
            raise ArgumentError(
                f"centre_decay is {self.centre_decay}",
                where="centre_decay",
                hint="the share of the old centre, in [0, 1)",
            )

    def memory(self, key: Key, batch: Batch) -> PyTree:
        """`centre` `[k]`, zeros."""
        del key, batch
        centred = self.centring == "mean"
        return {"centre": jnp.zeros(self.num_prototypes, jnp.float32)} if centred else {}

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        views = views_of(batch)
        h, student = encode(nets, "student", views)
        h, local = self.hold(h, step), self.encode_local(nets, batch, step)
        t, target = encode(nets, "target", views)
        clustered = self.cluster(nets, h, local, t, batch["mask"], memory, step)
        return Terms(
            values={"clusters": clustered.value},
            state={"student": student, "target": target, **clustered.state},
            memory=clustered.memory,
            embeddings={"student": h},
            metrics=clustered.metrics,
        )

    def hold(self, x: Array, step: Array) -> Array:
        """Returns the encoder's outputs, without gradient while only the heads are trained."""
        if not (alone := self.steps("heads_only")):
            return x
        return jnp.where(step < alone, jax.lax.stop_gradient(x), x)

    def steps(self, name: str) -> float:
        """Returns the duration of a given name, in steps."""
        return steps(getattr(self, name), name, steps_per_epoch=self.steps_per_epoch)

    def encode_local(self, nets: Nets, batch: Batch, step: Array) -> Array | None:
        """Returns the student's embeddings of small crops, `[b, w, d]`, or None without crops."""
        if "local_views" not in batch:
            return None
        views = views_of(batch, key="local_views", least=1)
        return self.hold(encode(nets, "student", views)[0], step)

    def cluster(
        self,
        nets: Nets,
        h: Array,
        local: Array | None,
        t: Array,
        mask: Array,
        memory: PyTree,
        step: Array,
    ) -> Clustered:
        """Applies the heads of the student and the moving average to embeddings; computes the loss.

        Args:
          nets: the networks.
          h: embeddings of whole views by the student, `[b, u, d]`.
          local: embeddings of small crops by the student, `[b, w, d]`.
          t: embeddings of whole views by the moving average, `[b, u, d]`.
          mask: float `[b]`, 0 on padding.
          memory: memory of the objective.
          step: number of finished steps.
        """
        state: dict[Role, State] = {}
        every = h if local is None else jnp.concatenate([h, local], axis=1)
        z, state["projector"] = project(nets, "projector", every)
        s, state["prototypes"] = self.compare(nets, "prototypes", z, step)
        t, state["target_projector"] = project(nets, "target_projector", t)
        t, state["target_prototypes"] = project(nets, "target_prototypes", t)
        weights = jnp.broadcast_to(mask[:, None], t.shape[:2])
        targets, memory, metrics = self.assign(t, weights, memory, step)
        values = view_entropies(targets, s, temperature=self.student_temperature)
        return Clustered(self.over_pairs(values), state, memory, metrics)

    def over_pairs(self, values: Array) -> Array:
        """Returns the mean over pairs of views, `[b, u, w] -> [b]`."""
        return between_views(values)

    def compare(self, nets: Nets, role: Role, z: Array, step: Array) -> tuple[Array, State]:
        """Returns the student's cosines with its prototypes, `[b, v, k]`, and their state."""
        s, state = project(nets, role, z)
        if held := self.steps("freeze_prototypes"):
            frozen, _ = apply(nets, role, z, output="output", stop_gradient_params=True)
            s = jnp.where(step < held, frozen, s)
        return s, state

    def assign(
        self, t: Array, weights: Array, memory: PyTree, step: Array, *, centre: str = "centre"
    ) -> tuple[Array, dict[str, Array], dict[str, Array]]:
        """Returns the moving average's assignments `[b, m, k]`, the updated memory, and metrics.

        Args:
          t: cosines with prototypes, `[b, m, k]`.
          weights: weights of the embeddings, `[b, m]`.
          memory: memory of the objective.
          step: number of finished steps.
          centre: key of the centre in the memory.

        Raises:
          ArgumentError: the number of prototypes differs from `num_prototypes`.
        """
        k = t.shape[-1]
        if k != self.num_prototypes:
            raise ArgumentError(
                f"{self.num_prototypes} prototypes, and the network has {k}",
                where="num_prototypes",
                hint=f"set it to {k}, or the prototypes' count",
            )
        t, memory, temperature = jax.lax.stop_gradient(t), dict(memory), self.temperature_at(step)
        rows, real = t.reshape(-1, k), weights.reshape(-1)
        if self.centring == "sinkhorn":
            assignments = sinkhorn(rows, real, temperature=temperature)
        else:
            old: Any = memory.get(centre, jnp.zeros(k, rows.dtype))
            assignments = centred_softmax(rows, old, temperature=temperature)
            if self.centring == "mean":
                memory[centre] = move_centre(old, rows, real, decay=self.centre_decay)
        each = jnp.where(
            assignments > 0, -assignments * jnp.log(jnp.where(assignments > 0, assignments, 1)), 0
        ).sum(-1)
        used = spectrum.prototype_entropy(assignments, real)
        left = (real @ each) / jnp.maximum(real.sum(), 1)
        metrics = {
            "prototype_entropy": used,
            "assignment_entropy": left,
            "assignment_information": used - left,
        }
        return assignments.reshape(t.shape), memory, metrics

    def temperature_at(self, step: Array) -> Array | float:
        """Returns the temperature of the moving average's softmax."""
        if not (warmup := self.steps("temperature_warmup")):
            return self.temperature
        done = jnp.minimum(step / warmup, 1)
        return self.first_temperature + (self.temperature - self.first_temperature) * done


make = DINO
