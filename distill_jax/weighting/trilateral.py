"""Ratios from the trilateral geometry of student, teacher and label (TGeo-KD).

Hu et al. 2024 (ICLR), arXiv:2312.15112, eq. 6-10. With S, T the probabilities of student and
teacher at temperature 1, G the label and T' the mean of the teacher over the training examples of
the label's class, a network sees the triangles (S, T, G) and (S, T', G): their edges and vertices.
Edges are differences in the paper; the authors' code squares them or takes absolute values.
Three choices are not specified in the paper: here the features carry no gradient, T' is averaged
over the training part alone, and the network starts at a given ratio.

For several labels at once, S and T are the sigmoids and G the labels: points of `[0, 1]^k` with the
triangle (S, T, G) as for classes. T' requires a single class, so blocks with T' are rejected.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array, Evidence, ExampleWeighting, Nets
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.weighting._evidence import class_means, labels, need_classes, probs

BLOCKS = ("sg", "tg", "st", "mg", "sm", "s", "t", "m", "g")
"""Edges `sg = G - S, tg = G - T, st = T - S, mg = G - T', sm = T' - S`, then the vertices
`s, t, m = T', g`: in the order of eq. 10."""

CENTRES = (0.05, 0.95)
"""Range of `centre`."""


def _absolute(x: Array) -> Array:
    """`|x|` with the gradient 0 at 0, where that of `jnp.abs` is 1."""
    return x * jnp.sign(x)


EDGE_MODES = {"signed": lambda e: e, "squared": jnp.square, "abs": _absolute}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trilateral(ExampleWeighting):
    """`softmax([0, net(features)])` over the loss terms; for two of them a ratio `sigmoid(net)`.

    The network, role "weighting", gets `[b, blocks, f]` and returns s - 1 logits.

    Attributes:
      edge_mode: "signed", "squared" or "abs".
      blocks: which of `BLOCKS` the network sees; the order has no effect.
      compact: for many classes, f = 3 numbers instead of k per block: the entry of the
        label's class, the largest entry and the entropy of a vertex; the entry of the label's
        class, the largest magnitude and the Euclidean length of an edge. Not in the paper.
      centre: a ratio in [0, 1], such as the best constant: the mean logit of a batch stays that of
        this ratio, and only differences between examples are learned. It is cut to [0.05, 0.95],
        since the ratios of a sigmoid near 0 or 1 hardly differ. A gradient through one step is a
        poor guide to the mean (`docs/results/trust_suite.md`). None leaves the mean free, as in
        the paper.
    """

    edge_mode: str = "signed"
    blocks: tuple[str, ...] = BLOCKS
    compact: bool = False
    centre: float | None = None

    roles: ClassVar[tuple[str, ...]] = ("weighting",)

    def __post_init__(self):
        if self.edge_mode not in EDGE_MODES:
            raise ArgumentError(
                f"unknown edge_mode {self.edge_mode!r}",
                where="edge_mode",
                hint=nearest(self.edge_mode, EDGE_MODES),
            )
        for block in self.blocks:
            if block not in BLOCKS:
                raise ArgumentError(
                    f"unknown block {block!r}",
                    where="blocks",
                    hint=nearest(block, BLOCKS),
                )
        if self.centre is not None and not 0 <= self.centre <= 1:
            raise ArgumentError(
                f"centre is {self.centre}", where="centre", hint="from 0 to 1, or None"
            )
        if not self.blocks or len(set(self.blocks)) != len(self.blocks):
            raise ArgumentError(
                f"blocks are {self.blocks}",
                where="blocks",
                hint="one or more, each once",
            )

    @property
    def couples_batch(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.centre is not None

    @property
    def needs(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("class_means",) if any("m" in block for block in self.blocks) else ()

    def features(self, evidence: Evidence) -> Array:
        """Returns the inputs of the network, `[b, blocks, f]` with f = k, or 3 if compact."""
        if self.compact:
            need_classes(evidence, "the entry of the label's class (compact)")
        label = labels(evidence)
        corners = {"s": probs(evidence, "student"), "t": probs(evidence, "teacher"), "g": label}
        if "class_means" in self.needs:
            corners["m"] = label @ class_means(evidence)
        blocks = []
        for block in BLOCKS:
            if block not in self.blocks:
                continue
            if len(block) == 1:
                x = corners[block]
            else:  # from the first corner to the second
                x = EDGE_MODES[self.edge_mode](corners[block[1]] - corners[block[0]])
            blocks.append(_compact(x, label, vertex=len(block) == 1) if self.compact else x)
        return jnp.stack(blocks, axis=1)

    def __call__(self, nets: Nets, evidence: Evidence, step: Array) -> Array:
        del step
        s = len(evidence.loss_terms)
        if s < 2:
            raise ArgumentError(
                "a ratio is between loss terms, and there is one",
                where="loss_terms",
                hint="name at least two terms",
            )
        outputs, _ = nets("weighting", self.features(evidence))
        logits = outputs["logits"]
        if logits.shape != (evidence.mask.shape[0], s - 1):
            raise ArgumentError(
                f"the network gives {logits.shape}, not one logit for each example and loss term "
                f"after the first {(evidence.mask.shape[0], s - 1)}",
                where="weighting.outputs",
                hint=f"set it to {s - 1}",
            )
        if self.centre is not None:
            real = evidence.mask[:, None]
            mean = (real * logits).sum(0) / jnp.maximum(real.sum(), 1)
            centre = jnp.clip(self.centre, CENTRES[0], CENTRES[1])
            logits += jnp.log(centre / (1 - centre)) - mean[None]
        return jax.nn.softmax(jnp.concatenate([jnp.zeros_like(logits[:, :1]), logits], axis=1))


def _compact(x: Array, label: Array, *, vertex: bool) -> Array:
    own, tiny = (label * x).sum(-1), jnp.finfo(x.dtype).tiny  # tiny: gradients stay finite at 0
    if vertex:
        entropy = -(x * jnp.log(jnp.maximum(x, tiny))).sum(-1)
        return jnp.stack([own, x.max(-1), entropy], axis=-1)
    length = jnp.sqrt(jnp.maximum((x * x).sum(-1), tiny))
    return jnp.stack([own, _absolute(x).max(-1), length], axis=-1)


make = Trilateral
