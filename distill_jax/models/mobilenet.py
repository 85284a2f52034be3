"""MobileNetV2 and MobileNetV3 for ImageNet.

V2: Sandler et al. 2018, arXiv:1801.04381, table 2. V3: Howard et al. 2019, arXiv:1905.02244, tables
1 and 2; its gates squeeze to a quarter of the expanded channels. `mobilenet_v2.py` has the variant
of the distillation literature for images of 32x32.
"""

from distill_jax.core import ranges
from distill_jax.core.api import Model
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.models._inverted import InvertedResidualNet
from distill_jax.models.adapters import from_linen
from distill_jax.weights.sizes.inverted import mobilenet


def make(
    *,
    num_classes: int,
    variant: str = "v2",
    width_multiplier: float = 1.0,
    max_depth: int = 0,
    padding: str = "symmetric",
    epsilon: float = 1e-5,
    momentum: float = 0.9,
) -> Model:
    """Returns a MobileNet for images `[b, h, w, c]` of any size.

    Endpoints: `stem`, `stage1` to `stage7` (V2), `stage6` (V3 large) or `stage5` (V3 small),
    `embedding` and `logits`.

    Args:
      num_classes: k; 0 leaves the last layer and `logits` out.
      variant: "v2", "v3_large" or "v3_small".
      width_multiplier: of all widths.
      max_depth: most blocks of a stage; 0 for all of them.
      padding: "symmetric", half a kernel on every side, or "same" as TensorFlow pads.
      epsilon: of the batch norms; 1e-3 in networks from TensorFlow or torchvision's V3.
      momentum: of the batch norms' running statistics.

    Raises:
      ArgumentError: an unknown variant or padding, or a number out of its range.
    """
    ranges.counts(num_classes=num_classes, max_depth=max_depth)
    ranges.within("(0, 100]", width_multiplier=width_multiplier)
    ranges.rates(momentum=momentum)
    ranges.within("(0, 1]", epsilon=epsilon)
    if padding not in (known := ("same", "symmetric")):
        raise ArgumentError(
            f"no padding {padding!r}", where="padding", hint=nearest(padding, known)
        )
    spec = mobilenet(variant, width_multiplier, max_depth)
    return from_linen(InvertedResidualNet(num_classes, spec, padding == "same", epsilon, momentum))
