"""The first 50 losses of a run on one device, on eight, with sharded parameters, in two processes.

  python benchmarks/agreement.py --out=benchmarks/results/agreement.json

A layout changes nothing that is computed but the order of sums. In float64 all losses agree with
those of one device to 1e-8; in float32 the first to 1e-6 and the first twenty to 1e-3, relative to
the loss. Each run is a command line of its own, started as `launch/local.py` starts it.

The layout `gpu` is for a machine that has one.

Another config enters by a line of `CONFIGS`; those whose file does not exist are left out.
"""

import argparse
import io
import json
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

import _record

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEACHER = "configs/distill/supervised.py:smoke"
SMALL = ["--config.roles.student.kwargs.widths=8,16"]
WITH_TEACHER = [
    "--config.roles.teacher.kwargs.widths=8,16",
    "--config.roles.teacher.init={teacher}",
]
CONFIGS = {
    # name: (config, further flags)
    "kd": ("configs/distill/kd.py:smoke", WITH_TEACHER),
    "bilevel": ("configs/bilevel/tgeo_kd.py:smoke", WITH_TEACHER),
    "simclr": ("configs/ssl/simclr.py:smoke", []),
    "ijepa": ("configs/ssl/ijepa.py:smoke", []),
}
LAYOUTS = {
    # name: (processes, devices of each, axes of the mesh)
    "one": (1, 1, {}),
    "data_8": (1, 8, {"mesh.data": 8}),
    "fsdp_8": (1, 8, {"mesh.data": 1, "mesh.fsdp": 8, "partition.min_size": 64}),
    "processes_2x4": (2, 4, {"mesh.data": 8}),
    "gpu": (1, 0, {}),
}
LIMITS = {
    # precision: {number of first losses: largest relative difference}
    "float64": {50: 1e-8},
    "float32": {1: 1e-6, 20: 1e-3},
}
STEPS = 50


def run(config: str, flags: list[str], workdir: pathlib.Path, layout: str = "one") -> None:
    """Runs a command line to its end.

    Raises:
      SystemExit: it failed; its output is shown.
    """
    import local  # launch/local.py

    processes, devices, mesh = LAYOUTS[layout]
    args = [
        f"--config={ROOT / config}",
        f"--workdir={workdir}",
        *(f"--config.{path}={value}" for path, value in mesh.items()),
        "--config.log.tensorboard=false",
        *flags,
    ]
    os.environ["JAX_PLATFORMS"] = "cuda" if layout == "gpu" else "cpu"
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"  # not TensorFloat-32
    lines = local.commands(args, processes=processes, devices=devices, port=local.free_port())
    output = io.StringIO()
    if code := local.run(lines, grace=10, stdout=output):
        raise SystemExit(f"{config} on {layout} ended with {code}:\n{output.getvalue()[-3000:]}")


def losses(name: str, precision: str, layout: str, folder: pathlib.Path) -> list[float]:
    """Returns the losses of the first steps."""
    config, extra = CONFIGS[name]
    workdir = folder / name / precision / layout
    flags = [
        f"--config.precision={precision}",
        f"--config.total={STEPS}",
        f"--config.eval.every={STEPS}",
        "--config.log.every_steps=1",
        *(flag.format(teacher=folder / "teacher") for flag in extra),
    ]
    run(config, flags, workdir, layout)
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["train/loss"] for line in logged if "train/loss" in line}
    assert sorted(found) == list(range(1, STEPS + 1)), sorted(found)
    return [found[step] for step in sorted(found)]


def compare(name: str, folder: pathlib.Path, layouts: list[str]) -> dict[str, Any]:
    """Returns the largest relative differences from one device, by precision and layout."""
    result: dict[str, Any] = {}
    for precision, limits in LIMITS.items():
        one = losses(name, precision, "one", folder)
        rows: dict[str, Any] = {"losses_of_one_device": [one[0], one[19], one[-1]]}
        for layout in layouts:
            other = losses(name, precision, layout, folder)
            apart = [abs(a - b) / abs(a) for a, b in zip(one, other, strict=True)]
            rows[layout] = {
                "first": apart[0],
                "first_20": max(apart[:20]),
                "all_50": max(apart),
                "within_limits": all(max(apart[:n]) <= limit for n, limit in limits.items()),
            }
            print(f"{name:8} {precision} {layout:14} {json.dumps(rows[layout])}", flush=True)
        result[precision] = rows
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--configs", type=_record.some_of(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--layouts", default=",".join(list(LAYOUTS)[1:-1]))
    parser.add_argument("--out", type=pathlib.Path, help="what it holds of others stays")
    options = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "launch"))
    began, results = time.monotonic(), {}
    if options.out and options.out.exists():
        results = json.loads(options.out.read_text())["results"]
    names = [
        name for name in options.configs if (ROOT / CONFIGS[name][0].partition(":")[0]).exists()
    ]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["DISTILL_JAX_CACHE"] = f"{scratch}/cache"
        folder = pathlib.Path(scratch)
        if any(CONFIGS[name][1] for name in names):
            run(TEACHER, SMALL, folder / "teacher")
        for name in names:
            found = compare(name, folder, options.layouts.split(","))
            old = results.get(name, {})
            merged = {p: {**old.get(p, {}), **rows} for p, rows in found.items()}
            results[name] = {"config": CONFIGS[name][0], **merged}
    report = {
        "steps": STEPS,
        "seed": 0,
        "limits": LIMITS,
        "layouts": {
            name: {"processes": p, "devices": d, **m} for name, (p, d, m) in LAYOUTS.items()
        },
        "results": results,
        "seconds": round(time.monotonic() - began),
        "versions": _record.versions("jax", "jaxlib", "flax", "optax", "numpy"),
    }
    _record.write(report, options.out, show=True)


if __name__ == "__main__":
    main()
