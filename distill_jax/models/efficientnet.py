"""EfficientNet (Tan & Le 2019, arXiv:1905.11946, table 1) and its Lite variants.

B0 scaled in width and depth gives B1 to B7. Lite variants, for devices without fast sigmoids, have
no gates and ReLU6, and their stem, first stage's depth, last stage's depth and head are not scaled
(tensorflow/tpu, models/official/efficientnet/lite).
"""

from distill_jax.core import ranges
from distill_jax.core.api import Model
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.models._inverted import InvertedResidualNet
from distill_jax.models.adapters import from_linen
from distill_jax.weights.sizes.inverted import efficientnet


def make(
    *,
    num_classes: int,
    variant: str = "b0",
    width_multiplier: float = 0.0,
    depth_multiplier: float = 0.0,
    padding: str = "same",
    epsilon: float = 1e-3,
    momentum: float = 0.99,
) -> Model:
    """Returns an EfficientNet for images `[b, h, w, c]` of any size.

    Endpoints: `stem`, `stage1` to `stage7`, `embedding` and `logits`.

    Args:
      num_classes: k; 0 leaves the last layer and `logits` out.
      variant: "b0" to "b7" or "lite0" to "lite4".
      width_multiplier: of all widths, in place of the variant's; 0 keeps it.
      depth_multiplier: of the repeats, in place of the variant's; 0 keeps it.
      padding: "same" as TensorFlow pads, or "symmetric", half a kernel on every side.
      epsilon: of the batch norms; networks that were trained in PyTorch have 1e-5.
      momentum: of the batch norms' running statistics.

    Raises:
      ArgumentError: an unknown variant or padding, or a number out of its range.
    """
    ranges.counts(num_classes=num_classes)
    ranges.within("[0, 100]", width_multiplier=width_multiplier, depth_multiplier=depth_multiplier)
    ranges.rates(momentum=momentum)
    ranges.within("(0, 1]", epsilon=epsilon)
    if padding not in (known := ("same", "symmetric")):
        raise ArgumentError(
            f"no padding {padding!r}", where="padding", hint=nearest(padding, known)
        )
    spec = efficientnet(variant, width_multiplier, depth_multiplier)
    return from_linen(InvertedResidualNet(num_classes, spec, padding == "same", epsilon, momentum))
