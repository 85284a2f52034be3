"""Networks of inverted residual blocks: MobileNetV2, MobileNetV3 and EfficientNet are tables.

A block is a 1x1 expansion, a depthwise convolution, an optional gate on its channels and a linear
1x1 projection, with a shortcut where the shape stays (Sandler et al. 2018, arXiv:1801.04381).
"""

from typing import Any

import flax.linen as nn
import jax

from distill_jax.core.api import Array, Outputs
from distill_jax.models.layers import BatchNorm, Conv, Dense
from distill_jax.weights.sizes.inverted import BlockSpec, Spec

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "silu": jax.nn.silu,
    "hard_swish": jax.nn.hard_swish,
    "sigmoid": jax.nn.sigmoid,
    "hard_sigmoid": jax.nn.hard_sigmoid,
}


class Gate(nn.Module):
    """Channels times a gate computed from their means (Hu et al. 2018, arXiv:1709.01507)."""

    squeezed: int
    activations: tuple[str, str]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        inner, outer = (ACTIVATIONS[name] for name in self.activations)
        y = inner(Dense(self.squeezed, name="reduce")(x.mean((1, 2))))
        y = outer(Dense(x.shape[-1], name="expand")(y))
        return x * y[:, None, None, :]


class Block(nn.Module):
    """The residual block of a spec."""

    spec: BlockSpec
    gate: tuple[str, str]
    same: bool
    epsilon: float
    momentum: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        spec, activate = self.spec, ACTIVATIONS[self.spec.activation]

        def norm(name: str, y: Array) -> Array:
            return BatchNorm(self.momentum, self.epsilon, name=name)(y, train=train)

        y = x
        if spec.expands:
            y = Conv(spec.inner, kernel_size=1, name="expand")(y)
            y = activate(norm("expand_norm", y))
        depthwise = Conv(
            spec.inner,
            kernel_size=spec.kernel_size,
            stride=spec.stride,
            groups=spec.inner,
            same=self.same,
            name="depthwise",
        )
        y = activate(norm("depthwise_norm", depthwise(y)))
        if spec.squeezed:
            y = Gate(spec.squeezed, self.gate, name="gate")(y)
        y = norm("project_norm", Conv(spec.features, kernel_size=1, name="project")(y))
        return x + y if x.shape == y.shape and spec.stride == 1 else y


class InvertedResidualNet(nn.Module):
    """The network of a spec.

    Endpoints: `stem`, `stage1` ... of every stage, `embedding` (input of the last layer) and
    `logits`.
    """

    num_classes: int
    spec: Spec
    same: bool = True
    epsilon: float = 1e-3
    momentum: float = 0.99

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Outputs:
        spec, activate = self.spec, ACTIVATIONS[self.spec.activation]
        norm: dict[str, Any] = {"momentum": self.momentum, "epsilon": self.epsilon}
        outputs = {}
        x = Conv(spec.stem, stride=2, same=self.same, name="stem")(x)
        x = outputs["stem"] = activate(BatchNorm(**norm, name="stem_norm")(x, train=train))
        for s, blocks in enumerate(spec.stages, 1):
            for b, block in enumerate(blocks):
                made = Block(block, spec.gate, self.same, **norm, name=f"stage{s}_block{b}")
                x = made(x, train=train)
            outputs[f"stage{s}"] = x
        x = Conv(spec.head, kernel_size=1, name="last")(x)
        x = activate(BatchNorm(**norm, name="last_norm")(x, train=train))
        x = x.mean((1, 2))
        if spec.hidden:
            x = activate(Dense(spec.hidden, name="hidden")(x))
        outputs["embedding"] = x
        if self.num_classes:
            outputs["logits"] = Dense(self.num_classes, name="head")(x)
        return outputs
