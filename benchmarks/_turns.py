"""Timing by turns: every variant in a process of its own, a few steps each in every round.

A busy machine then slows all variants alike, and the ratio of two variants' times in the same round
is worth more than either time. Each process has the threads that its library starts by default. How
much of the processors everything else uses during a turn is measured (Linux): threads that wait for
work in a spin would slow the other side.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import _record

WARM_STEPS = 3
IN_FLIGHT = 8
QUIET = 0.15
"""Processors that other programs may use during a turn."""


def place_torch() -> None:
    """Puts what PyTorch makes from here on where JAX_PLATFORMS has the package: CPU or GPU.

    On a GPU products of single precision are those of TensorFloat-32 on both sides, as XLA's and,
    for convolutions, PyTorch's defaults are.
    """
    import torch

    if os.environ.get("JAX_PLATFORMS") == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.set_default_device("cuda")


def serve(step: Callable[[], Any]) -> None:
    """Runs as many steps as each line of stdin asks for; prints seconds a step and peak memory.

    A step returns a number, or an array that begins with one. Every eighth and the last of a turn
    are waited for: the loop of a run does not wait for every step either, and eager PyTorch on CPU
    always does.
    """
    import numpy as np

    for _ in range(WARM_STEPS):
        value = float(np.ravel(step())[0])
    print(json.dumps(value), flush=True)
    for line in sys.stdin:
        steps = int(line)
        wall, cpu = time.perf_counter(), time.process_time()
        for i in range(steps):
            last = step()
            if i % IN_FLIGHT == IN_FLIGHT - 1 or i == steps - 1:
                np.asarray(last)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        times = {"wall": wall / steps, "cpu": cpu / steps, "peak_mib": peak}
        print(json.dumps(times), flush=True)


def config_step(config: Any) -> Callable[[], Any]:
    """Returns the step of a config, fed as a run feeds it and on the devices of a run."""
    from distill_jax.run import environment

    environment.configure_jax(cpu_devices=environment.cpu_devices(config))
    import jax

    from distill_jax.core import partition, state
    from distill_jax.run import build

    experiment = build.build(config)
    frozen = {
        role: jax.device_get(
            jax.jit(experiment.models[role].init)(
                jax.random.key(1), *state.zeros(experiment.shapes.roles[role].inputs)
            )
        )
        for role in experiment.frozen
    }
    teacher_outputs = build.stored_teacher_outputs(experiment, config, frozen, lambda line: None)
    feed = build.Feed(experiment, seed=0, start=0, teacher_outputs=teacher_outputs)
    feed(0)
    whole = partition.replicated(experiment.mesh)
    online = jax.device_put(experiment.online(frozen), whole)
    key = jax.device_put(jax.random.key(0), whole)
    current, count = build.initial_state(experiment, key, config), 0
    compiled = build.compile_step(experiment, feed(0))

    def step():
        nonlocal current, count
        current, metrics = compiled(current, online, feed(count), key)
        count += 1
        return metrics

    return step


def _busy_seconds() -> float:
    """Returns what all programs have used of all processors; 0 where this is not known."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, soft = map(int, fields[1:8])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def take_turns(
    script: str, variants: Mapping[str, Mapping[str, str]], *, net: str, rounds: int, steps: int
) -> dict[str, list[dict[str, float]]]:
    """Returns for each variant what `serve` printed in each round.

    "others" is the processor time of all other programs during the turn, per second of it, among
    them the variants that wait. Three times as many rounds are taken while other programs disturb
    them; those with the least use by others count.

    Args:
      script: path of a program that serves on `--serve net:variant`.
      variants: environment variables by name of variant.
      net: passed on.
      rounds: how often each variant has its turn; who begins changes from round to round.
      steps: steps in a turn.
    """
    workers: dict[str, Any] = {}
    for name, extra in variants.items():
        env = {"JAX_PLATFORMS": "cpu", **os.environ, **extra}
        paths = (Path(script).resolve().parents[1], env.get("PYTHONPATH"))
        env["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
        command = [sys.executable, script, "--serve", f"{net}:{name}"]
        workers[name] = subprocess.Popen(
            command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
    for name, worker in workers.items():
        if not worker.stdout.readline():  # compiled and warm
            raise SystemExit(f"{net}:{name} did not start")
    names = list(workers)
    taken: list[dict[str, dict[str, float]]] = []
    while len(taken) < 3 * rounds:
        i, turns = len(taken), {}
        for name in names[i % len(names) :] + names[: i % len(names)]:
            busy = _busy_seconds()
            workers[name].stdin.write(f"{steps}\n")
            workers[name].stdin.flush()
            turn = json.loads(workers[name].stdout.readline())
            others = _busy_seconds() - busy - steps * turn["cpu"]
            turns[name] = {**turn, "others": others / (steps * turn["wall"])}
        taken.append(turns)
        taken.sort(key=lambda turns: max(turn["others"] for turn in turns.values()))
        if len(taken) >= rounds and max(t["others"] for t in taken[rounds - 1].values()) < QUIET:
            break
    times = {name: [turns[name] for turns in taken[:rounds]] for name in names}
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return times


def onnx_files(
    paths: Mapping[str, Path], examples: Any, *, rounds: int
) -> tuple[dict[str, Any], dict[str, Callable[[Any], Any]]]:
    """Measures files in ONNX Runtime: one example, one thread, the same options, in turns.

    Args:
      paths: ONNX files by name, of one input each.
      examples: inputs `[n, ...]`, taken in turn.
      rounds: calls of each file that count, after 20 that do not.

    Returns:
      floating-point parameters, bytes, median and least milliseconds by name; and the functions.
    """
    import numpy as np
    import onnx
    import onnxruntime

    calls, parameters = {}, {}
    for name, path in paths.items():
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(path), options)
        asked = session.get_inputs()[0].name
        calls[name] = lambda x, session=session, asked=asked: session.run(None, {asked: x})
        weights = onnx.load(path).graph.initializer
        parameters[name] = sum(int(np.prod(w.dims)) for w in weights if w.data_type == 1)
    times: dict[str, list[float]] = {name: [] for name in paths}
    for i in range(rounds + 20):
        one = examples[i % len(examples)][None]
        for name, call in calls.items():
            start = time.perf_counter()
            call(one)
            times[name].append(1e3 * (time.perf_counter() - start))
    measured = {
        "float_parameters_in_file": parameters,
        "bytes": {name: path.stat().st_size for name, path in paths.items()},
        "latency_ms_median": {name: statistics.median(t[20:]) for name, t in times.items()},
        "latency_ms_least": {name: min(t[20:]) for name, t in times.items()},
        "rounds": rounds,
    }
    return measured, calls


def median_ms(turns: list[dict[str, float]], key: str = "wall") -> float:
    """Returns the median over rounds in milliseconds."""
    return round(1e3 * statistics.median(turn[key] for turn in turns), 2)


def ratio(above: list[dict[str, float]], below: list[dict[str, float]], key: str = "wall") -> float:
    """Returns the median over rounds of the ratio within a round."""
    pairs = zip(above, below, strict=True)
    return round(statistics.median(a[key] / b[key] for a, b in pairs), 3)


def speeds(times: Mapping[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Returns the row of each variant, beside the variant "torch"."""
    return {
        name: {
            "wall_ms": median_ms(found),
            "cpu_ms": median_ms(found, "cpu"),
            "speed_of_torch": ratio(times["torch"], found),
            "speed_of_torch_cpu": ratio(times["torch"], found, "cpu"),
            "others": round(statistics.median(turn["others"] for turn in found), 3),
        }
        for name, found in times.items()
    }


def report(
    nets: Iterable[str],
    measure: Callable[[str], dict[str, Any]],
    *,
    packages: Iterable[str],
    out: str,
    **facts: Any,
) -> None:
    """Measures net by net; prints each and writes all that are known, with versions and load.

    Args:
      nets: their names.
      measure: of a name.
      packages: whose versions are written.
      out: path of the JSON file.
      **facts: what else is written.
    """
    result: dict[str, Any] = {
        "versions": _record.versions(*packages),
        **_record.machine(),
        **facts,
        "load_average_at_start": os.getloadavg(),
        "nets": {},
    }
    for net in nets:
        result["nets"][net] = measure(net)
        result["load_average"] = os.getloadavg()
        _record.write(result, out, indent=2)
        print(json.dumps(result["nets"][net], indent=2), flush=True)
