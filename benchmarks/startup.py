"""Start-up: `--help`, launch to first step with a warm compilation cache, and recompilations.

  python benchmarks/startup.py --out=benchmarks/results/startup.json
  python benchmarks/startup.py --cold=5 --out=benchmarks/results/startup_cold.json

With `--cold`, only launches of a ResNet-20, each with a cache that is empty.

Each figure is the median of several processes. Compilations are counted by name from JAX's events,
in one process that trains with evaluations and checkpoints, then evaluates the finished run; what
the run itself counts as compiled too late is there as `compilations_after_start`. The load of the
machine is recorded before and after: only on a quiet one do the times mean something.
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

import _record

MAIN = [sys.executable, "-m", "distill_jax.main"]
KD = "configs/distill/kd.py:smoke"

RESNET = (
    "--config=configs/distill/supervised.py:smoke",
    "--config.roles.student.model=resnet",
    "--config.roles.student.kwargs={'depth': 20}",
)

COUNT = r"""
import collections, json, sys, jax
from distill_jax import main
from distill_jax.run import watch
compiled = []
def listen(event, duration_secs, **facts):
    if event == watch.COMPILED:
        compiled.append(facts["fun_name"])
jax.monitoring.register_event_duration_secs_listener(listen)
codes = [main.main(["distill-jax", *sys.argv[1:]])]
codes.append(main.main(["distill-jax", "--mode=eval", sys.argv[2]]))
print("COUNTS", json.dumps({
    "exit": codes,
    "compiled": collections.Counter(compiled),
    "tensorflow": "tensorflow" in sys.modules,
}))
"""


def run(args, **kwargs):
    return subprocess.run(args, capture_output=True, text=True, check=False, **kwargs)


def first_step(args, env):
    """Returns the seconds from launch to the end of the first step, and those of each phase."""
    done = run([*MAIN, *args], env=env)
    line = re.search(r"step 1 after ([\d.]+) s \((.*?)\)", done.stdout + done.stderr)
    assert line, done.stderr
    phases = {k: float(v) for k, v in (p.split() for p in line[2].split(", "))}
    return float(line[1]), phases


def summary(launches):
    """Returns the medians of what `first_step` returned, and the seconds of each launch."""
    phases = [phases for _, phases in launches]
    return {
        "launch_to_first_step_seconds": statistics.median(seconds for seconds, _ in launches),
        "phases": {k: statistics.median(p[k] for p in phases) for k in phases[0]},
        "launches": [seconds for seconds, _ in launches],
    }


def surroundings(load):
    """Returns what the times depend on."""
    return {
        "load": [load, os.getloadavg()[0]],
        "cores": os.cpu_count(),
        "versions": _record.versions("jax", "flax", "optax", "numpy"),
    }


def cold(root, launches):
    """Launches a ResNet-20 with an empty cache each time."""
    found, load = [], os.getloadavg()[0]
    for i in range(launches):
        env = {**os.environ, "DISTILL_JAX_CACHE": str(root / f"empty{i}")}
        found.append(first_step([*RESNET, f"--workdir={root / f'cold{i}'}"], env))
    return {
        "network": "ResNet-20, generated images of :smoke, no cache",
        **summary(found),
        **surroundings(load),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cold", type=int, default=0, help="launches without a cache")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    root = pathlib.Path(tempfile.mkdtemp(prefix="startup"))
    if options.cold:
        return _record.write(cold(root, options.cold), options.out, show=True)
    env = {**os.environ, "DISTILL_JAX_CACHE": str(root / "cache")}
    teacher = f"--config.roles.teacher.init={root / 'teacher'}"
    supervised = "--config=configs/distill/supervised.py:smoke"
    run([*MAIN, supervised, f"--workdir={root / 'teacher'}"], env=env)

    load = os.getloadavg()[0]
    helps, launches = [], []
    for i in range(options.repeats):
        began = time.perf_counter()
        run([*MAIN, "--help"], env=env)
        helps.append(time.perf_counter() - began)
        launches.append(first_step([f"--config={KD}", f"--workdir={root / str(i)}", teacher], env))
    launches = launches[1:]  # the first fills the cache

    longer = ["--config.total=60", "--config.checkpoint.every=20"]
    longer += ["--config.eval.every=15"]
    args = [sys.executable, "-c", COUNT, f"--config={KD}", f"--workdir={root / 'count'}", teacher]
    counts = run([*args, *longer], env=env)
    match = re.search(r"COUNTS (.*)", counts.stdout)
    assert match, counts.stderr
    report = {
        "help_seconds": statistics.median(helps),
        **summary(launches),
        "programs": json.loads(match[1]),
        "compilations_after_start": json.loads((root / "count" / "result.json").read_text())[
            "compute"
        ]["compilations_after_start"],
        **surroundings(load),
    }
    return _record.write(report, options.out, show=True)


if __name__ == "__main__":
    main()
