"""A sweep of nine trials in four ways: wall time, and how often XLA compiles.

  python benchmarks/sweep.py --out=benchmarks/results/sweep.json

The trials are a grid of three learning rates and three weight decays of a perceptron on digits.

  replicas   `launch/sweep.py --backend=replicas`: one process, the trials side by side
  processes  `launch/sweep.py`: one process a trial, one after the other
  launches   nine command lines, one after the other
  uncached   the same without the cache of compiled programs

Each way but the last begins with an empty cache of its own. Programs are counted in every process
by JAX's events: those that XLA compiled, and those read from the cache. The ways take turns, once
in every round; the figure is the median over rounds of the ratio of wall times. The trials' best
held-out accuracies are compared too: all ways train the same trials.
"""

import argparse
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import _record

ROOT = pathlib.Path(__file__).parents[1]
GRID = {"optim.lr": ("0.01", "0.03", "0.1"), "optim.weight_decay": ("0.0", "0.0005", "0.005")}
WAYS = ("replicas", "processes", "launches", "uncached")
TRIAL = (
    *("--config.data.name=digits", "--config.data.train_transforms=('normalize',)"),
    *("--config.roles.student.model=mlp", "--config.roles.student.kwargs.hidden=(256,256)"),
    "--config.log.tensorboard=false",
)

COUNT = """
import atexit, json, os, sys
if "distill_jax.main" in sys.orig_argv:
    from jax import monitoring
    counts = {"programs": 0, "read": 0}
    def timed(event, seconds, **facts):
        counts["programs"] += event == "/jax/core/compile/backend_compile_duration"
    def happened(event, **facts):
        counts["read"] += event == "/jax/compilation_cache/cache_hits"
    monitoring.register_event_duration_secs_listener(timed)
    monitoring.register_event_listener(happened)
    @atexit.register
    def write():
        with open(os.path.join(os.environ["SWEEP_COUNTS"], str(os.getpid())), "w") as file:
            json.dump(counts, file)
"""


def measure(way: str, folder: pathlib.Path, total: str) -> dict:
    """Runs the nine trials in one way; returns seconds, counts, and the accuracies by trial."""
    hook, counts, runs = (folder / name for name in ("hook", "counts", "runs"))
    for path in (hook, counts):
        path.mkdir(parents=True)
    (hook / "sitecustomize.py").write_text(COUNT)
    before = os.environ.get("PYTHONPATH")
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(hook), str(ROOT), before])),
        "SWEEP_COUNTS": str(counts),
        "DISTILL_JAX_CACHE": "off" if way == "uncached" else str(folder / "cache"),
    }
    trial = ["--config=supervised", f"--config.total={total}", *TRIAL]
    if way in ("replicas", "processes"):
        line = [sys.executable, str(ROOT / "launch/sweep.py"), trial[0], f"--workdir={runs}"]
        line += [f"--grid={key}={','.join(values)}" for key, values in GRID.items()]
        backend = "replicas" if way == "replicas" else "local"
        lines = [[*line, f"--backend={backend}", "--", *trial[1:]]]
    else:
        lines = []
        for i, values in enumerate(itertools.product(*GRID.values())):
            own = [f"--config.{key}={v}" for key, v in zip(GRID, values, strict=True)]
            main = [
                sys.executable,
                "-m",
                "distill_jax.main",
                trial[0],
                f"--workdir={runs / str(i)}",
            ]
            lines.append([*main, *trial[1:], *own])
    start = time.perf_counter()
    for line in lines:
        done = subprocess.run(
            line, env=env, cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(line)}\n{done.stdout}{done.stderr}")
    seconds = time.perf_counter() - start
    found = [json.loads(path.read_text()) for path in counts.iterdir()]
    results = sorted(p for p in runs.rglob("result.json"))
    best = [json.loads(path.read_text())["best"]["held_out/accuracy"] for path in results]
    read = sum(c["read"] for c in found)
    return {
        "seconds": round(seconds, 2),
        "processes": len(found),
        "compiled": sum(c["programs"] for c in found) - read,
        "read_from_cache": read,
        "held_out_accuracy": best,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--total", default="30 epochs", help="length of a trial")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    rounds: dict[str, list[dict]] = {way: [] for way in WAYS}
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(prefix="sweep") as scratch:
        for i in range(options.rounds):
            for way in WAYS[i % len(WAYS) :] + WAYS[: i % len(WAYS)]:
                one = measure(way, pathlib.Path(scratch, f"{i}-{way}"), options.total)
                rounds[way].append(one)
                print(way, {k: v for k, v in one.items() if k != "held_out_accuracy"}, flush=True)
    load.append(os.getloadavg()[0])
    alone = rounds["launches"]
    apart = {
        way: max(
            abs(a - b)
            for a, b in zip(
                rounds[way][0]["held_out_accuracy"], alone[0]["held_out_accuracy"], strict=True
            )
        )
        for way in WAYS
    }
    result = {
        "trials": 9,
        "total": options.total,
        "load": load,
        "cores": os.cpu_count(),
        **_record.versions("jax"),
        "times_faster_than_launches": {
            way: statistics.median(
                a["seconds"] / b["seconds"] for a, b in zip(alone, rounds[way], strict=True)
            )
            for way in WAYS
        },
        "largest_difference_of_accuracy": apart,
        "rounds": rounds,
    }
    _record.write(result, options.out, show=True)


if __name__ == "__main__":
    main()
