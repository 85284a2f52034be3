"""Weighting by the teacher's margin (Lukasik et al. 2021, ADA-KD, arXiv:2106.10494).

`alpha = max(0, p_y - mean_{c != y} p_c)` of the teacher's probabilities, averaged over the
examples of a class in the original, or computed for each example. The margin is linear in the
probabilities, so the class-wise mean of margins is the margin of the class-mean probabilities. A
mixed label gets the mean of the ratios of its classes.
"""

import dataclasses

import jax.numpy as jnp

from distill_jax.core.api import Array, Evidence, ExampleWeighting, Nets
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.weighting._evidence import (
    between,
    class_means,
    labels,
    need_classes,
    need_two_loss_terms,
    probs,
)

GRANULARITIES = ("class", "sample")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherMargin(ExampleWeighting):
    """Teacher ratio from the teacher's margin.

    Attributes:
      granularity: "class": margins of the class means over the training part; "sample": margins of
        each example.
    """

    granularity: str = "class"

    def __post_init__(self):
        if self.granularity not in GRANULARITIES:
            raise ArgumentError(
                f"unknown granularity {self.granularity!r}",
                where="granularity",
                hint=nearest(self.granularity, GRANULARITIES),
            )

    @property
    def needs(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("class_means",) if self.granularity == "class" else ()

    def __call__(self, nets: Nets, evidence: Evidence, step: Array) -> Array:
        del nets, step
        need_two_loss_terms(evidence, "teacher_margin")
        need_classes(evidence, "the margin between classes")
        label = labels(evidence)
        if self.granularity == "class":
            return between(label @ _margins(jnp.diagonal(class_means(evidence)), label.shape[1]))
        return between((label * _margins(probs(evidence, "teacher"), label.shape[1])).sum(-1))


def _margins(right: Array, k: int) -> Array:
    """Returns the ratio for a label with teacher probability `right`."""
    return jnp.maximum(right - (1 - right) / (k - 1), 0.0)


make = TeacherMargin
