"""MAE, masked autoencoder (He, Chen, Xie, Li, Dollar, Girshick 2022, arXiv:2111.06377).

The encoder processes the kept patches, and a light decoder predicts the pixels of the others. The
loss is the mean squared error over the hidden patches only, whose pixels may be standardized patch
by patch (section 3). All examples have the same number of hidden patches, so the mean over examples
equals the published mean over all hidden patches of the batch.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp

from distill_jax.core import tokens
from distill_jax.core.api import TASKS, Array, Batch, Nets, Objective, PyTree, Terms
from distill_jax.core.errors import ArgumentError
from distill_jax.losses import jepa
from distill_jax.objectives._distillation import check_positive
from distill_jax.objectives._masked import check_number, masks_of, tokens_of


def cut(images: Array, t: int) -> Array:
    """Cuts images `[b, h, w, c]` into t square patches, `[b, t, p p c]`.

    Raises:
      ArgumentError: the images cannot be cut into such patches.
    """
    h, w = images.shape[1:3]
    side = math.isqrt(h * w // t)
    if images.ndim != 4 or side * side * t != h * w:
        raise ArgumentError(
            f"an input of shape {images.shape[1:]} has no {t} square patches",
            where="random_masks.patch_size",
            hint="the masks must be of the images that the network sees",
        )
    return tokens.patchify(images, patch_size=side)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAE(Objective):
    """The term "reconstruction".

    Attributes:
      norm_pix: whether the pixels of a patch are standardized by their mean and unbiased variance.
      epsilon: added to that variance. On flat backgrounds the published 1e-6 amplifies noise; use
        the square of the smallest contrast of interest.
    """

    norm_pix: bool = True
    epsilon: float = 1e-6

    roles: ClassVar[tuple[str, ...]] = ("student", "decoder")
    tasks: ClassVar[tuple[str, ...]] = TASKS
    couples_batch: ClassVar[bool] = False

    def __post_init__(self):
        check_positive(epsilon=self.epsilon)

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        del memory, step
        keep, targets, t = masks_of(batch, suggest="random_masks")[0]
        patches = cut(batch["input"], t)
        outputs, student = nets("student", batch["input"], keep, train=True)
        if "patches" in outputs:
            check_number(outputs["patches"].shape[1], t)
        seen = tokens_of(outputs, "student")
        said, decoder = nets("decoder", seen, keep, targets, patches, train=True)
        if self.norm_pix:
            patches = jepa.standardize(patches, epsilon=self.epsilon, unbiased=True)
        true = tokens.take(patches, targets)
        return Terms(
            values={"reconstruction": jepa.squared(said["output"], true)},
            state={"student": student, "decoder": decoder},
        )

    def pictures(
        self, nets: Nets, batch: Batch, memory: PyTree, step: Array
    ) -> Mapping[str, Array]:
        """Returns "prediction": the images, with hidden patches as the decoder predicts them.

        With standardized pixels, the prediction is scaled by the mean and deviation of the true
        pixels, as in the paper's figures.
        """
        del memory, step
        images = batch["input"]
        keep, targets, t = masks_of(batch, suggest="random_masks")[0]
        patches = cut(images, t)
        outputs, _ = nets("student", images, keep, train=False)
        seen = tokens_of(outputs, "student")
        decoded, _ = nets("decoder", seen, keep, targets, patches, train=False)
        pixels = decoded["output"]
        if self.norm_pix:
            true = tokens.take(patches, targets)
            scale = jnp.sqrt(true.var(-1, keepdims=True, ddof=1) + self.epsilon)
            pixels = true.mean(-1, keepdims=True) + scale * pixels
        rows = jnp.arange(len(images))[:, None, None]
        filled = patches.at[rows, targets].set(pixels.astype(patches.dtype))
        return {"prediction": tokens.unpatchify(filled, shape=images.shape[1:])}


make = MAE
