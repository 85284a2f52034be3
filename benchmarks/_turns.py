"""Timing by turns: every variant in a process of its own, a few steps each in every round.

A busy machine then slows all variants alike, and the ratio of two variants' times in the same round
is worth more than either time.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

WARM_STEPS = 3


def serve(step: Callable[[], Any]) -> None:
    """Runs as many steps as each line of stdin asks for; prints seconds a step and peak memory."""
    for _ in range(WARM_STEPS):
        value = float(step().__array__())
    print(json.dumps(value), flush=True)
    for line in sys.stdin:
        steps = int(line)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            step()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        times = {"wall": wall / steps, "cpu": cpu / steps, "peak_mib": peak}
        print(json.dumps(times), flush=True)


def take_turns(
    script: str, variants: Mapping[str, Mapping[str, str]], *, net: str, rounds: int, steps: int
) -> dict[str, list[dict[str, float]]]:
    """Returns for each variant what `serve` printed in each round.

    Args:
      script: path of a program that serves on `--serve net:variant`.
      variants: environment variables by name of variant.
      net: passed on.
      rounds: how often each variant has its turn; who begins changes from round to round.
      steps: steps in a turn.
    """
    workers: dict[str, Any] = {}
    for name, extra in variants.items():
        env = {**os.environ, "JAX_PLATFORMS": "cpu", **extra}
        paths = (Path(script).resolve().parents[1], extra.get("PYTHONPATH"))
        env["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
        command = [sys.executable, script, "--serve", f"{net}:{name}"]
        workers[name] = subprocess.Popen(
            command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        if not workers[name].stdout.readline():  # compiled and warm
            raise SystemExit(f"{net}:{name} did not start")
    names = list(workers)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            workers[name].stdin.write(f"{steps}\n")
            workers[name].stdin.flush()
            times[name].append(json.loads(workers[name].stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return times


def median_ms(turns: list[dict[str, float]], key: str = "wall") -> float:
    """Returns the median over rounds in milliseconds."""
    return round(1e3 * statistics.median(turn[key] for turn in turns), 2)


def ratio(above: list[dict[str, float]], below: list[dict[str, float]], key: str = "wall") -> float:
    """Returns the median over rounds of the ratio within a round."""
    pairs = zip(above, below, strict=True)
    return round(statistics.median(a[key] / b[key] for a, b in pairs), 3)
