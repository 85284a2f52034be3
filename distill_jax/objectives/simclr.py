"""SimCLR (Chen, Kornblith, Norouzi, Hinton 2020, arXiv:2002.05709).

`L = mean over views i of -z_i . z_p(i) / tau + log sum_{j != i} exp(z_i . z_j / tau)`, eq. 1, where
`z` are the normalized outputs of a projector and the negatives are those of the whole batch, on any
mesh. With more than two views the first term is the mean over the other views of the example.
"""

import dataclasses
from typing import ClassVar

from distill_jax.core.api import TASKS, Array, Batch, Nets, Objective, PyTree, Terms
from distill_jax.losses.contrastive import Form, nt_xent
from distill_jax.objectives._distillation import check_positive
from distill_jax.objectives._views import encode, project, views_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimCLR(Objective):
    """The loss term "contrastive" on `views` of the batch.

    Attributes:
      temperature: tau, positive.
      output: output of the student that is the input of the projector.
      form: how similarities are stored, see `losses/contrastive.py`; the values are the same.
    """

    temperature: float = 0.2
    output: str = "embedding"
    form: Form = "dense"

    roles: ClassVar[tuple[str, ...]] = ("student", "projector")
    tasks: ClassVar[tuple[str, ...]] = TASKS
    couples_batch: ClassVar[bool] = True

    def __post_init__(self):
        check_positive(temperature=self.temperature)

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        del memory, step
        h, state = encode(nets, "student", views_of(batch), output=self.output)
        z, projector = project(nets, "projector", h)
        value = nt_xent(z, batch["mask"], temperature=self.temperature, form=self.form)
        return Terms(
            values={"contrastive": value},
            state={"student": state, "projector": projector},
            embeddings={"student": h, "projector": z},
        )


make = SimCLR
