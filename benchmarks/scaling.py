"""How time, operations, memory and exchange of a step grow with what a config can enlarge.

  python benchmarks/scaling.py --out=benchmarks/results/scaling.json

Operations, memory and collective bytes are those of the step as compiled for eight CPU devices (for
as many as stand on the axis "devices"), on each device, from shapes alone. Times are of one
device, medians over steps; the CPU time of the process tells more than the wall on a busy machine.
An exponent is the slope of a least-squares line through the logarithms; where a quantity has a
constant part it lies below that of the part that grows, so that of the last two points is given
beside it.
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEVICES, STEPS, WARM = 8, 9, 2
KD = {
    "objective": "kd",
    "model": "convnet",
    "key": "widths",
    "student": (8, 16),
    "teacher": (16, 32),
}
WIDE = {**KD, "model": "mlp", "key": "hidden", "student": (64,), "teacher": (128,)}
TABLE = {**WIDE, "num_classes": 100, "batch": 64}
BASE = {"n": 4096, "batch": 256, "num_classes": 10, "devices": DEVICES}
AXES: dict[str, tuple[dict[str, Any], str, tuple[int, ...]]] = {
    # name: (what is fixed, what grows, its values)
    "batch": (KD, "batch", (64, 128, 256, 512, 1024)),
    "devices": ({**KD, "batch": 1024}, "devices", (1, 2, 4, 8, 16, 32, 64)),
    "classes": (WIDE, "num_classes", (10, 100, 1000, 10000)),
    "data_set": (WIDE, "n", (4096, 16384, 65536)),
    "ps_kd_table": ({**TABLE, "objective": "ps_kd"}, "n", (4096, 16384, 65536)),
    "crd_table": ({**TABLE, "objective": "crd"}, "n", (4096, 16384, 65536)),
}
STATIC = ("flops", "arguments", "temporary", "peak", "collective_bytes")
TIMED = ("ms", "cpu_ms")


def points(axis: str) -> list[dict[str, Any]]:
    """Returns the points of an axis."""
    fixed, grows, values = AXES[axis]
    return [{**BASE, **fixed, grows: value} for value in values]


def make_config(point: dict[str, Any]) -> Any:
    """Returns the config of a point."""
    from distill_jax.run import config as config_lib

    config = config_lib.base()
    config.data.name, config.data.held_out, config.eval.metric = "synthetic", 0.0, ""
    config.data.kwargs = {"n_train": point["n"], "num_classes": point["num_classes"]}
    config.data.resident = "yes"
    config.data.train_transforms = config.data.eval_transforms = ("scale",)
    config.batch_size, config.total = point["batch"], "100 epochs"
    config.optim.name = "momentum"
    config.objective.name = point["objective"]
    config.roles.student = config_lib.role(point["model"], **{point["key"]: point["student"]})
    if point["objective"] == "ps_kd":
        return config
    config.roles.teacher = config_lib.role(point["model"], **{point["key"]: point["teacher"]})
    config.roles.teacher.frozen, config.roles.teacher.init = True, "unread"
    if point["objective"] == "crd":
        config.objective.kwargs = {"negatives": "memory", "num_negatives": 1024}
        for role in ("projector", "projector_of_teacher"):
            config.roles[role] = config_lib.role("projector", features=128)
    return config


def static(point: dict[str, Any]) -> dict[str, float]:
    """Returns what the compiled step says of itself."""
    from distill_jax.run import build, collectives

    experiment = build.build(make_config(point), shapes_only=True)
    step: Any = build.compile_step(experiment, build.feed_shapes(experiment))
    held, totals = collectives.memory(step), collectives.totals(collectives.of_compiled(step))
    return {
        "flops": step.cost_analysis()["flops"],
        **{name: held[name] for name in ("arguments", "temporary", "peak")},
        "collective_bytes": sum(total.nbytes for total in totals.values()),
    }


def timed(point: dict[str, Any]) -> dict[str, float]:
    """Returns the times of a step on generated data."""
    import jax

    from distill_jax.core import partition, state
    from distill_jax.run import build

    config = make_config(point)
    experiment = build.build(config)
    whole = partition.replicated(experiment.mesh)
    key = jax.device_put(jax.random.key(0), whole)
    frozen = {
        role: jax.jit(experiment.models[role].init)(
            jax.random.key(1), *state.zeros(experiment.shapes.roles[role].inputs)
        )
        for role in experiment.frozen
    }
    frozen = jax.device_put(frozen, whole)
    feed = build.Feed(experiment, seed=0, start=0)
    current = build.initial_state(experiment, key, config)
    step, wall, cpu = build.compile_step(experiment, feed(0)), [], []
    for count in range(WARM + STEPS):
        began, used = time.perf_counter(), time.process_time()
        current, metrics = step(current, frozen, feed(count), key)
        jax.block_until_ready((current, metrics))
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
    median = lambda times: round(1e3 * statistics.median(times[WARM:]), 3)  # noqa: E731
    return {"ms": median(wall), "cpu_ms": median(cpu)}


def measure(work: str, devices: int, made: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Returns what `static` or `timed` finds of each point, in a process with so many devices."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    if work == "static":
        env["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # code is not run
    command = [sys.executable, __file__, f"--serve={work}:{devices}"]
    done = subprocess.run(
        command, env=env, input=json.dumps(made), stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def serve(work: str, devices: int) -> None:
    """Measures the points that stand on stdin."""
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    one = {"static": static, "timed": timed}[work]
    print(json.dumps([one(point) for point in json.load(sys.stdin)]))


def exponents(values: tuple[int, ...], rows: list[dict[str, float]]) -> dict[str, list[float]]:
    """Returns by quantity the slope over all points and that of the last two."""
    found = {}
    for name in (*STATIC, *TIMED):
        pairs = [(x, row[name]) for x, row in zip(values, rows, strict=True) if row.get(name)]
        if len(pairs) < 2:
            continue
        logs = [(math.log(x), math.log(y)) for x, y in pairs]
        slope = statistics.linear_regression(*zip(*logs, strict=True)).slope
        (x0, y0), (x1, y1) = logs[-2:]
        found[name] = [round(slope, 2), round((y1 - y0) / (x1 - x0), 2)]
    return found


def run(axis: str) -> dict[str, Any]:
    """Measures one axis and prints its table."""
    made, (_, grows, values) = points(axis), AXES[axis]
    if grows == "devices":
        rows = [measure("static", point["devices"], [point])[0] for point in made]
    else:
        rows = measure("static", DEVICES, made)
        times = measure("timed", 1, made)
        rows = [{**row, **time} for row, time in zip(rows, times, strict=True)]
    powers = exponents(values, rows)
    names = [name for name in (*STATIC, *TIMED) if name in rows[0]]
    print(f"\n{axis:14}" + "".join(f"{name:>18}" for name in names))
    for value, row in zip(values, rows, strict=True):
        print(f"{value:<14}" + "".join(f"{row[name]:>18,.6g}" for name in names))
    shown = (f"{'/'.join(map(str, powers[name])) if name in powers else '':>18}" for name in names)
    print(f"{'exponents':14}" + "".join(shown), flush=True)
    named = [{grows: value, **row} for value, row in zip(values, rows, strict=True)]
    return {"fixed": {**made[0], grows: None}, "points": named, "exponents": powers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--axes", default=",".join(AXES))
    parser.add_argument("--out", type=pathlib.Path, help="what it holds of others stays")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        work, _, devices = options.serve.partition(":")
        return serve(work, int(devices))
    results = {}
    if options.out and options.out.exists():
        results = json.loads(options.out.read_text())["results"]
    for axis in options.axes.split(","):
        results[axis] = run(axis)
        report = {
            "results": results,
            "devices": DEVICES,
            "seed": 0,
            "cores": os.cpu_count(),
            "load_average": os.getloadavg(),
            "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        }
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
