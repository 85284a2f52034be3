"""Networks as somebody outside the package writes them, for `test_by_name.py`."""

from typing import Any

import flax.linen as nn
from flax import nnx

PIXELS = 36


class Net(nnx.Module):
    """Takes the number of classes and streams; has dropout and batch statistics inside."""

    def __init__(self, num_classes, rngs: nnx.Rngs):
        self.body = nnx.Linear(PIXELS, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(8, num_classes, rngs=rngs)

    def __call__(self, x):
        x = self.body(x.reshape(len(x), -1))
        return self.head(self.drop(nnx.relu(self.norm(x))))


class Sized(nnx.Module):
    """Names its sizes itself, and returns named outputs."""

    def __init__(self, din: int, dout: int, rngs: nnx.Rngs):
        self.out = nnx.Linear(din, dout, rngs=rngs)

    def __call__(self, x):
        x = x.reshape(len(x), -1)
        return {"logits": self.out(x), "embedding": x}


class Flattened(nnx.Module):
    """Takes the number of values of an example."""

    def __init__(self, *, in_features: int, num_classes: int, rngs: nnx.Rngs):
        self.out = nnx.Linear(in_features, num_classes, rngs=rngs)

    def __call__(self, x):
        return self.out(x.reshape(len(x), -1))


class Convolved(nnx.Module):
    """Takes the number of channels by the same name; keeps an activation."""

    def __init__(self, *, in_features: int, num_classes: int, width: int = 4, rngs: nnx.Rngs):
        self.conv = nnx.Conv(in_features, width, (3, 3), rngs=rngs)
        self.out = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv(x))
        self.activations = nnx.Intermediate(x)
        return self.out(x.mean((1, 2)))


class Open(Net):
    """Passes on keywords that it does not know."""

    def __init__(self, num_classes, **kwargs: Any):
        super().__init__(num_classes, **kwargs)


class Called(nnx.Module):
    """Draws from streams that come with the call."""

    def __init__(self, num_classes, *, rngs):
        self.out = nnx.Linear(PIXELS, num_classes, rngs=rngs)
        self.drop = nnx.Dropout(0.5)

    def __call__(self, x, *, rngs):
        return self.drop(self.out(x.reshape(len(x), -1)), rngs=rngs)


class Counted(nn.Module):
    """A Linen module with a field for the size of its input."""

    in_features: int
    num_classes: int

    @nn.compact
    def __call__(self, x):
        shape = (self.in_features, self.num_classes)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        return x.reshape(len(x), -1) @ kernel


class Zeros(nn.Module):
    """Starts from zeros, as no seed could change."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros)(x)


def factory(num_classes, *, rngs):
    return Net(num_classes, rngs)


def defaulted(num_classes, rngs: Any = None):
    return Net(num_classes, rngs)


def loose(**kwargs):
    return Net(**kwargs)


def linen(num_classes):
    return nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(num_classes)])


def built(num_classes):
    return Net(num_classes, nnx.Rngs(0))


def fixed(num_classes, *, rngs):
    del rngs
    return Net(num_classes, nnx.Rngs(0))


def pretrained(num_classes, *, rngs):
    """Has a body of its own weights and a new head."""
    net = Net(num_classes, nnx.Rngs(0))
    net.head = nnx.Linear(8, num_classes, rngs=rngs)
    return net


def nothing(num_classes, *, rngs):
    del num_classes, rngs
    return 3


class Listing(Net):
    """Returns what is neither an array nor named arrays."""

    def __call__(self, x):
        return [super().__call__(x)]
