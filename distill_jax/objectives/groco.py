"""GroCo, learning by sorting with group ordering constraints (Shvetsova et al. 2023,
arXiv:2301.02009).

The similarities of an anchor with its other views and with its k hardest negatives pass through a
differentiable sorting network; each positive should reach one of the top ranks
(`losses/ranking.py:groco`). Negatives are the other examples of the whole batch, each represented
by the view with the same index as the anchor. Only anchors have a gradient, so the backward pass
needs no communication between devices. Similarities are at most 1, so the loss does not approach 0.

Deviation: views of different sizes (multi-crop) are not implemented.

Usual: k 10, beta 1.
"""

import dataclasses
from typing import ClassVar

from distill_jax.core.api import TASKS, Array, Batch, Nets, Objective, PyTree, Terms
from distill_jax.losses.ranking import groco
from distill_jax.objectives._distillation import check_positive
from distill_jax.objectives._views import MOST_PAIRED, encode, project, views_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroCo(Objective):
    """The term "order" on `views` of the batch.

    Attributes:
      negatives: k, positive.
      steepness: beta of the comparators, positive.
    """

    negatives: int = 10
    steepness: float = 1.0

    roles: ClassVar[tuple[str, ...]] = ("student", "projector")
    tasks: ClassVar[tuple[str, ...]] = TASKS
    couples_batch: ClassVar[bool] = True

    def __post_init__(self):
        check_positive(negatives=self.negatives, steepness=self.steepness)

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        del memory, step
        h, state = encode(nets, "student", views_of(batch, most=MOST_PAIRED))
        z, projector = project(nets, "projector", h)
        value = groco(z, batch["mask"], negatives=self.negatives, steepness=self.steepness)
        return Terms(
            values={"order": value},
            state={"student": state, "projector": projector},
            embeddings={"student": h, "projector": z},
        )


make = GroCo
