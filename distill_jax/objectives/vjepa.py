"""V-JEPA, joint-embedding prediction on clips (Bardes et al. 2024, arXiv:2404.08471).

`L = mean |g(f(x_C), m) - sg f'(x)_m|`: I-JEPA with the size of the difference (section 3.1), on
clips of which the same part of every frame is hidden (`tube_masks`). Several ways to hide parts are
several sets of masks, over which the loss is the mean; each has a context of its own.

Deviation: masks are drawn for each clip by itself.
"""

import dataclasses
from typing import ClassVar

from distill_jax.objectives._masked import LatentPrediction


@dataclasses.dataclass(frozen=True, kw_only=True)
class VJEPA(LatentPrediction):
    """`LatentPrediction` with the size of the difference."""

    distance: str = "absolute"

    suggest: ClassVar[str] = "tube_masks"


make = VJEPA
