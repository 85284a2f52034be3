"""What a day-long run on 256 TPU v5e or 64 H100 would hold and exchange, from compiled programs.

  python benchmarks/scale_plan.py --out=benchmarks/results/scale_plan.json

Compiles, from shapes alone, the step of distilling a ViT-L/16 from a ViT-L/16 at 224 px in bfloat16
with AdamW and a batch of 4096, and the gradient of CLIP's loss on 32768 pairs, for as many forced
CPU devices as the machine of the plan has, each in a process of its own. Nothing is run. Figures
are of each device and step; docs/scale.md reads them.

What XLA:CPU does otherwise than accelerators: it sums whole gradients where they scatter the sum
(an all-reduce in place of a reduce-scatter), computes bfloat16 products in float32 (temporaries and
sums of the `model` axis are then twice as large), and does not overlap.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from importlib.metadata import version
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
BATCH, PAIRS = 4096, 32768
VIT = {
    # name: (devices, axes of the mesh, further config)
    "v5e_data_256": (256, {"data": 256}, {}),
    "v5e_data_16_fsdp_16": (256, {"data": 16, "fsdp": 16}, {}),
    "v5e_fsdp_256": (256, {"data": 1, "fsdp": 256}, {}),
    "v5e_data_64_model_4": (256, {"data": 64, "model": 4}, {}),
    "h100_data_64": (64, {"data": 64}, {}),
    "h100_data_8_fsdp_8": (64, {"data": 8, "fsdp": 8}, {}),
    "h100_data_8_model_8": (64, {"data": 8, "model": 8}, {}),
    "h100_data_64_float32": (64, {"data": 64}, {"precision": "float32"}),
}
CLIP = [
    (devices, width, form)
    for devices in (256, 64)
    for width in (512, 768)
    for form in ("dense", "gathered", "ring")
]


def vit_config(mesh: dict[str, int], extra: dict[str, Any]) -> Any:
    """Returns the config of the distillation of a ViT-L/16."""
    from distill_jax.run import config as config_lib

    config = config_lib.base()
    config.data.name, config.data.held_out, config.eval.metric = "synthetic", 0.0, ""
    config.data.kwargs = {"n_train": 1281167, "num_classes": 1000, "image_size": 224, "channels": 3}
    config.data.resident = "no"
    config.data.train_transforms = config.data.eval_transforms = ("scale",)
    config.objective.name, config.optim.name = "kd", "adamw"
    for role in ("student", "teacher"):
        config.roles[role] = config_lib.role("vit", variant="large", patch_size=16)
    config.roles.teacher.frozen, config.roles.teacher.init = True, "unread"
    config.precision = "bfloat16"
    config.batch_size, config.total = BATCH, "300 epochs"
    if mesh.get("model", 1) > 1:
        config.partition.rules = config.partition.frozen_rules = ("transformer",)
    return config_lib.override(
        config, {**{f"mesh.{axis}": size for axis, size in mesh.items()}, **extra}
    )


def facts(compiled: Any) -> dict[str, Any]:
    """Returns operations, memory and exchange of a compiled program."""
    from distill_jax.run import collectives

    totals = collectives.totals(collectives.of_compiled(compiled))
    return {
        "flops": compiled.cost_analysis()["flops"],
        **collectives.memory(compiled),
        "collectives": [
            {"kind": kind, "devices": group, **total._asdict()}
            for (kind, group), total in totals.items()
        ],
    }


def vit(name: str) -> dict[str, Any]:
    """Compiles a step of the distillation."""
    import jax

    from distill_jax.run import build

    devices, mesh, extra = VIT[name]
    experiment = build.build(vit_config(mesh, extra), shapes_only=True)
    fed = build.feed_shapes(experiment)
    held = {
        "parameters": experiment.abstract_state.params,
        "optimizer": experiment.abstract_state.opt_state,
        "teacher": experiment.abstract_frozen,
        "batch": fed,
    }

    def nbytes(x: Any) -> int:
        shard = jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)
        return shard.size * x.dtype.itemsize

    return {
        "devices": devices,
        "mesh": mesh,
        "held": {k: sum(map(nbytes, jax.tree.leaves(tree))) for k, tree in held.items()},
        **facts(build.compile_step(experiment, fed)),
    }


def clip(devices: int, width: int, form: str) -> dict[str, Any]:
    """Compiles the gradient of CLIP's loss with respect to the embeddings of both sides."""
    import jax
    import jax.numpy as jnp

    from distill_jax.core import partition
    from distill_jax.losses.contrastive import clip_contrast

    mesh = partition.make_mesh()
    over_batch, whole = partition.over_batch(mesh), partition.replicated(mesh)

    def loss(pair, mask, scale):
        return clip_contrast(*pair, mask, scale, form=form).mean()

    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=over_batch)  # noqa: E731
    side = spec(PAIRS, width)
    with jax.set_mesh(mesh):
        scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
        out = (whole, (over_batch, over_batch))
        grad = jax.jit(jax.value_and_grad(loss), out_shardings=out)
        compiled = grad.lower((side, side), spec(PAIRS), scale).compile()
    return {"devices": devices, "width": width, "form": form, **facts(compiled)}


def serve(part: str) -> None:
    """Compiles one part and prints its facts."""
    kind, *args = part.split(":")
    devices = VIT[args[0]][0] if kind == "vit" else int(args[0])
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    began = time.monotonic()
    found = vit(args[0]) if kind == "vit" else clip(devices, int(args[1]), args[2])
    print(json.dumps({**found, "seconds": round(time.monotonic() - began)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", default="", help="names of parts; all by default")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve)
    everything = [f"vit:{name}" for name in VIT] + [":".join(map(str, ("clip", *c))) for c in CLIP]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # the code is not run
    results = {}
    if options.out and options.out.exists() and options.parts:
        results = json.loads(options.out.read_text())["results"]
    for part in options.parts.split(",") if options.parts else everything:
        command = [sys.executable, __file__, f"--serve={part}"]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        results[part] = json.loads(done.stdout.splitlines()[-1])
        print(part, json.dumps(results[part]), flush=True)
        report = {
            "batch": BATCH,
            "pairs": PAIRS,
            "results": results,
            "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        }
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
