"""Time of self-supervised steps against PyTorch with lightly's losses and heads.

    python benchmarks/ssl_torch_step.py --nets simclr_8,byol_8,vicreg_8,dino_8 --rounds 9

A net is a method and the size of its images: the configs of `configs/ssl` on digits (8) and on
clothes (28), a convolutional network of widths 16, 32, 64, batch 128, AdamW. Both sides have the
same number of parameters, which is asserted. Every variant lives in a process of its own with its
default threads, and the processes take turns (`_turns.py`).

Augmentation is left out on both sides: views are ready-made, normal noise. The package runs the
step of a config, which also gathers each batch from resident data and watches the spread of
embeddings. PyTorch is eager, float32, with the fused AdamW, and gets one batch in memory again and
again; views go through its networks together, as in the package, and moving averages are lightly's
`update_momentum`. DINO has four small views of half the size; lightly's head of it has other
layers, so that the prototypes are written here. "torch_channels_last" has that layout of memory,
"torch_one_thread" one thread; "jax" has the devices of a run, one per core for these networks, and
"jax_one_device" one.

Reported are medians over rounds, and medians of ratios within a round: `speed_of_torch` is the
throughput of a variant over that of PyTorch.
"""

import argparse
import copy
import importlib
import itertools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import _turns
import numpy as np

METHODS = ("simclr", "byol", "vicreg", "dino")
DATA = {8: "digits", 28: "fashion"}
STEPS = {8: 40, 28: 8}
VARIANTS = {
    "torch": {},
    "torch_one_thread": {"OMP_NUM_THREADS": "1"},
    "torch_channels_last": {},
    "jax": {},
    "jax_one_device": {},
}
BATCH, EXAMPLES, PROTOTYPES = 128, 1024, 128
MOMENTUM, WIDTHS = 0.99, (16, 32, 64)


def draw_views(n: int, method: str, size: int) -> dict[str, np.ndarray]:
    """Returns ready-made views `[n, v, h, w, 1]`."""
    r, half = np.random.RandomState(0), size // 2
    views = {"views": r.randn(n, 2, size, size, 1).astype(np.float32)}
    if method == "dino":
        views["local_views"] = r.randn(n, 4, half, half, 1).astype(np.float32)
    return views


def make_data(*, method: str, size: int) -> Any:
    """Returns a data set whose examples are views, for `data.name`."""
    from distill_jax.core.api import Dataset, Provenance
    from distill_jax.data.source import ArraySource

    class Views(ArraySource):
        def read(self, indices: np.ndarray) -> Mapping[str, Any]:
            return {**super().read(indices), **{k: x[indices] for k, x in views.items()}}

    views = draw_views(EXAMPLES, method, size)
    facts = Provenance("normal noise", "generated, seed 0", EXAMPLES, "", "CC0-1.0")
    source = Views(views["views"][:, 0], np.arange(EXAMPLES) % 2, facts)
    return Dataset(source, source, source, ("even", "odd"))


def make_config(method: str, size: int) -> Any:
    """Returns the shipped config without augmentation and evaluation."""
    module = importlib.import_module(f"distill_jax.configs.ssl.{method}")
    config = module.get_config("fashion" if size == 28 else "")
    config.data.name = f"{Path(__file__).stem}:make_data"
    config.data.kwargs = {"method": method, "size": size}
    config.data.train_transforms = config.data.eval_transforms = ()
    config.data.transform_kwargs = {}
    config.data.held_out, config.eval.metric, config.evaluators = 0.0, "", {}
    config.batch_size, config.total = BATCH, 100_000
    return config


def count_parameters(method: str, size: int) -> int:
    """Returns the number of parameters that learn in the package."""
    import jax

    from distill_jax.run import build

    config = make_config(method, size)
    experiment = build.build(config)
    roles = [role for role in experiment.abstract_state.params if not config.roles[role].ema_of]
    leaves = jax.tree.leaves([experiment.abstract_state.params[role] for role in roles])
    return sum(leaf.size for leaf in leaves)


def torch_networks(method: str) -> dict[str, Any]:
    """Returns the networks that learn, by role."""
    import torch
    import torch.nn.functional as F
    from lightly.models.modules.heads import ProjectionHead
    from torch import nn

    class ConvNet(nn.Module):
        def __init__(self):
            super().__init__()
            pairs = itertools.pairwise((1, *WIDTHS))
            self.convs = nn.ModuleList(nn.Conv2d(c, d, 3, 1, 1, bias=False) for c, d in pairs)
            self.norms = nn.ModuleList(nn.BatchNorm2d(d) for d in WIDTHS)

        def forward(self, x):
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = F.relu(norm(conv(x)))
                if min(x.shape[2:]) > 1:
                    x = F.avg_pool2d(x, 2)
            return x.mean((2, 3))

    class Prototypes(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(PROTOTYPES, 64))

        def forward(self, x):
            return F.linear(F.normalize(x), F.normalize(self.weight))

    def head(*widths: int, norm: bool = True, bias: bool = True):
        blocks: list[Any] = [
            (c, d, nn.BatchNorm1d(d) if norm else None, nn.ReLU(), True)
            for c, d in itertools.pairwise(widths[:-1])
        ]
        return ProjectionHead([*blocks, (*widths[-2:], None, None, bias)])

    heads = {
        "simclr": lambda: {"projector": head(64, 128, 64)},
        "byol": lambda: {"projector": head(64, 128, 64), "predictor": head(64, 128, 64)},
        "vicreg": lambda: {"projector": head(64, 128, 128, 128, bias=False)},
        "dino": lambda: {"projector": head(64, 128, 64, norm=False), "prototypes": Prototypes()},
    }
    return {"student": ConvNet(), **heads[method]()}


def torch_ssl_step(method: str, size: int, *, channels_last: bool) -> Callable[[], Any]:
    """Returns a step in eager PyTorch."""
    import torch
    from lightly import loss as losses
    from lightly.models.utils import update_momentum

    _turns.place_torch()
    torch.manual_seed(0)
    nets = torch_networks(method)
    views = {}
    for name, x in draw_views(BATCH, method, size).items():
        # View by view, so that the views of a batch are consecutive parts.
        flat = torch.tensor(x).transpose(0, 1).flatten(0, 1).permute(0, 3, 1, 2)
        views[name] = flat.contiguous()
    if channels_last:
        layout = torch.channels_last
        nets = {role: net.to(memory_format=layout) for role, net in nets.items()}
        views = {name: x.contiguous(memory_format=layout) for name, x in views.items()}
    learned = [p for net in nets.values() for p in net.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=2e-3, weight_decay=1e-4, fused=True)
    averaged = {"byol": ("student", "projector"), "dino": tuple(nets)}.get(method, ())
    targets = {role: copy.deepcopy(nets[role]) for role in averaged}
    x = views["views"]

    def through(nets, x, *roles):
        for role in roles:
            x = nets[role](x)
        return x

    def target():
        with torch.no_grad():
            return through(targets, x, *averaged).chunk(2)

    contrast = losses.NTXentLoss(temperature=0.2)
    cosine = losses.NegativeCosineSimilarity()
    statistics = losses.VICRegLoss()
    clusters = losses.DINOLoss(output_dim=PROTOTYPES)

    def simclr():
        return contrast(*through(nets, x, "student", "projector").chunk(2))

    def byol():
        p0, p1 = through(nets, x, "student", "projector", "predictor").chunk(2)
        t0, t1 = target()
        return 4 + 2 * (cosine(p0, t1) + cosine(p1, t0))

    def vicreg():
        return statistics(*through(nets, x, "student", "projector").chunk(2))

    def dino():
        every = torch.cat([nets["student"](x), nets["student"](views["local_views"])])
        s = through(nets, every, "projector", "prototypes")
        return clusters(list(target()), list(s.chunk(6)))

    value = {"simclr": simclr, "byol": byol, "vicreg": vicreg, "dino": dino}[method]

    def step():
        optimizer.zero_grad()
        loss = value()
        loss.backward()
        optimizer.step()
        for role in averaged:
            update_momentum(nets[role], targets[role], MOMENTUM)
        return loss.detach()

    return step


def parse(net: str) -> tuple[str, int]:
    """Splits the name of a net into method and size."""
    method, _, size = net.partition("_")
    if method not in METHODS or size not in map(str, DATA):
        raise SystemExit(f"no net {net!r}: one of {METHODS}, and one of {tuple(DATA)}, as simclr_8")
    return method, int(size)


def serve(net: str, variant: str) -> None:
    """Takes turns as one variant."""
    method, size = parse(net)
    if variant.startswith("jax"):
        config = make_config(method, size)
        if variant == "jax_one_device":
            config.mesh.cpu_devices = 1
        return _turns.serve(_turns.config_step(config))
    _turns.serve(torch_ssl_step(method, size, channels_last=variant == "torch_channels_last"))


def measure(net: str, rounds: int) -> dict[str, Any]:
    """Returns medians by variant, the variants taking turns in every round."""
    method, size = parse(net)
    found = sum(p.numel() for x in torch_networks(method).values() for p in x.parameters())
    ours = count_parameters(method, size)
    assert found == ours, f"{found} parameters in PyTorch and {ours} in the package"
    times = _turns.take_turns(__file__, VARIANTS, net=net, rounds=rounds, steps=STEPS[size])
    facts = {"images": f"{size}x{size}x1", "batch": BATCH, "views": 6 if method == "dino" else 2}
    return {**facts, "parameters": ours, "rounds": rounds, **_turns.speeds(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nets", default=",".join(f"{m}_{size}" for size in DATA for m in METHODS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", default="benchmarks/results/ssl_torch_step.json")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(*args.serve.split(":"))
    sys.path.append(str(Path(__file__).resolve().parents[1]))  # for the configs
    _turns.report(
        args.nets.split(","),
        lambda net: measure(net, args.rounds),
        packages=("jax", "jaxlib", "flax", "torch", "lightly"),
        out=args.out,
    )


if __name__ == "__main__":
    main()
