"""CACR, contrastive attraction and contrastive repulsion (Zheng et al. 2021, arXiv:2105.03746).

`L = alpha L_attraction + beta L_repulsion`, with the squared distance of unit vectors as cost.
Other views of the same example attract, with larger weights for farther ones. Other examples repel,
with larger weights for closer ones (`losses/contrastive.py:attraction`, `repulsion`). The weights
of both are differentiated through by default (`stop_grad_weights`); the authors' programs do
either.

With two views the attraction is a plain mean; the method needs three or more. The loss is not
bounded below by 0 and does not indicate collapse.

Deviations: a projector is placed between the embedding and the loss, where the paper's small
networks output the compared vectors directly. The variant with moving averages for ImageNet is not
implemented.

Usual: five views, t+ 1, t- 0.9 for ten classes and 2 for more.
"""

import dataclasses
from typing import ClassVar

from distill_jax.core.api import TASKS, Array, Batch, Nets, Objective, PyTree, Terms
from distill_jax.losses.contrastive import attraction, repulsion
from distill_jax.objectives._distillation import check_not_negative
from distill_jax.objectives._views import MOST_PAIRED, encode, project, views_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class CACR(Objective):
    """The terms "attraction" and "repulsion" on `views` of the batch.

    Attributes:
      t_plus: t+, how strongly the attraction favours far views, 0 or more.
      t_minus: t-, how strongly the repulsion favours close examples, 0 or more.
      alpha: coefficient of the attraction, 0 or more.
      beta: coefficient of the repulsion, 0 or more.
      uniform: whether all weights are equal, as a control.
      stop_grad_weights: whether weights have no gradient.
    """

    t_plus: float = 1.0
    t_minus: float = 2.0
    alpha: float = 1.0
    beta: float = 1.0
    uniform: bool = False
    stop_grad_weights: bool = False

    roles: ClassVar[tuple[str, ...]] = ("student", "projector")
    tasks: ClassVar[tuple[str, ...]] = TASKS
    couples_batch: ClassVar[bool] = True

    def __post_init__(self):
        check_not_negative(
            t_plus=self.t_plus, t_minus=self.t_minus, alpha=self.alpha, beta=self.beta
        )

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        del memory, step
        h, state = encode(nets, "student", views_of(batch, most=MOST_PAIRED))
        z, projector = project(nets, "projector", h)
        options = {"uniform": self.uniform, "stop_grad_weights": self.stop_grad_weights}
        return Terms(
            values={
                "attraction": attraction(z, t=self.t_plus, **options),
                "repulsion": repulsion(z, batch["mask"], t=self.t_minus, **options),
            },
            coef={"attraction": self.alpha, "repulsion": self.beta},
            state={"student": state, "projector": projector},
            embeddings={"student": h, "projector": z},
        )


make = CACR
