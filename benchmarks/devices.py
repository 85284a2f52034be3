"""The loss and the gradient of every method on 1, 2, 4 and 8 devices and in two processes.

  python benchmarks/devices.py --out=benchmarks/results/devices.json

Each objective on the tiny networks of the contract tests (`tests/harness.py`), batch statistics
included, in float64, one step of gradient descent on a batch of 16 that the layout splits. What is
compared with one device: the loss, what the step moved every parameter by (0.1 times its gradient;
two steps for methods with an empty queue), averages, and memories. A difference is relative to the
largest entry of an array.
"""

import argparse
import json
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import time
from typing import Any

import _record

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "launch")]
DEVICES = (1, 2, 4, 8)
PROCESSES, DEVICES_OF_EACH = 2, 2
LIMIT = 1e-10


def compute(names: list[str], counts: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """Returns `{devices: {objective: what a step leads to}}` for meshes of these sizes."""
    import jax
    import numpy as np

    from distill_jax.core import partition
    from tests import harness

    found: dict[str, dict[str, Any]] = {str(n): {} for n in counts}
    for name in names:
        made = harness.setup(name, batch_norm=True)
        made = made._replace(frozen=jax.device_get(made.frozen))
        batch = jax.tree.map(np.asarray, harness.make_batch())
        first = jax.device_get(jax.jit(made.init)(jax.random.key(0)).params)
        for n in counts:
            mesh = partition.make_mesh(devices=jax.devices()[:n])
            steps = harness.STEPS_TO_LEARN.get(name, 1)
            state, metrics = harness.run(made, batch, mesh=mesh, n_steps=steps)
            state = jax.device_get(state)
            found[str(n)][name] = {
                "loss": [m["loss"] for m in metrics],
                "gradient": jax.tree.leaves(
                    jax.tree.map(lambda a, b: a - b, first, dict(state.params))
                ),
                "average": jax.tree.leaves(state.targets),
                "memory": jax.tree.leaves(state.memory),
            }
        jax.clear_caches()
        print(name, flush=True)
    return found


def child(file: str, index: int, port: int, names: list[str]) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    if port:
        jax.config.update("jax_num_cpu_devices", DEVICES_OF_EACH)
        jax.distributed.initialize(f"localhost:{port}", PROCESSES, index)
        counts: tuple[int, ...] = (jax.device_count(),)
    else:
        jax.config.update("jax_num_cpu_devices", max(DEVICES))
        counts = DEVICES
    found = compute(names, counts)
    if index == 0:
        pathlib.Path(file).write_bytes(pickle.dumps(found))


def start(file: pathlib.Path, names: list[str], *, processes: int = 1) -> dict[str, Any]:
    """Returns what the processes found."""
    import local  # launch/local.py

    port = local.free_port() if processes > 1 else 0
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, __file__, "--only", *names, "--child", str(file)]
    started = [
        subprocess.Popen([*command, str(i), str(port)], env=environment) for i in range(processes)
    ]
    if any([one.wait() for one in started]):
        raise SystemExit("a process failed; see above")
    return pickle.loads(file.read_bytes())


def apart(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    import numpy as np

    def largest(x, y) -> float:
        x, y = np.asarray(x), np.asarray(y)
        return float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-30)) if x.size else 0.0

    return {
        what: max(largest(x, y) for x, y in zip(one[what], other[what], strict=True))
        for what in one
        if one[what]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", help="objectives; default: all")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--child", nargs=3, metavar=("FILE", "INDEX", "PORT"), help="of its own")
    options = parser.parse_args()
    from tests import harness

    names = options.only or harness.modules("objectives")
    if options.child:
        file, index, port = options.child
        return child(file, int(index), int(port), names)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        found = start(pathlib.Path(scratch) / "one", names)
        two = start(pathlib.Path(scratch) / "two", names, processes=PROCESSES)
    one = found.pop("1")
    layouts = {f"{n} devices": rows for n, rows in found.items()}
    layouts[f"{PROCESSES} processes of {DEVICES_OF_EACH} devices"] = next(iter(two.values()))
    results = {
        name: {layout: apart(one[name], rows[name]) for layout, rows in layouts.items()}
        for name in names
    }
    worst = {
        layout: max((max(results[name][layout].values()), name) for name in names)
        for layout in layouts
    }
    beyond = [n for n in names if any(max(r.values()) > LIMIT for r in results[n].values())]
    report = {
        "limit": LIMIT,
        "methods": len(names),
        "beyond_the_limit": beyond,
        "worst": worst,
        "results": results,
        "seconds": round(time.monotonic() - began),
        "versions": _record.versions("jax", "jaxlib", "flax", "optax", "numpy"),
    }
    _record.write(report, options.out)
    print(json.dumps({k: v for k, v in report.items() if k != "results"}, indent=1))


if __name__ == "__main__":
    main()
