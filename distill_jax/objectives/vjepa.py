"""V-JEPA, joint-embedding prediction on clips (Bardes et al. 2024, arXiv:2404.08471).

`L = mean |g(f(x_C), m) - sg f'(x)_m|`: I-JEPA with the absolute difference (section 3.1), on clips
with the same part of every frame hidden (`tube_masks`). Several mask types are several sets of
masks. The loss is the mean over the sets, and each set has its own context.

Deviation: masks are sampled separately for each clip.
"""

import dataclasses
from typing import ClassVar

from distill_jax.objectives._masked import LatentPrediction


@dataclasses.dataclass(frozen=True, kw_only=True)
class VJEPA(LatentPrediction):
    """`LatentPrediction` with the absolute difference."""

    distance: str = "absolute"

    suggest: ClassVar[str] = "tube_masks"


make = VJEPA
