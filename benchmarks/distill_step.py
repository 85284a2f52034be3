"""Time of a distillation step, teacher online and stored, against eager PyTorch and no teacher.

    python benchmarks/distill_step.py --nets mlp,vit,resnet20 --rounds 15 --out results.json

Every variant lives in a process of its own and the processes take turns, as in `torch_step.py`,
from which the networks are. The loss is that of Hinton et al. 2015 (T 4, ratio 0.9), the optimizer
SGD with momentum 0.9. PyTorch is eager, float32, and gets one batch in memory again and again; the
package runs the step of a config, which also gathers each batch from resident data and scales it.
"jax_cached" reads the teacher's answers from a cache filled before, "jax_student" trains on labels
alone. Reported are medians over rounds, and medians of ratios within a round: `speed_of_torch`
(above 1: faster than PyTorch with its teacher online) and `cached_over_student` (1 would be a
teacher for nothing).
"""

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import _turns
import torch_step

STUDENTS = {"mlp": 256, "vit": 2, "resnet20": 1}
"""Sizes of students, as in `torch_step.SIZES`, which are those of the teachers."""

DESCRIPTION = {
    "mlp": "784-512-512-10 teaches 784-256-256-10, batch 128",
    "vit": "192 wide, 6 deep teaches 2 deep, patch 4, 32x32x3, batch 64",
    "resnet20": "ResNet-20 teaches ResNet-8, 32x32x3, batch 128",
}
VARIANTS = {
    "torch": {},
    "torch_one_thread": {"OMP_NUM_THREADS": "1"},
    "jax": {},
    "jax_cached": {},
    "jax_student": {},
}
TEMPERATURE, ALPHA, EXAMPLES = 4.0, 0.9, 4096


def torch_kd_step(net: str) -> Callable[[], Any]:
    """Returns a distillation step in eager PyTorch."""
    import torch
    import torch.nn.functional as F

    _turns.place_torch()
    student, teacher = torch_step.torch_model(net, STUDENTS[net]), torch_step.torch_model(net)
    teacher.eval()
    h, w, c = torch_step.NETS[net]["shape"]
    x = torch.rand(torch_step.NETS[net]["batch"], c, h, w)
    y = torch.randint(0, 10, (len(x),))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)

    def step():
        optimizer.zero_grad()
        with torch.no_grad():
            target = F.log_softmax(teacher(x) / TEMPERATURE, -1)
        logits = student(x)
        soft = F.log_softmax(logits / TEMPERATURE, -1)
        kl = F.kl_div(soft, target, reduction="batchmean", log_target=True)
        loss = ALPHA * TEMPERATURE**2 * kl + (1 - ALPHA) * F.cross_entropy(logits, y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def make_config(net: str, variant: str, folder: str) -> Any:
    """Returns the config of a variant of the package."""
    from distill_jax.run import config as config_lib

    def network(size: int) -> Any:
        return {
            "mlp": lambda: config_lib.role("mlp", hidden=(size, size)),
            "vit": lambda: config_lib.role("vit", variant="tiny", depth=size),
            "resnet20": lambda: config_lib.role("resnet", depth=6 * size + 2),
        }[net]()

    config, facts = config_lib.base(), torch_step.NETS[net]
    size, _, channels = facts["shape"]
    config.data.name = "synthetic"
    config.data.kwargs = {"n_train": EXAMPLES, "image_size": size, "channels": channels}
    config.data.kwargs.num_classes = 10
    config.data.held_out, config.eval.metric = 0.0, ""
    config.data.train_transforms = config.data.eval_transforms = ("scale",)
    config.optim.name, config.optim.lr, config.optim.schedule = "momentum", 0.01, "constant"
    config.batch_size, config.total = facts["batch"], "1000 epochs"
    config.objective.name = "supervised"
    config.roles.student = network(STUDENTS[net])
    if variant != "jax_student":
        config.objective.name = "kd"
        config.objective.kwargs = {"temperature": TEMPERATURE, "alpha": ALPHA}
        config.roles.teacher = network(torch_step.SIZES[net])
        config.roles.teacher.frozen, config.roles.teacher.init = True, "unread"
    if variant == "jax_cached":
        config.cache.dir = folder
    return config


def jax_kd_step(net: str, variant: str) -> Callable[[], Any]:
    """Returns the step of a config; what the teacher says of all examples is stored before."""
    with tempfile.TemporaryDirectory() as folder:
        return _turns.config_step(make_config(net, variant, folder))


def serve(net: str, variant: str) -> None:
    """Takes turns as one variant."""
    is_torch = variant.startswith("torch")
    _turns.serve(torch_kd_step(net) if is_torch else jax_kd_step(net, variant))


def measure(net: str, rounds: int) -> dict[str, Any]:
    """Returns medians by variant, the variants taking turns in every round."""
    steps = torch_step.NETS[net]["steps"]
    times = _turns.take_turns(__file__, VARIANTS, net=net, rounds=rounds, steps=steps)
    rows = _turns.speeds(times)
    for key, suffix in (("wall", ""), ("cpu", "_cpu")):
        over = _turns.ratio(times["jax_cached"], times["jax_student"], key)
        rows["jax_cached"][f"cached_over_student{suffix}"] = over
    return {"net": DESCRIPTION[net], "rounds": rounds, **rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nets", default=",".join(STUDENTS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", default="benchmarks/results/distill_step.json")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(*args.serve.split(":"))
    _turns.report(
        args.nets.split(","),
        lambda net: measure(net, args.rounds),
        packages=torch_step.PACKAGES,
        out=args.out,
    )


if __name__ == "__main__":
    main()
