"""What a day-long run on 256 TPU v5e or on GPUs would hold and exchange, from compiled programs.

  python benchmarks/scale_plan.py --out=benchmarks/results/scale_plan.json
  python benchmarks/scale_plan.py --out=benchmarks/results/scale_plan.json --page=docs/scale.md \\
      --against=benchmarks/results/accelerator.json

Compiles, from shapes alone, the step of distilling a ViT-L/16 from a ViT-L/16 at 224 px in bfloat16
with AdamW and a batch of 4096, the gradient of CLIP's loss on 32768 pairs, and the step of a
decoder of SmolLM2-135M's shape that learns from the 16 best tokens of a teacher like it, for as
many forced CPU devices as the machine of the plan has, each in a process of its own. Nothing is
run. Figures are of each device and step; docs/scale.md reads them. The parts "chip" are the core
parts of `accelerator.py` on one device; `--against` compiles nothing and writes what they plan
beside what that script measured.

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
import tempfile
import time
from typing import Any

import _record

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
DECODER = {
    # name: (devices, axes of the mesh, rows of 2048 tokens, further config)
    "h200": (1, {"data": 1}, 16, {}),
    "h200_remat": (1, {"data": 1}, 16, {"remat": True}),
    "v5e_data_256": (256, {"data": 256}, 512, {"remat": True}),
    "v5e_data_16_fsdp_16": (256, {"data": 16, "fsdp": 16}, 512, {"remat": True}),
    "v5e_data_85_model_3": (255, {"data": 85, "model": 3}, 510, {"remat": True}),
}
CHIP = ("resnet_kd", "vit_kd", "simclr", "bilevel")
AGREED = 0.15
"""Deviation from the plan up to which a measurement agrees with it."""

LENGTH, VOCABULARY, TOP = 2048, 49_152, 16
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


def decoder_config(mesh: dict[str, int], rows: int, network: dict[str, Any], folder: str) -> Any:
    """Returns the config of a distillation on rows of tokens, with a file of random ones."""
    import numpy as np

    from distill_jax.run import config as config_lib

    path = pathlib.Path(folder) / "tokens.npy"
    drawn = np.random.default_rng(0).integers(1, VOCABULARY, 2 * rows * (LENGTH + 1))
    drawn[:: LENGTH // 2] = 0
    np.save(path, drawn.astype(np.uint16))
    config = config_lib.base()
    config.data.name, config.data.held_out, config.eval.metric = "token_file", 0.0, ""
    config.data.kwargs = {"path": str(path), "vocabulary": VOCABULARY, "end": 0, "length": LENGTH}
    config.data.train_transforms = config.data.eval_transforms = ("next_token",)
    config.data.resident = "no"
    config.objective.name, config.optim.name = "token_kd", "adamw"
    sizes = {"layout": "smollm", "width": 576, "depth": 30, "heads": 9, "groups": 3}
    sizes |= {"mlp_width": 1536, "max_length": LENGTH}
    config.roles.student = config_lib.role("transformer", **sizes, **network)
    config.roles.teacher = config_lib.role("transformer", **sizes, top=TOP)
    config.roles.teacher.frozen, config.roles.teacher.init = True, "unread"
    config.precision = "bfloat16"
    config.batch_size, config.total = rows, 100_000
    if mesh.get("model", 1) > 1:
        config.partition.rules = config.partition.frozen_rules = ("networks",)
    return config_lib.override(config, {f"mesh.{axis}": size for axis, size in mesh.items()})


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
    """Compiles a step of the distillation of images."""
    devices, mesh, extra = VIT[name]
    return {"devices": devices, "mesh": mesh, **step(vit_config(mesh, extra))}


def decoder(name: str) -> dict[str, Any]:
    """Compiles a step of the distillation of tokens."""
    devices, mesh, rows, network = DECODER[name]
    with tempfile.TemporaryDirectory() as folder:
        config = decoder_config(mesh, rows, network, folder)
        found = step(config)
    kept = kept_for_backward(config.roles.student.kwargs.to_dict(), rows * mesh_share(mesh))
    shape = {"devices": devices, "mesh": mesh, "rows": rows, "network": network}
    return {**shape, **found, "kept_for_backward": kept}


def mesh_share(mesh: dict[str, int]) -> float:
    """Returns the share of a batch that a device holds."""
    return 1 / (mesh["data"] * mesh.get("fsdp", 1))


def kept_for_backward(kwargs: dict[str, Any], rows: float) -> int:
    """Returns the bytes that a student's forward pass keeps for the backward pass, without logits.

    Of autodiff itself, in bfloat16: XLA:CPU drops the barriers of rematerialization, so that the
    memory of its programs does not show it.
    """
    import jax
    import jax.numpy as jnp

    from distill_jax.core.precision import cast
    from distill_jax.models import transformer

    net = transformer.make(vocabulary=VOCABULARY, **kwargs)
    tokens = jax.ShapeDtypeStruct((round(rows), LENGTH), jnp.int32)
    params, _ = jax.eval_shape(net.init, jax.random.key(0), tokens)
    params = jax.eval_shape(lambda tree: cast(tree, jnp.bfloat16), params)

    def backward(params: Any, tokens: Any) -> Any:
        hidden = lambda p: net.apply(p, {}, {"tokens": tokens}, train=True, rngs={})[0]["hidden"]  # noqa: E731
        return jax.vjp(hidden, params)[1]

    residuals = jax.tree.leaves(jax.eval_shape(backward, params, tokens))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    return sum(x.size * x.dtype.itemsize for x in residuals) - held


def step(config: Any) -> dict[str, Any]:
    """Compiles a step of a config."""
    import jax

    from distill_jax.run import build

    experiment = build.build(config, shapes_only=True)
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
        "held": {k: sum(map(nbytes, jax.tree.leaves(tree))) for k, tree in held.items()},
        **facts(build.compile_step(experiment, fed)),
    }


def chip(part: str) -> dict[str, Any]:
    """Compiles the step of a core part of `accelerator.py` for one device, at its full size.

    Convolutions are the standard ones, of which XLA counts the operations. These are those of the
    program before optimization, as the accelerator's are. The peak is an upper bound: XLA:CPU
    computes bfloat16 products in float32.
    """
    import _accelerator_steps as steps
    import jax

    from distill_jax.models import convolution
    from distill_jax.run import build, collectives

    config = steps.make_config(part, tiny=False)
    experiment = build.build(config, shapes_only=True)
    kind = "outer" if experiment.outer is not None else "inner"
    frozen = experiment.online(experiment.abstract_frozen, kind)
    fed, key = build.feed_shapes(experiment, kind), jax.eval_shape(jax.random.key, 0)
    with convolution.portable(True):
        lowered = build.make_step(experiment, kind).lower(
            experiment.abstract_state, frozen, fed, key
        )
        compiled = lowered.compile()
    analysis = lowered.cost_analysis()
    assert isinstance(analysis, dict)
    return {"batch": config.batch_size, "flops": analysis["flops"], **collectives.memory(compiled)}


def comparison(plan: dict[str, Any], measured: dict[str, Any]) -> list[list[str]]:
    """Returns rows of figures of the core parts, planned and measured by `accelerator.py`.

    The least time is that of the operations at the peak of the device. Figures of `--tiny` are no
    measurement and are left out.

    Args:
      plan: of `chip`, by part.
      measured: the JSON of `accelerator.py`.
    """
    import accelerator

    rows = [["part", "figure", "plan", "measured", "deviation"], ["---"] * 5]
    parts = measured["parts"] if measured["purpose"] == "measurement" else {}
    for part in CHIP:
        planned = plan[f"chip:{part}"]
        row = parts.get(part, {}).get("variants", {}).get("ours", {})
        kind = next((k for k in accelerator.PEAKS if k in row.get("device_kind", "")), "H200")
        peak = accelerator.PEAKS[kind]
        figures = {
            "operations, TFLOP": (planned["flops"], row.get("flops"), 1e12),
            "peak memory, GB": (planned["peak"], row.get("peak_bytes"), 1e9),
        }
        if peak:
            least = 1e3 * planned["flops"] / peak
            figures[f"least time on one {kind}, ms"] = (least, row.get("ms"), 1)
        for name, (its, found, unit) in figures.items():
            cells = [part, name, f"{its / unit:.2f}", "", ""]
            if found:
                deviation = found / its - 1
                cells[3:] = [f"{found / unit:.2f}", f"{deviation:+.0%}"]
                cells[4] += "" if abs(deviation) <= AGREED else f", more than {AGREED:.0%}"
            rows.append(cells)
    return rows


def clip(devices: int, width: int, form: str) -> dict[str, Any]:
    """Compiles the gradient of CLIP's loss with respect to the embeddings of both sides."""
    import jax
    import jax.numpy as jnp

    from distill_jax.core import partition
    from distill_jax.losses.contrastive import clip_contrast

    mesh = partition.make_mesh()
    over_batch, whole = partition.over_batch(mesh), partition.replicated(mesh)

    def loss(pair, mask, scale):
        left, right = pair
        return clip_contrast(left, right, mask, scale, form=form).mean()

    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=over_batch)  # noqa: E731
    side = spec(PAIRS, width)
    with jax.set_mesh(mesh):
        scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
        out = (whole, (over_batch, over_batch))
        grad = jax.jit(jax.value_and_grad(loss), out_shardings=out)
        compiled = grad.lower((side, side), spec(PAIRS), scale).compile()
    return {"devices": devices, "width": width, "form": form, **facts(compiled)}


def compare(out: pathlib.Path, against: pathlib.Path, page: pathlib.Path | None) -> None:
    """Prints the comparison of a plan and a measurement, and writes it to a page.

    Args:
      out: the plan.
      against: the JSON of `accelerator.py`.
      page: whose table is replaced.
    """
    plan, measured = (json.loads(path.read_text()) for path in (out, against))
    rows = comparison(plan["results"], measured)
    body = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    print(body)
    if page:
        import scaling

        scaling.write_between(page, "benchmarks/scale_plan.py", body)


def serve(part: str) -> None:
    """Compiles one part and prints its facts."""
    kind, *args = part.split(":")
    steps = {"vit": VIT, "decoder": DECODER}
    devices = 1 if kind == "chip" else steps[kind][args[0]][0] if kind in steps else int(args[0])
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    began = time.monotonic()
    if kind == "chip":
        found = chip(args[0])
    elif kind in steps:
        found = {"vit": vit, "decoder": decoder}[kind](args[0])
    else:
        found = clip(devices, int(args[1]), args[2])
    print(json.dumps({**found, "seconds": round(time.monotonic() - began)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", default="", help="names of parts; all by default")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--against", type=pathlib.Path, help="the JSON of accelerator.py")
    parser.add_argument("--page", type=pathlib.Path, help="whose comparison is replaced")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve)
    if options.against:
        if not options.out:
            parser.error("--against needs --out, the plan")
        return compare(options.out, options.against, options.page)
    everything = [f"vit:{name}" for name in VIT] + [f"decoder:{name}" for name in DECODER]
    everything += [f"chip:{part}" for part in CHIP]
    everything += [":".join(map(str, ("clip", *c))) for c in CLIP]
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
            "versions": _record.versions("jax", "jaxlib", "flax", "optax"),
        }
        _record.write(report, options.out)


if __name__ == "__main__":
    main()
