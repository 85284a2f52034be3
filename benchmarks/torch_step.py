"""Time of a training step against eager PyTorch on the same machine: same nets, batch, optimizer.

    python benchmarks/torch_step.py --nets mlp,vit,resnet20 --rounds 15 --out results.json

Every variant lives in a process of its own; the processes take turns, a few steps each, so that a
busy machine slows all of them alike. Reported are medians over rounds of wall and process CPU
time, and of the ratio of PyTorch's step time to each variant's in the same round (above 1: faster
than PyTorch). The baseline is eager, float32 and, for images, NCHW; "torch_channels_last" stands
beside it, and "torch_one_thread": PyTorch's threads wait for each other in a spin, which costs much
where other programs want the same cores. All steps are cross-entropy, SGD with momentum 0.9, on
random data in memory.

With JAX_PLATFORMS=cuda both sides are on the GPU; name the variants torch, torch_channels_last, jax
and jax_bfloat16.
"""

import argparse
from collections.abc import Callable
from typing import Any

import _record
import _turns

NETS = {
    "mlp": {"batch": 128, "shape": (28, 28, 1), "steps": 120},
    "vit": {"batch": 64, "shape": (32, 32, 3), "steps": 2},
    "resnet20": {"batch": 128, "shape": (32, 32, 3), "steps": 2},
}
DESCRIPTION = {
    "mlp": "784-512-512-10, batch 128",
    "vit": "192 wide, 6 deep, 3 heads, patch 4, class token, 32x32x3, batch 64",
    "resnet20": "ResNet-20, 32x32x3, batch 128",
}
VARIANTS = {
    "torch": {},
    "torch_one_thread": {"OMP_NUM_THREADS": "1"},
    "torch_channels_last": {"nets": ("resnet20",)},
    "jax": {},
    "jax_lax_conv": {"nets": ("resnet20",)},
    "jax_two_devices": {},
    "jax_bfloat16": {},
    "jax_fast_compile": {"XLA_FLAGS": "--xla_cpu_opt_preset=FAST_COMPILE"},
    "jax_keep_memory": {},
    "jax_two_devices_keep_memory": {},
}
PACKAGES = ("jax", "jaxlib", "flax", "torch")

SIZES = {"mlp": 512, "vit": 6, "resnet20": 3}
"""Hidden width, depth, and blocks in a stage."""


def torch_model(net: str, size: int = 0) -> Any:
    """Returns the network in PyTorch; `size` in place of that of `SIZES`."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        def __init__(self, c, d, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(c, d, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(d, d, 3, 1, 1, bias=False)
            self.bn1, self.bn2 = nn.BatchNorm2d(d), nn.BatchNorm2d(d)
            self.short = nn.Identity()
            if c != d:
                conv = nn.Conv2d(c, d, 1, stride, bias=False)
                self.short = nn.Sequential(conv, nn.BatchNorm2d(d))

        def forward(self, x):
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            return F.relu(y + self.short(x))

    class Layer(nn.Module):
        def __init__(self, d, heads):
            super().__init__()
            self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(d), nn.LayerNorm(d)
            self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
            self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

        def forward(self, x):
            b, t, d = x.shape
            q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d)
            x = x + self.out(y)
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class ViT(nn.Module):
        def __init__(self, depth, d=192, heads=3):
            super().__init__()
            self.patches = nn.Conv2d(3, d, 4, 4)
            self.cls = nn.Parameter(torch.zeros(1, 1, d))
            self.positions = nn.Parameter(torch.randn(1, 65, d) * 0.02)
            self.layers = nn.Sequential(*[Layer(d, heads) for _ in range(depth)])
            self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
            return self.head(self.norm(self.layers(x))[:, 0])

    n = size or SIZES[net]
    if net == "mlp":
        hidden = (nn.Linear(784, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU())
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(n, 10))
    if net == "vit":
        return ViT(n)
    widths = [(16, 16, 1)] * n + [(16, 32, 2)] + [(32, 32, 1)] * (n - 1)
    widths += [(32, 64, 2)] + [(64, 64, 1)] * (n - 1)
    stem = (nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(*stem, *[Block(*w) for w in widths], *head)


def torch_step(net: str, variant: str) -> Callable[[], Any]:
    """Returns a training step in eager PyTorch."""
    import torch
    import torch.nn.functional as F

    _turns.place_torch()
    model = torch_model(net)
    h, w, c = NETS[net]["shape"]
    x = torch.randn(NETS[net]["batch"], c, h, w)
    y = torch.randint(0, 10, (NETS[net]["batch"],))
    if variant == "torch_channels_last":
        model = model.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def jax_model(net: str) -> Any:
    """Returns the same network of the package."""
    from distill_jax.models import mlp, resnet, vit

    return {
        "mlp": lambda: mlp.make(num_classes=10, hidden=(512, 512)),
        "vit": lambda: vit.make(num_classes=10, variant="tiny", depth=6),
        "resnet20": lambda: resnet.make(num_classes=10, depth=20),
    }[net]()


def jax_step(net: str, variant: str) -> Callable[[], Any]:
    """Returns a jitted training step of the package's network."""
    import jax

    devices = 2 if "two_devices" in variant else 1
    jax.config.update("jax_num_cpu_devices", devices)
    import jax.numpy as jnp
    import optax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from distill_jax.models import convolution, layers

    if variant == "jax_lax_conv":
        layers.conv2d = convolution._conv
    if variant.endswith("keep_memory"):
        import ctypes

        libc = ctypes.CDLL(None)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX of glibc
        assert all((libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1), libc.mallopt(-8, 1)))
    model = jax_model(net)
    batch, shape = NETS[net]["batch"], NETS[net]["shape"]
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    x = jax.device_put(jax.random.normal(jax.random.key(0), (batch, *shape)), split)
    y = jax.device_put(jax.random.randint(jax.random.key(1), (batch,), 0, 10), split)
    tx = optax.sgd(0.01, momentum=0.9)
    dtype = jnp.bfloat16 if variant == "jax_bfloat16" else jnp.float32

    def init(key):
        params, state = model.init(key, x)
        return params, state, tx.init(params)

    carry = jax.jit(init, out_shardings=whole)(jax.random.key(2))

    def train(carry, x, y):
        params, state, opt_state = carry

        def loss(params):
            low, image = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, x))
            outputs, new = model.apply(low, state, image, train=True, rngs={})
            logits = outputs["logits"].astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new

        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), state, opt_state), value

    compiled = jax.jit(train, donate_argnums=0)

    def step():
        nonlocal carry
        carry, value = compiled(carry, x, y)
        return value

    return step


def serve(net: str, variant: str) -> None:
    """Takes turns as one variant."""
    _turns.serve((torch_step if variant.startswith("torch") else jax_step)(net, variant))


def measure(net: str, variants: list[str], rounds: int) -> dict[str, Any]:
    """Returns medians by variant, the variants taking turns in every round."""
    env = {name: {k: v for k, v in VARIANTS[name].items() if k != "nets"} for name in variants}
    times = _turns.take_turns(__file__, env, net=net, rounds=rounds, steps=NETS[net]["steps"])
    return {"net": DESCRIPTION[net], "rounds": rounds, **_turns.speeds(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nets", default="mlp,vit,resnet20")
    parser.add_argument("--variants", type=_record.some_of(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", default="benchmarks/results/torch_step.json")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(*args.serve.split(":"))

    def measure_net(net: str) -> dict[str, Any]:
        names = [n for n in args.variants if net in VARIANTS[n].get("nets", (net,))]
        return measure(net, ["torch", *[n for n in names if n != "torch"]], args.rounds)

    _turns.report(args.nets.split(","), measure_net, packages=PACKAGES, out=args.out)


if __name__ == "__main__":
    main()
