"""T-JEPA, joint-embedding prediction on tables (Thimonier et al. 2025, arXiv:2410.05016).

From the encoded tokens of some columns of a row, a predictor computes the tokens of other columns.
The targets are the tokens of the moving average of the encoder, applied to the whole row (section
3). No augmentation is needed. Tokens without a column ("regularization tokens", `registers` of
`tabular_transformer`) are always kept and never predicted. The representation is all tokens of
`target`.

Deviation: the numbers of kept and predicted columns are the same in all batches (`column_masks`).
"""

import dataclasses
from typing import ClassVar

from distill_jax.objectives._masked import LatentPrediction


@dataclasses.dataclass(frozen=True, kw_only=True)
class TJEPA(LatentPrediction):
    """`LatentPrediction` with the squared difference, and true tokens without standardization."""

    distance: str = "squared"
    target_norm: bool = False

    suggest: ClassVar[str] = "column_masks"


make = TJEPA
