"""LOOK, leave-one-out nearest neighbours for supervised pretraining (Feng et al. 2022,
arXiv:2110.06014).

An example should share the label of most of its nearest neighbours only, not be close to all
examples of its class. A class may therefore form several clusters (`losses/ranking.py:look`). The
loss uses labels. It compares the embedding itself, without a projector.

Deviations: the candidates are those of the batch, without the memory of a moving average. The other
views of an example are always among its neighbours, so that the vote always includes its label. The
equation is ours where the paper's abstract does not specify it.
"""

import dataclasses
from typing import ClassVar

from distill_jax.core.api import Array, Batch, Nets, Objective, PyTree, Terms
from distill_jax.losses.ranking import look
from distill_jax.objectives._distillation import check_positive
from distill_jax.objectives._views import encode, views_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class LOOK(Objective):
    """The term "vote" on `views` of the batch and its labels.

    Attributes:
      neighbours: number of views of other examples that vote, positive; small relative to the
        number in a class.
      temperature: tau of their votes, positive.
    """

    neighbours: int = 20
    temperature: float = 0.1

    roles: ClassVar[tuple[str, ...]] = ("student",)
    couples_batch: ClassVar[bool] = True

    def __post_init__(self):
        check_positive(neighbours=self.neighbours, temperature=self.temperature)

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        del memory, step
        h, state = encode(nets, "student", views_of(batch))
        value = look(
            h,
            batch["label"],
            batch["mask"],
            neighbours=self.neighbours,
            temperature=self.temperature,
        )
        return Terms(
            values={"vote": value},
            state={"student": state},
            embeddings={"student": h},
        )


make = LOOK
