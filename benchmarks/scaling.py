"""How time, operations, memory and exchange of a step grow with what a config can enlarge.

  python benchmarks/scaling.py --out=benchmarks/results/scaling.json --page=docs/scale.md
  python benchmarks/scaling.py --static

Operations, memory and collective bytes are those of the step as compiled for eight CPU devices (for
as many as stand on the axis "devices"), on each device, from shapes alone. Times are of one device,
medians over steps; a growth of processor time is checked, that of wall time is not, since other
programs on the machine enter it. `--static` compiles the last two points of each axis and times
nothing.

An exponent is the slope of a least-squares line through the logarithms; where a quantity has a
constant part it lies below that of the part that grows, so that of the last two points is given
beside it. The latter is checked, but of processor time the former: arrays that outgrow a cache make
one part of the curve steep. The command ends with code 1 if an exponent exceeds `EXPECTED`, and
names each that does.
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEVICES, WARM = 8, 2
STEPS, SECONDS = (9, 300), 1.0
"""A point is timed for so many seconds, within these numbers of steps."""

KD = {
    "objective": "kd",
    "model": "convnet",
    "key": "widths",
    "student": (8, 16),
    "teacher": (16, 32),
}
WIDE = {**KD, "model": "mlp", "key": "hidden", "student": (64,), "teacher": (128,)}
TABLE = {**WIDE, "num_classes": 100, "batch": 64}
LANGUAGE = {"objective": "next_token", "model": "transformer", "batch": 8}
BASE = {"n": 4096, "batch": 256, "num_classes": 10, "devices": DEVICES}
AXES: dict[str, tuple[dict[str, Any], str, tuple[int, ...]]] = {
    # name: (what is fixed, what grows, its values)
    "batch": (KD, "batch", (64, 128, 256, 512, 1024)),
    "devices": ({**KD, "batch": 1024}, "devices", (1, 2, 4, 8, 16, 32, 64)),
    "classes": (WIDE, "num_classes", (10, 100, 1000, 10000)),
    "data_set": (WIDE, "n", (4096, 16384, 65536)),
    "ps_kd_table": ({**TABLE, "objective": "ps_kd"}, "n", (4096, 16384, 65536)),
    "crd_table": ({**TABLE, "objective": "crd"}, "n", (4096, 16384, 65536)),
    "sequence": ({**LANGUAGE, "vocabulary": 256}, "length", (128, 256, 512, 1024)),
    "vocabulary": ({**LANGUAGE, "length": 128}, "vocabulary", (1024, 4096, 16384, 65535)),
    "replicas": (
        {"objective": "supervised", "model": "mlp", "batch": 64},
        "replicas",
        (8, 16, 32, 64),
    ),
}
TITLES = {
    "data_set": "resident data, examples",
    "ps_kd_table": "PS-KD table, examples",
    "crd_table": "CRD tables, examples",
    "sequence": "sequence length",
}
STATIC = ("flops", "arguments", "temporary", "peak", "collective_bytes")
TIMED = ("ms", "cpu_ms")
NAMES = {
    "flops": "operations",
    "arguments": "arguments",
    "temporary": "temporaries",
    "peak": "peak",
    "collective_bytes": "collective bytes",
    "cpu_ms": "CPU time",
}


class Expected(NamedTuple):
    """Upper bounds of the exponents of an axis.

    Attributes:
      flops, arguments, temporary, peak, collective_bytes: of each device.
      cpu_ms: of one device.
      reason: for the bounds.
    """

    flops: float
    arguments: float
    temporary: float
    peak: float
    collective_bytes: float
    cpu_ms: float
    reason: str


EXPECTED = {
    "batch": Expected(
        1, 0, 1, 1, 0, 1, "each example costs the same; the gradient that is exchanged has one size"
    ),
    "devices": Expected(
        -1, 0, -1, 0, 0, 1, "the batch is divided; parameters, data and the gradient are not"
    ),
    "classes": Expected(
        1, 1, 1, 1, 1, 1, "the last layer and its outputs, and the gradient of that layer"
    ),
    "data_set": Expected(
        0, 1, 0, 1, 0, 0, "the data are arguments, of which a step gathers one batch"
    ),
    "ps_kd_table": Expected(
        0, 1, 0, 1, 0, 0, "the table is an argument, of which a step reads and writes one batch"
    ),
    "crd_table": Expected(
        0, 1, 0, 1, 0, 0, "as of PS-KD; the number of negatives does not depend on the table"
    ),
    "sequence": Expected(
        2, 1, 2, 2, 0, 2, "attention that is written out has a matrix [t, t] for each head"
    ),
    "vocabulary": Expected(
        1, 1, 1, 1, 1, 1, "the embedding, its optimizer's state and gradient; logits come in chunks"
    ),
    "replicas": Expected(
        1, 1, 1, 1, 0, 1, "each replica is a run of its own and exchanges nothing with others"
    ),
}
TOLERANCE = {**dict.fromkeys(STATIC, 0.05), "cpu_ms": 0.3}
"""By which an exponent may exceed its bound; caches and other programs enter times."""


def points(axis: str) -> list[dict[str, Any]]:
    """Returns the points of an axis."""
    fixed, grows, values = AXES[axis]
    return [{**BASE, **fixed, grows: value} for value in values]


def make_config(point: Mapping[str, Any], folder: pathlib.Path) -> Any:
    """Returns the config of a point; `folder` takes the file of its tokens."""
    from distill_jax.run import config as config_lib

    config = config_lib.base()
    config.data.held_out, config.eval.metric = 0.0, ""
    config.objective.name, config.batch_size = point["objective"], point["batch"]
    config.optim.name, config.total = "momentum", "100 epochs"
    if "length" in point:
        return _language(config, point, folder)
    config.data.name = "synthetic"
    config.data.kwargs = {"n_train": point["n"], "num_classes": point["num_classes"]}
    config.data.resident = "yes"
    config.data.train_transforms = config.data.eval_transforms = ("scale",)
    if "replicas" in point:
        config.roles.student = config_lib.role("mlp", hidden=(64,))
        config.log.tensorboard, config.study.arms = False, {"alone": {}}
        config.study.reference, config.study.seeds = "alone", tuple(range(point["replicas"]))
        config.study.replicas = "yes"
        return config
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


def _language(config: Any, point: Mapping[str, Any], folder: pathlib.Path) -> Any:
    """Completes the config of a small decoder on random tokens."""
    import numpy as np

    from distill_jax.run import config as config_lib

    length, vocabulary = point["length"], point["vocabulary"]
    path = folder / f"{length}-{vocabulary}.npy"
    tokens = np.random.default_rng(0).integers(1, vocabulary, 4 * point["batch"] * (length + 1))
    tokens[:: length // 2] = 0
    np.save(path, tokens.astype(np.uint16))
    config.data.name = "token_file"
    config.data.kwargs = {"path": str(path), "vocabulary": vocabulary, "end": 0, "length": length}
    config.data.train_transforms = config.data.eval_transforms = ("next_token",)
    config.data.resident, config.total = "no", 1000
    sizes = {"width": 64, "depth": 2, "heads": 4, "max_length": length}
    config.roles.student = config_lib.role("transformer", **sizes)
    return config


def replicas_program(config: Any, folder: pathlib.Path) -> tuple[Any, Any]:
    """Returns the compiled program of a study's replicas, and their first state."""
    from distill_jax.contrib import replicas
    from distill_jax.run import build, study
    from distill_jax.run.train.run import Run

    members = [
        replicas.Member("alone", seed, study.arm_config(config, "alone", seed, folder), folder, "")
        for seed in config.study.seeds
    ]
    experiments = replicas.make_experiments(members, build.build)
    program = replicas.Replicas(members, experiments)
    share = 1 / len(members)
    program.runs = [
        Run(
            m.config,
            folder / str(m.seed),
            e,
            arm="",
            reported="",
            share=share,
            log_line=lambda line: None,
        )
        for m, e in zip(members, experiments, strict=True)
    ]
    state, _ = program.start()
    program.compile(0)
    return program, state


def static(point: Mapping[str, Any], folder: pathlib.Path) -> dict[str, float]:
    """Returns what the compiled step says of itself."""
    from distill_jax.run import build, collectives

    config = make_config(point, folder)
    if "replicas" in point:
        step: Any = replicas_program(config, folder)[0].update["inner"]
    else:
        experiment = build.build(config, shapes_only=True)
        step = build.compile_step(experiment, build.feed_shapes(experiment))
    held, totals = collectives.memory(step), collectives.totals(collectives.of_compiled(step))
    return {
        "flops": step.cost_analysis()["flops"],
        **{name: held[name] for name in ("arguments", "temporary", "peak")},
        "collective_bytes": sum(total.nbytes for total in totals.values()),
    }


def timed(point: Mapping[str, Any], folder: pathlib.Path) -> dict[str, float]:
    """Returns the times of a step on generated data."""
    import jax

    advance = _replicas_step(point, folder) if "replicas" in point else _step(point, folder)
    wall, cpu, ends = [], [], math.inf
    while len(wall) < WARM + STEPS[0] or (len(wall) < STEPS[1] and time.perf_counter() < ends):
        began, used = time.perf_counter(), time.process_time()
        jax.block_until_ready(advance(len(wall)))
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
        if len(wall) == WARM:
            ends = time.perf_counter() + SECONDS
    median = lambda times: round(1e3 * statistics.median(times[WARM:]), 3)  # noqa: E731
    return {"ms": median(wall), "cpu_ms": median(cpu)}


def _step(point: Mapping[str, Any], folder: pathlib.Path) -> Callable[[int], Any]:
    import jax

    from distill_jax.core import partition, state
    from distill_jax.run import build

    config = make_config(point, folder)
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
    step = build.compile_step(experiment, feed(0))

    def advance(count: int) -> Any:
        nonlocal current
        current, metrics = step(current, frozen, feed(count), key)
        return current, metrics

    return advance


def _replicas_step(point: Mapping[str, Any], folder: pathlib.Path) -> Callable[[int], Any]:
    program, state = replicas_program(make_config(point, folder), folder)

    def advance(count: int) -> Any:
        nonlocal state
        step = program.update["inner"]
        state, metrics = step(state, program.online, program.feed(count), program.key)
        return state, metrics

    return advance


def measure(work: str, devices: int, made: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
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
    one, rows = {"static": static, "timed": timed}[work], []
    for point in json.load(sys.stdin):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(one(point, pathlib.Path(folder)))
    print(json.dumps(rows))


def exponents(values: Sequence[int], rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Returns by quantity the slope over all points and that of the last two.

    Bytes and operations below 1 count as 1, so that what is never there does not grow.
    """
    found = {}
    for name in (*STATIC, *TIMED):
        if name not in rows[0]:
            continue
        least = 1.0 if name in STATIC else 1e-3
        ys = [max(row[name], least) for row in rows]
        logs = [(math.log(x), math.log(y)) for x, y in zip(values, ys, strict=True)]
        slope = statistics.linear_regression(*zip(*logs, strict=True)).slope
        (x0, y0), (x1, y1) = logs[-2:]
        found[name] = [round(slope, 2), round((y1 - y0) / (x1 - x0), 2)]
    return found


def checked(name: str, powers: Mapping[str, Sequence[float]]) -> float:
    """Returns the exponent of a quantity that has a bound."""
    return powers[name][0 if name in TIMED else -1]


def exceeded(axis: str, powers: Mapping[str, Sequence[float]]) -> list[str]:
    """Returns a line for each quantity whose exponent is above its bound.

    Args:
      axis: of `AXES`.
      powers: from `exponents`.
    """
    expected, lines = EXPECTED[axis], []
    for name, tolerance in TOLERANCE.items():
        if name not in powers:
            continue
        found, bound = checked(name, powers), getattr(expected, name)
        if not found <= bound + tolerance:
            lines.append(
                f"{axis}: the exponent of {name} is {found}, expected at most {bound}"
                f" (+ {tolerance}): {expected.reason}"
            )
    return lines


def run(axis: str, *, times: bool) -> dict[str, Any]:
    """Measures one axis and prints its table."""
    made, (_, grows, values) = points(axis), AXES[axis]
    if not times:
        made, values = made[-2:], values[-2:]
    if grows == "devices":
        rows = [measure("static", point["devices"], [point])[0] for point in made]
    else:
        rows = measure("static", DEVICES, made)
        if times:
            timings = measure("timed", 1, made)
            rows = [{**row, **timing} for row, timing in zip(rows, timings, strict=True)]
    powers = exponents(values, rows)
    names = [name for name in (*STATIC, *TIMED) if name in rows[0]]
    print(f"\n{axis:14}" + "".join(f"{name:>18}" for name in names))
    for value, row in zip(values, rows, strict=True):
        print(f"{value:<14}" + "".join(f"{row[name]:>18,.6g}" for name in names))
    shown = (f"{'/'.join(map(str, powers[name])) if name in powers else '':>18}" for name in names)
    print(f"{'exponents':14}" + "".join(shown), flush=True)
    named = [{grows: value, **row} for value, row in zip(values, rows, strict=True)]
    return {"fixed": {**made[0], grows: None}, "points": named, "exponents": powers}


def table(results: Mapping[str, Any]) -> str:
    """Returns the Markdown of the exponents that are checked, with their bounds."""
    lines = [["grows", "from, to", *NAMES.values()], ["---"] * (2 + len(NAMES))]
    for axis, result in results.items():
        values = AXES[axis][2]
        powers, expected = result["exponents"], EXPECTED[axis]
        cells = [
            f"{checked(name, powers):.2f} ({getattr(expected, name)})" if name in powers else ""
            for name in NAMES
        ]
        lines.append([TITLES.get(axis, axis), f"{values[0]:,}, {values[-1]:,}", *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_between(page: pathlib.Path, script: str, body: str) -> None:
    """Replaces what stands between the marks of a script on a page.

    Raises:
      ValueError: the page has no such marks.
    """
    begin, end = f"<!-- table: {script} -->", f"<!-- end of {script} -->"
    text = page.read_text()
    if begin not in text or end not in text.partition(begin)[2]:
        raise ValueError(f"{page} has no {begin} ... {end}")
    before, _, rest = text.partition(begin)
    page.write_text(f"{before}{begin}\n\n{body}\n\n{end}{rest.partition(end)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--axes", default=",".join(AXES), help="none: checks what --out holds")
    parser.add_argument("--static", action="store_true", help="no times; two points of each axis")
    parser.add_argument("--out", type=pathlib.Path, help="what it holds of others stays")
    parser.add_argument("--page", type=pathlib.Path, help="whose table is replaced")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        work, _, devices = options.serve.partition(":")
        return serve(work, int(devices))
    results: dict[str, Any] = {}
    if options.out and options.out.exists():
        results = json.loads(options.out.read_text())["results"]
    for axis in options.axes.split(",") if options.axes != "none" else []:
        results[axis] = run(axis, times=not options.static)
        report = {
            "results": {name: results[name] for name in AXES if name in results},
            "devices": DEVICES,
            "seed": 0,
            "cores": len(os.sched_getaffinity(0)),
            "load_average": os.getloadavg(),
            "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        }
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    ordered = {name: results[name] for name in AXES if name in results}
    if options.page:
        write_between(options.page, "benchmarks/scaling.py", table(ordered))
    lines = [x for axis, found in ordered.items() for x in exceeded(axis, found["exponents"])]
    if lines:
        raise SystemExit("\n".join(lines))


if __name__ == "__main__":
    main()
