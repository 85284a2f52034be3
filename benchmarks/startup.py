"""Start-up: `--help`, launch to first step with a warm compilation cache, and recompilations.

  python benchmarks/startup.py --out=benchmarks/results/startup.json

Each figure is the median of several processes. Compilations are counted by name from JAX's events,
in one process that trains with evaluations and checkpoints, then evaluates the finished run; what
the run itself counts as compiled too late is there as `compilations_after_start`. The load of the
machine is recorded before and after: only on a quiet one do the times mean something.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

MAIN = [sys.executable, "-m", "distill_jax.main"]
KD = "configs/distill/kd.py:smoke"

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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    root = pathlib.Path(tempfile.mkdtemp(prefix="startup"))
    env = {**os.environ, "DISTILL_JAX_CACHE": str(root / "cache")}
    teacher = f"--config.roles.teacher.init={root / 'teacher'}"
    supervised = "--config=configs/distill/supervised.py:smoke"
    run([*MAIN, supervised, f"--workdir={root / 'teacher'}"], env=env)

    load = [os.getloadavg()[0]]
    helps, launches, phases = [], [], []
    for i in range(options.repeats):
        began = time.perf_counter()
        run([*MAIN, "--help"], env=env)
        helps.append(time.perf_counter() - began)
        done = run([*MAIN, f"--config={KD}", f"--workdir={root / str(i)}", teacher], env=env)
        line = re.search(r"step 1 after ([\d.]+) s \((.*?)\)", done.stdout + done.stderr)
        assert line, done.stderr
        if i:  # the first launch fills the cache
            launches.append(float(line[1]))
            phases.append({k: float(v) for k, v in (p.split() for p in line[2].split(", "))})

    longer = ["--config.total=60", "--config.checkpoint.every=20"]
    longer += ["--config.eval.every=15"]
    args = [sys.executable, "-c", COUNT, f"--config={KD}", f"--workdir={root / 'count'}", teacher]
    counts = run([*args, *longer], env=env)
    match = re.search(r"COUNTS (.*)", counts.stdout)
    assert match, counts.stderr
    report = {
        "help_seconds": statistics.median(helps),
        "launch_to_first_step_seconds": statistics.median(launches),
        "phases": {k: statistics.median(p[k] for p in phases) for k in phases[0]},
        "launches": launches,
        "load": [*load, os.getloadavg()[0]],
        "programs": json.loads(match[1]),
        "compilations_after_start": json.loads((root / "count" / "result.json").read_text())[
            "compute"
        ]["compilations_after_start"],
        "cores": os.cpu_count(),
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "flax", "optax", "numpy")},
    }
    print(json.dumps(report, indent=1))
    if options.out:
        pathlib.Path(options.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
