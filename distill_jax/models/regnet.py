"""RegNetX and RegNetY (Radosavovic et al. 2020, arXiv:2003.13678).

The widths of the blocks are a line that is rounded to powers and then to multiples (equations 2 to
4); blocks of equal width are a stage. Y has gates (squeeze and excitation) of a quarter of a
block's input.
"""

import flax.linen as nn
import jax

from distill_jax.core import ranges
from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.models._inverted import Gate
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import BatchNorm, Conv, Dense
from distill_jax.weights.sizes.stages import REGNETS, regnet


class Block(nn.Module):
    """1x1, grouped 3x3, an optional gate, 1x1, and a shortcut."""

    features: int
    group: int
    stride: int
    squeezed: int

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        d, s = self.features, self.stride

        def norm(name: str, y: Array) -> Array:
            return BatchNorm(name=name)(y, train=train)

        y = jax.nn.relu(norm("norm1", Conv(d, kernel_size=1, name="conv1")(x)))
        y = Conv(d, stride=s, groups=d // self.group, name="conv2")(y)
        y = jax.nn.relu(norm("norm2", y))
        if self.squeezed:
            y = Gate(self.squeezed, ("relu", "sigmoid"), name="gate")(y)
        y = norm("norm3", Conv(d, kernel_size=1, name="conv3")(y))
        if x.shape != y.shape:
            x = Conv(d, kernel_size=1, stride=s, name="shortcut")(x)
            x = norm("shortcut_norm", x)
        return jax.nn.relu(x + y)


class RegNet(nn.Module):
    """The network of `make`."""

    num_classes: int
    stages: tuple[tuple[int, int, int], ...]
    gates: bool

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Outputs:
        outputs = {}
        x = BatchNorm(name="stem_norm")(Conv(32, stride=2, name="stem")(x), train=train)
        x = outputs["stem"] = jax.nn.relu(x)
        for s, (width, group, repeats) in enumerate(self.stages, 1):
            for b in range(repeats):
                squeezed = round(x.shape[-1] * 0.25) if self.gates else 0
                block = Block(width, group, 1 if b else 2, squeezed, name=f"stage{s}_block{b}")
                x = block(x, train=train)
            outputs[f"stage{s}"] = x
        x = outputs["embedding"] = x.mean((1, 2))
        if self.num_classes:
            outputs["logits"] = Dense(self.num_classes, name="head")(x)
        return outputs


def make(*, num_classes: int, variant: str = "y_002", max_depth: int = 0) -> Model:
    """Returns a RegNet for images `[b, h, w, c]` of any size.

    Endpoints: `stem`, `stage1` to `stage4`, `embedding` and `logits`.

    Args:
      num_classes: k; 0 leaves the last layer and `logits` out.
      variant: such as "x_002" or "y_032": X or Y, and flops in units of 1e8.
      max_depth: most blocks of a stage; 0 for all of them.

    Raises:
      ArgumentError: the variant does not exist.
    """
    ranges.counts(num_classes=num_classes, max_depth=max_depth)
    if variant not in REGNETS:
        raise ArgumentError(
            f"no RegNet {variant!r}", where="variant", hint=nearest(variant, REGNETS)
        )
    stages = regnet(REGNETS[variant])
    if max_depth:
        stages = tuple((width, group, min(n, max_depth)) for width, group, n in stages)
    return from_linen(RegNet(num_classes, stages, variant.startswith("y")))
