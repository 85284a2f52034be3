"""Peers of `accelerator.py` in PyTorch, eager or compiled; needs torch and timm, not this package.

bfloat16 by autocast, channels-last convolutions, fused optimizers. One batch in memory is used
again and again; its augmentation is left out.
"""

from typing import Any

import _accelerator_workers as workers

TEMPERATURE, ALPHA, TAU = 4.0, 0.9, 0.2
LR, MOMENTUM = 1e-3, 0.9


def network(kind: str, classes: int, *, tiny: bool, size: int) -> Any:
    """Returns a network of timm: "resnet50", "vit_base" and so on."""
    import timm

    if kind.startswith("resnet"):
        if not tiny:
            return timm.create_model(kind, num_classes=classes)
        return timm.models.resnet.ResNet(
            timm.models.resnet.BasicBlock,
            (1, 1, 1, 1),
            num_classes=classes,
            channels=(8, 16, 32, 64),
        )
    sizes = {"patch_size": 16}
    if tiny:
        sizes = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    name = f"{kind}_patch16_224"
    return timm.create_model(name, num_classes=classes, img_size=size, **sizes)


def make_step(part: str, size: tuple[int, int, int], *, tiny: bool, compiled: bool) -> Any:
    """Returns a step in PyTorch, and the device."""
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.func import functional_call

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not tiny and device == "cpu":
        raise SystemExit("Error: PyTorch finds no accelerator; --tiny validates on the CPU")
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    b, pixels, classes = size
    layout = torch.channels_last
    low = torch.autocast(device, torch.bfloat16)

    def place(net):
        return net.to(device).to(memory_format=layout)

    def images(n):
        return torch.rand(n, 3, pixels, pixels, device=device).to(memory_format=layout)

    make = lambda kind, k=classes: place(network(kind, k, tiny=tiny, size=pixels))  # noqa: E731
    x, y = images(b), torch.randint(0, classes, (b,), device=device)

    def terms(logits, target):
        log_s, log_t = (F.log_softmax(z.float() / TEMPERATURE, -1) for z in (logits, target))
        kl = TEMPERATURE**2 * F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
        return F.cross_entropy(logits.float(), y, reduction="none"), kl

    if part == "simclr":
        net = make("resnet50", 0)
        width, hidden, out = net.num_features, *((64, 32) if tiny else (2048, 128))
        head = nn.Sequential(
            nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out)
        ).to(device)
        learned = nn.Sequential(net, head)
        both = torch.cat([x, x.flip(3)]).contiguous(memory_format=layout)
        other = torch.arange(2 * b, device=device).roll(b)
        alone = torch.eye(2 * b, device=device) * 1e9

        def loss_fn():
            with low:
                z = learned(both)
            z = F.normalize(z.float())
            return F.cross_entropy(z @ z.T / TAU - alone, other)
    else:
        pair = ("vit_base", "vit_small") if part == "vit_kd" else ("resnet50", "resnet18")
        teacher, learned = map(make, pair)
        teacher.eval().requires_grad_(False)

        def loss_fn():
            with low:
                with torch.no_grad():
                    target = teacher(x)
                logits = learned(x)
            label, distillation = terms(logits, target)
            return (ALPHA * distillation + (1 - ALPHA) * label).mean()

    if part in ("resnet_kd", "bilevel"):
        optimizer = torch.optim.SGD(learned.parameters(), lr=LR, momentum=MOMENTUM, fused=True)
    else:
        optimizer = torch.optim.AdamW(learned.parameters(), lr=LR, weight_decay=0.0, fused=True)

    if part == "bilevel":
        step = _bilevel(locals(), functional_call)
    else:
        forward = torch.compile(loss_fn) if compiled else loss_fn

        def step():
            optimizer.zero_grad()
            loss = forward()
            loss.backward()
            optimizer.step()
            return loss.detach()

    return step, device


def _bilevel(given: dict[str, Any], functional_call: Any) -> Any:
    """The step of a ratio network by double backward; the training step is the inner step.

    `torch.compile` has no double backward, so it compiles the teacher and the held-out pass alone.
    """
    import torch
    import torch.nn.functional as F
    from torch import nn

    student, teacher, x, y, low = (given[k] for k in ("learned", "teacher", "x", "y", "low"))
    b, _, classes = given["size"]
    device, inner, terms = given["device"], given["optimizer"], given["terms"]
    held_x, held_y = given["images"](b), torch.randint(0, classes, (b,), device=device)
    ratio = nn.Sequential(nn.Linear(9 * classes, 128), nn.ReLU(), nn.Linear(128, 1)).to(device)
    outer = torch.optim.AdamW(ratio.parameters(), lr=LR, fused=True)
    means = torch.full((b, classes), 1 / classes, device=device)
    forward = functional_call
    if given["compiled"]:
        forward, teacher = map(given["torch"].compile, (functional_call, teacher))

    def features(logits, target):
        s, t = F.softmax(logits.detach().float(), -1), F.softmax(target.float(), -1)
        g = F.one_hot(y, classes).to(s.dtype)
        return torch.cat([g - s, g - t, t - s, g - means, means - s, s, t, means, g], -1)

    def step():
        params = dict(student.named_parameters())
        with low:
            with torch.no_grad():
                target = teacher(x)
            logits = functional_call(student, params, (x,))
        label, distillation = terms(logits, target)
        alpha = ratio(features(logits, target)).sigmoid()[:, 0]
        loss = ((1 - alpha) * label + alpha * distillation).mean()
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        moved = {}
        for (name, p), grad in zip(params.items(), grads, strict=True):
            buffer = inner.state[p].get("momentum_buffer")
            moved[name] = p - LR * (grad if buffer is None else MOMENTUM * buffer + grad)
        statistics = {name: v.clone() for name, v in student.named_buffers()}
        with low:
            held_out = forward(student, (moved, statistics), (held_x,))
        value = F.cross_entropy(held_out.float(), held_y)
        for p, grad in zip(
            ratio.parameters(), torch.autograd.grad(value, list(ratio.parameters())), strict=True
        ):
            p.grad = grad
        outer.step()
        for p, grad in zip(params.values(), grads, strict=True):
            p.grad = grad.detach()
        inner.step()
        return loss.detach()

    return step


def serve(part: str, variant: str, size: tuple[int, int, int], *, tiny: bool) -> None:
    """Serves "torch" or "torch_compile" of a part."""
    import torch

    step, device = make_step(part, size, tiny=tiny, compiled=variant == "torch_compile")

    def steps(n: int) -> None:
        value: Any = None
        for _ in range(n):
            value = step()
        float(value)

    def facts() -> dict[str, Any]:
        cuda = device == "cuda"
        return {
            "device_kind": torch.cuda.get_device_name() if cuda else "cpu",
            "backend": device,
            "versions": {"torch": torch.__version__},
            "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        }

    steps(1)
    workers.serve({"loop": steps}, facts, batch=size[0])
