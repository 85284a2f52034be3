"""Losses on pairs with a learned temperature: CLIP (Radford et al. 2021, arXiv:2103.00020) and
SigLIP (Zhai et al. 2023, arXiv:2303.15343).

The first two views of an example are a pair: two augmentations, or the halves of an image (the
transform `halves`). `pairing="softmax"` is the mean cross-entropy of identifying the partner, in
both directions. `pairing="sigmoid"` is a binary classification of each pair in the batch, with a
learned bias (`losses/contrastive.py:clip_contrast`, `sigmoid_contrast`).

Deviation: both halves share one encoder and projector, since both are images.
"""

import dataclasses
from typing import ClassVar, Literal

from distill_jax.core.api import TASKS, Array, Batch, Nets, Objective, PyTree, Terms
from distill_jax.core.errors import ArgumentError
from distill_jax.losses.contrastive import Form, clip_contrast, sigmoid_contrast
from distill_jax.objectives._views import encode, project, take, views_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIP(Objective):
    """The term "pairs" on the first two `views` of the batch; metric `scale`, 1 / temperature.

    Attributes:
      pairing: "softmax" (CLIP) or "sigmoid" (SigLIP).
      form: how similarities are stored, see `losses/contrastive.py`; the values are the same.
    """

    pairing: Literal["softmax", "sigmoid"] = "softmax"
    form: Form = "dense"

    roles: ClassVar[tuple[str, ...]] = ("student", "projector", "temperature")
    tasks: ClassVar[tuple[str, ...]] = TASKS
    couples_batch: ClassVar[bool] = True

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        del memory, step
        h, state = encode(nets, "student", take(views_of(batch), 0, 2))
        z, projector = project(nets, "projector", h)
        x, y, mask = z[:, 0], z[:, 1], batch["mask"]
        learned, _ = nets("temperature", x)
        self._check(learned)
        if self.pairing == "softmax":
            value = clip_contrast(x, y, mask, learned["scale"], form=self.form)
        else:
            value = sigmoid_contrast(x, y, mask, learned["scale"], learned["bias"], form=self.form)
        return Terms(
            values={"pairs": value},
            state={"student": state, "projector": projector},
            embeddings={"student": h, "projector": z},
            metrics={"scale": learned["scale"].max()},
        )

    def _check(self, learned) -> None:
        if "scale" not in learned:
            raise ArgumentError(
                "the network of the temperature gives no scale",
                where="temperature.model",
                hint="temperature",
            )
        if ("bias" in learned) != (self.pairing == "sigmoid"):
            raise ArgumentError(
                f"pairing={self.pairing!r} and a bias that it does not use"
                if "bias" in learned
                else f"pairing={self.pairing!r} needs a bias",
                where="temperature.kwargs.bias",
                hint="leave it out" if "bias" in learned else "-10.0",
            )


make = CLIP
