"""Supervised training of an encoder without a classifier, and of a new last layer on top of it.

`L = CE(head(embedding(x)), y)`, the fine-tuning of Chen et al. 2020 (arXiv:2006.10029, section 3),
from the last layer of the encoder or, with `projector`, from a middle layer of its projector.
Evaluators read the logits as `role="prediction"`.

Networks: student, an encoder (`num_classes=0`) initialized from its pretraining run
(`init="<run>#student"`); head, `linear_head`; optionally projector, the first layers of the
projector of that run: a `projector` with `features=0` and `init="<run>#projector/*"`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from distill_jax.core.api import Array, Batch, Nets, Outputs, PyTree, Terms
from distill_jax.core.errors import ArgumentError
from distill_jax.objectives._tasks import OfTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetune(OfTask):
    """Label loss of a head on the student's embedding; see `OfTask` for other arguments.

    Attributes:
      output: output of the student that is the input of the head.
      train_encoder: whether the student is in training mode. False, with a frozen student, trains
        the head alone: a linear probe by gradient steps.
      projector: whether the head reads the output of a network `projector` of the student's.
    """

    output: str = "embedding"
    train_encoder: bool = True
    projector: bool = False

    couples_batch: ClassVar[bool] = False

    @property
    def roles(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("student", "projector", "head") if self.projector else ("student", "head")

    def _outputs(self, nets: Nets, batch: Batch, *, train: bool) -> tuple[Outputs, Any]:
        learns = train and self.train_encoder
        encoded, student = nets("student", batch["input"], train=learns)
        if self.output not in encoded:
            raise ArgumentError(
                f"student has no output {self.output!r}",
                where="output",
                hint=f"it has {', '.join(encoded)}",
            )
        x, state = encoded[self.output], {"student": student}
        if self.projector:
            projected, state["projector"] = nets("projector", x, train=learns)
            x = projected["output"]
        outputs, head = nets("head", x, train=train)
        return outputs, {"head": head, **(state if self.train_encoder else {})}

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        del memory, step
        outputs, state = self._outputs(nets, batch, train=True)
        name, loss = self.label_term(outputs["logits"], batch)
        return Terms(values={name: loss}, state=state)

    def predictions(
        self, nets: Nets, batch: Batch, memory: PyTree, step: Array
    ) -> Mapping[str, Outputs]:
        """Returns `prediction`: `logits` `[b, k]` of the head."""
        del memory, step
        return {"prediction": {"logits": self._outputs(nets, batch, train=False)[0]["logits"]}}


make = Finetune
