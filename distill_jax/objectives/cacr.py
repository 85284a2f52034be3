"""CACR, contrastive attraction and contrastive repulsion (Zheng et al. 2021, arXiv:2105.03746).

`L = alpha L_attraction + beta L_repulsion` with the squared distance of unit vectors as cost: the
other views of an example attract, the farther the more; other examples repel, the closer the more
(`losses/contrastive.py:attraction`, `repulsion`). Both weights have a gradient unless told not to;
the authors' programs do either.

With two views the attraction is a plain mean: it takes three or more to be the method. The loss has
no lower end at 0 and says nothing of collapse.

Deviations: a projector stands between the embedding and the loss, where the paper's small networks
end in the vectors that are compared. The variant with moving averages for ImageNet is not here.

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
      t_plus: t+, how much more a far view attracts, 0 or more.
      t_minus: t-, how much more a close example repels, 0 or more.
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
