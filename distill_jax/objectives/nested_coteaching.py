"""Learning with noisy labels: compressed features and co-teaching.

Nested dropout (Chen et al. 2022, arXiv:2206.13140; 2021, arXiv:2104.13766) orders the features:
`L = CE(W (f * m_k), y)`, where `m_k` keeps the first k of d, with one k per batch and `p(k)`
proportional to `exp(-(k / sigma)^2)`. Fewer features memorize fewer wrong labels.

Co-teaching (Han et al. 2018, arXiv:1804.06872): each of two networks selects the share
`R(t) = 1 - forget_rate * min(t / ramp, 1)` of the batch with the smallest loss, t counted in
epochs, and the other network learns from it. Both rank the examples of all devices together. The
prediction is the mean of their logits.

The second stage of the first paper combines both. It starts from two networks of its first stage,
at a tenth of the learning rate. The networks are then ranked in evaluation mode with `keep`
features, each on its half of the batch, and both get the same k.

Deviations: batch norm is not frozen in the second stage. k is a function of `seed` and the step,
so it does not change with the seed of the run.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array, Batch, Nets, Objective, Outputs, PyTree, State, Terms
from distill_jax.core.durations import steps
from distill_jax.core.errors import ArgumentError
from distill_jax.losses.selection import nested_width, smallest, truncate
from distill_jax.objectives._distillation import check_durations, check_not_negative, endpoint
from distill_jax.objectives._labels import label_loss, shown

NETWORKS, HEADS = ("student", "peer"), ("head", "peer_head")
TERMS = ("cross_entropy", "peer_cross_entropy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NestedCoteaching(Objective):
    """Nested dropout, co-teaching, or both.

    Roles: "student" and, with `peers`, "peer"; with nested dropout also "head" (and "peer_head"),
    a map of the embedding to `num_classes` features, e.g. `projector`. The networks' own logits
    are then not used: set `num_classes=0` where the model allows it.

    Terms: `cross_entropy` and `peer_cross_entropy`, whose means are over the selected examples, and
    `kept_noise`, with zero weight: the share of wrong labels among the examples that the student
    learns from, where the data mark wrong labels.

    Prediction: "prediction", the mean logits of the networks, with `keep` features.

    Attributes:
      peers: whether there are two networks. With a forget rate of 0 they learn independently.
      forget_rate: share of the batch that is left out at the end of the ramp, in [0, 1); about the
        share of wrong labels. Published: 0.2 to 0.3 after nested dropout.
      ramp: duration over which the share left out grows from 0, epoch by epoch; 0 makes it
        constant, as published after nested dropout. 10 epochs in Han et al., where training starts
        from scratch.
      split: whether each network ranks half of the batch (even rows the student, odd rows the
        peer) and learns from the other's half; else both rank the whole.
      sigma: width of nested dropout; 0 disables it. Published: 10 with 10 classes, 100 with 100.
      keep: k*, number of features for ranking and prediction; 0 is all. Chosen on held-out data.
      seed: seed of the sequence of k.
      num_classes: k, from the data.
      steps_per_epoch: length of an epoch; set by a run, required for durations in epochs. Without
        it the ramp advances step by step.
    """

    peers: bool = True
    forget_rate: float = 0.2
    ramp: float | str = 0
    split: bool = False
    sigma: float = 0.0
    keep: int = 0
    seed: int = 0
    num_classes: int
    steps_per_epoch: float | None = None

    schedules: ClassVar[Mapping[str, str]] = {"ramp": "ramp"}

    def __post_init__(self):
        check_durations(self, "ramp")
        check_not_negative(sigma=self.sigma, keep=self.keep)
        if not 0 <= self.forget_rate < 1:
            raise ArgumentError(
                f"forget_rate is {self.forget_rate}",
                where="forget_rate",
                hint="the share of examples left out, in [0, 1)",
            )
        if self.split and not self.peers:
            raise ArgumentError(
                "one network has no half of a batch",
                where="split",
                hint="set peers to true, or split to false",
            )

    @property
    def networks(self) -> tuple[str, ...]:
        return NETWORKS if self.peers else NETWORKS[:1]

    @property
    def roles(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.networks + (HEADS[: len(self.networks)] if self.sigma else ())

    @property
    def couples_batch(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.selects

    @property
    def auxiliary(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return HEADS[: len(self.networks)] if self.sigma else ()

    @property
    def selects(self) -> bool:
        """Whether examples are left out."""
        return self.peers and self.forget_rate > 0

    def rate(self, step: Array) -> Array:
        """Returns R(t), the share of a batch that is kept."""
        ramp = steps(self.ramp, "ramp", steps_per_epoch=self.steps_per_epoch)
        if not ramp:
            return jnp.asarray(1 - self.forget_rate)
        per_epoch = self.steps_per_epoch or 1
        epoch = jnp.floor(step / per_epoch)
        return 1 - self.forget_rate * jnp.minimum(epoch / (ramp / per_epoch), 1)

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        own = [_rows(batch, i if self.split else None) for i in range(len(self.networks))]
        # With peers, each network learns from the examples that the other selected.
        order = (1, 0) if self.peers else (0,)
        learned, states = [], {}
        for i, j in enumerate(order):
            logits, own_states = self._logits(nets, i, own[j], step=step, train=True)
            learned.append(label_loss(logits, own[j], smoothing=0.0))
            states |= own_states
        kept = counts = [jnp.ones_like(loss) for loss in learned]
        if self.selects:
            ranked = learned
            if self.sigma or self.split:
                judged = (self._logits(nets, i, own[i])[0] for i in range(2))
                ranked = [label_loss(z, own[i], smoothing=0.0) for i, z in enumerate(judged)]
            real = [part["mask"] * shown(part) for part in own]
            rate = self.rate(step)
            kept = [smallest(ranked[j], real[j], rate=rate) for j in order]
            # Of all examples, as without selection; those without a label have no loss.
            shares = [own[j]["mask"].sum() / jnp.maximum(real[j].sum(), 1) for j in order]
            counts = [share * x for share, x in zip(shares, kept, strict=True)]
        values, counted, coef = {}, {}, {}
        for i, j in enumerate(order):
            place = j if self.split else None
            terms = {TERMS[i]: learned[i]}
            if i == 0 and self.selects and "label_noisy" in batch:
                terms["kept_noise"], coef["kept_noise"] = own[j]["label_noisy"], 0.0
            values |= {name: _place(kept[i] * x, place) for name, x in terms.items()}
            if self.selects or self.split:
                counted |= dict.fromkeys(terms, _place(counts[i], place))
        return Terms(values=values, counts=counted, coef=coef, state=states)

    def predictions(
        self, nets: Nets, batch: Batch, memory: PyTree, step: Array
    ) -> Mapping[str, Outputs]:
        logits = [self._logits(nets, i, batch)[0] for i in range(len(self.networks))]
        return {"prediction": {"logits": jnp.stack(logits).mean(0)}}

    def _logits(
        self, nets: Nets, i: int, batch: Batch, *, step: Array | None = None, train: bool = False
    ) -> tuple[Array, dict[str, State]]:
        """Returns logits of network i and new states; in training, with a random width."""
        outputs, state = nets(NETWORKS[i], batch["input"], train=train)
        if not self.sigma:
            return outputs["logits"], {NETWORKS[i]: state}
        features = endpoint(outputs, "embedding", role=NETWORKS[i], where="sigma")
        d = features.shape[-1]
        if self.keep > d:
            raise ArgumentError(
                f"keep is {self.keep} of {d} features",
                where="keep",
                hint=f"1 to {d}, or 0 for all",
            )
        width: Any = self.keep or d
        if step is not None:
            key = jax.random.fold_in(jax.random.key(self.seed), step)
            width = nested_width(key, d, sigma=self.sigma)
        head, head_state = nets(HEADS[i], truncate(features, width), train=train)
        if head["output"].shape[-1] != self.num_classes:
            raise ArgumentError(
                f"{HEADS[i]} has {head['output'].shape[-1]} outputs",
                where=f"{HEADS[i]}.features",
                hint=f"one for each of the {self.num_classes} classes",
            )
        return head["output"], {NETWORKS[i]: state, HEADS[i]: head_state}


def _rows(batch: Batch, half: int | None) -> Batch:
    """Returns every second row of a batch, starting at `half`, or all rows."""
    if half is None:
        return batch
    b = batch["mask"].shape[0]
    if b % 2:
        raise ArgumentError(
            f"a batch of {b} has no halves", where="batch_size", hint="an even size"
        )
    return jax.tree.map(lambda x: x.reshape(b // 2, 2, *x.shape[1:])[:, half], dict(batch))


def _place(values: Array, half: int | None) -> Array:
    """Scatters values of every second row to their places in the batch, with 0 between."""
    if half is None:
        return values
    zeros = jnp.zeros_like(values)
    return jnp.stack([values, zeros] if half == 0 else [zeros, values], axis=1).reshape(-1)


make = NestedCoteaching
