"""Meta-Weight-Net (Shu et al. 2019, arXiv:1902.07379): a small network from losses to weights."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array, Evidence, ExampleWeighting, Nets
from distill_jax.core.errors import ArgumentError


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaWeightNet(ExampleWeighting):
    """`w = sigmoid(net(losses))`, one output for each loss term.

    One loss term and a network 1-100-1 give the paper's method. With several loss terms the network
    sees all losses of an example.

    Attributes:
      normalize: whether the weights of each loss term are divided by their mean over the batch.
    """

    normalize: bool = False

    roles: ClassVar[tuple[str, ...]] = ("weighting",)

    @property
    def couples_batch(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.normalize

    def __call__(self, nets: Nets, evidence: Evidence, step: Array) -> Array:
        del step
        losses = jnp.stack(list(evidence.loss_terms.values()), axis=1)
        outputs, _ = nets("weighting", losses)
        if outputs["logits"].shape != losses.shape:
            raise ArgumentError(
                f"the network gives {outputs['logits'].shape}, not one logit for each example "
                f"and signal {losses.shape}",
                where="weighting.outputs",
                hint=f"set it to {losses.shape[1]}",
            )
        weights = jax.nn.sigmoid(outputs["logits"])
        if not self.normalize:
            return weights
        real = evidence.mask[:, None]
        mean = (real * weights).sum(0) / jnp.maximum(real.sum(), 1)
        return weights / jnp.where(mean > 0, mean, 1)[None]


make = MetaWeightNet
