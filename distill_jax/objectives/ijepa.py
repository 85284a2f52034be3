"""I-JEPA, image-based joint-embedding prediction (Assran et al. 2023, arXiv:2301.08243).

From the tokens of a large window of an image, a predictor computes the tokens of some blocks of the
image. The targets are the tokens of these blocks from the moving average of the encoder, applied to
the whole image (section 3).

As in the authors' program, true tokens are standardized with an epsilon of 1e-5, and the distance
is smooth L1 where the paper writes a sum of squares. Deviations: all blocks have one size
(`block_masks`), positions may be learned, and the loss is a mean over tokens and features. Contexts
are larger: 78 of 196 tokens with `keep=0.4`. The authors' program cuts all contexts of a batch to
the smallest and has 52 to 76.
"""

from distill_jax.objectives._masked import LatentPrediction


def make(
    *,
    distance: str = "smooth_l1",
    target_norm: bool = True,
    moving_average: bool = True,
    stop_gradient: bool = True,
) -> LatentPrediction:
    """Returns the objective; see `LatentPrediction`."""
    return LatentPrediction(
        distance=distance,
        target_norm=target_norm,
        moving_average=moving_average,
        stop_gradient=stop_gradient,
    )
