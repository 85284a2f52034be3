"""SupCon, supervised contrastive learning (Khosla et al. 2020, arXiv:2004.11362).

`L = mean over views i of -1 / |P(i)| sum_{p in P(i)} log(exp(z_i . z_p / tau) / Z_i)`, eq. 2, with
`Z_i = sum_{a != i} exp(z_i . z_a / tau)`: the sum over positives is outside the logarithm. P(i) are
all other views in the batch with the class of i. The loss uses labels.

The paper trains a linear classifier on the frozen encoder afterwards; here evaluators do that.
"""

import dataclasses
from typing import ClassVar

from distill_jax.core.api import Array, Batch, Nets, Objective, PyTree, Terms
from distill_jax.losses.contrastive import Form, sup_con
from distill_jax.objectives._distillation import check_positive
from distill_jax.objectives._views import encode, project, views_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupCon(Objective):
    """The loss term "contrastive" on `views` of the batch and its labels.

    Attributes:
      temperature: tau, positive.
      form: how similarities are stored, see `losses/contrastive.py`; the values are the same.
    """

    temperature: float = 0.1
    form: Form = "dense"

    roles: ClassVar[tuple[str, ...]] = ("student", "projector")
    couples_batch: ClassVar[bool] = True

    def __post_init__(self):
        check_positive(temperature=self.temperature)

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        del memory, step
        h, state = encode(nets, "student", views_of(batch))
        z, projector = project(nets, "projector", h)
        value = sup_con(
            z, batch["label"], batch["mask"], temperature=self.temperature, form=self.form
        )
        return Terms(
            values={"contrastive": value},
            state={"student": state, "projector": projector},
            embeddings={"student": h, "projector": z},
        )


make = SupCon
