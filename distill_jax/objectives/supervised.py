"""Training on labels alone.

Cross-entropy with label smoothing (Szegedy et al. 2016, arXiv:1512.00567). Labels mixed by a
transform (mixup, cutmix) are given as `label_probs` and replace the class ids. For several labels,
or real values, the loss is that of the task (`_tasks.OfTask`).
"""

import dataclasses
from typing import ClassVar

from distill_jax.core.api import Array, Batch, Nets, PyTree, Terms
from distill_jax.objectives._tasks import OfTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Supervised(OfTask):
    """The student's label loss; see `OfTask` for arguments."""

    roles: ClassVar[tuple[str, ...]] = ("student",)
    couples_batch: ClassVar[bool] = False

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        outputs, state = nets("student", batch["input"], train=True)
        name, value = self.label_term(outputs["logits"], batch)
        return Terms(values={name: value}, state={"student": state})


make = Supervised
