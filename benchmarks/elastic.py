"""Continues runs on other meshes and process counts, and compares with an uninterrupted run.

  python benchmarks/elastic.py --out=benchmarks/results/elastic.json

Every run is stopped twice by SIGTERM and continued by the same command on another layout: 1, 2 and
1 processes; 8, 4 and 1 devices; parameters sharded over 4 devices, then replicated on 4, then on 1.
All compute in float64, where what meshes add in another order differs by less than 1e-8 at the end;
one is repeated in float32. Compared: a digest of the example ids of every batch in their order, the
loss of every step, the first one after each change, parameters, tables and both optimizers at the
end, the selected step, and the steps of the log.
"""

import argparse
import dataclasses
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import _survival as survival

from distill_jax.objectives import kd

STEPS, STOPS = 36, (9, 21)
TIMEOUT = 420
LAYOUTS = {
    "1 -> 2 -> 1 processes": (
        ({"mesh.cpu_devices": 1}, 1),
        ({"mesh.cpu_devices": 1}, 2),
        ({"mesh.cpu_devices": 1}, 1),
    ),
    "8 -> 4 -> 1 devices": tuple(({"mesh.cpu_devices": n}, 1) for n in (8, 4, 1)),
    "fsdp 4 -> data 4 -> 1": (
        ({"mesh.cpu_devices": 4, "mesh.fsdp": 4, "partition.min_size": 1}, 1),
        ({"mesh.cpu_devices": 4}, 1),
        ({"mesh.cpu_devices": 1}, 1),
    ),
}
RUNS = ("ema_teacher", "crd_bank", "ps_kd_table", "tgeo_bilevel")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordedKD(kd.KD):
    """Distillation that keeps a digest of the ids of all examples in the order it saw them."""

    def memory(self, key, batch):
        del key, batch
        return {"order": jnp.uint32(1)}

    def loss(self, nets, batch, memory, step):
        terms = super().loss(nets, batch, memory, step)
        place = 2 * jnp.arange(batch["index"].shape[0], dtype=jnp.uint32) + 1
        seen = ((batch["index"].astype(jnp.uint32) + 1) * place * place).sum(dtype=jnp.uint32)
        order = memory["order"] * jnp.uint32(1_000_003) + seen
        return dataclasses.replace(terms, memory={"order": order})


def command(name, workdir, teacher, *, precision, layout, processes):
    changes = {
        "precision": precision,
        "total": STEPS,
        "log.every_steps": 1,
        "eval.every": 6,
        "checkpoint.every": 100,
        **layout,
    }
    if name == "ema_teacher":
        changes["objective.name"] = "benchmarks.elastic:RecordedKD"
    args = survival.flags(name, workdir, teacher=teacher, changes=changes)
    if processes == 1:
        return [sys.executable, "-m", "distill_jax.main", *args]
    launcher = str(survival.ROOT / "launch" / "local.py")
    return [sys.executable, launcher, f"--processes={processes}", "--", *args]


def run(args, workdir, *, stop=None):
    """Runs a command, asked to stop once its log has a step; returns code and output."""
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(args, cwd=survival.ROOT, **pipe)
    while stop is not None and process.poll() is None:
        if max((row["step"] for row in survival.rows(workdir)), default=0) >= stop:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.002)
    text, _ = process.communicate(timeout=TIMEOUT)
    return process.returncode, text


def losses(workdir):
    return {row["step"]: row["train/loss"] for row in survival.rows(workdir) if "train/loss" in row}


def outcome(workdir):
    return {
        "losses": losses(workdir),
        "steps": [row["step"] for row in survival.rows(workdir)],
        "result": survival.result(workdir),
        "arrays": survival.arrays(survival.step_folders(workdir)[STEPS]),
    }


def compare(found, want, changes):
    """Largest differences; integers (ids, counts, the digest of the order) must be equal."""
    numbers = {k: x for k, x in want["arrays"].items() if np.issubdtype(x.dtype, np.floating)}
    exact = want["arrays"].keys() - numbers.keys()

    def largest(keys):
        pairs = [(found["arrays"][k], want["arrays"][k]) for k in keys]
        return max((float(np.abs(a - b).max(initial=0)) for a, b in pairs), default=0.0)

    best, wanted = found["result"]["best"], want["result"]["best"]
    gaps = {step: abs(found["losses"][step] - want["losses"][step]) for step in want["losses"]}
    return {
        "resumed_at": changes,
        "first_loss_difference": max(gaps[step + 1] for step in changes),
        "any_loss_difference": max(gaps.values()),
        "parameters": largest(k for k in numbers if k.startswith("role.")),
        "memory": largest(k for k in numbers if k.startswith("memory")),
        "optimizers": largest(k for k in numbers if k.startswith("optimizer")),
        "integers_equal": all(np.array_equal(found["arrays"][k], want["arrays"][k]) for k in exact),
        "integers": sorted(exact),
        "same_log_steps": found["steps"] == want["steps"],
        "same_selected_step": best["step"] == wanted["step"],
        "selection_difference": abs(best["held_out/accuracy"] - wanted["held_out/accuracy"]),
    }


def moved(name, root, teacher, layouts, precision, want):
    workdir = root / "moved"
    shutil.rmtree(workdir, ignore_errors=True)
    changes, codes = [], []
    for (layout, processes), stop in zip(layouts, (*STOPS, None), strict=True):
        args = command(
            name, workdir, teacher, precision=precision, layout=layout, processes=processes
        )
        code, text = run(args, workdir, stop=stop)
        codes.append(code)
        if code not in (0, 75):
            return {"exits": codes, "output": text[-3000:]}
        if code == 75:
            changes.append(max(survival.step_folders(workdir)))
    return {"exits": codes, **compare(outcome(workdir), want, changes)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", default=",".join(RUNS))
    parser.add_argument("--layouts", type=int, nargs="*", default=list(range(len(LAYOUTS))))
    parser.add_argument("--single", type=int, default=1, help="repeat a run in float32 too")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    root = pathlib.Path(tempfile.mkdtemp(prefix="elastic"))
    teacher = root / "teacher"
    survival.train_teacher(teacher)
    jobs = [(name, "float64") for name in options.runs.split(",")]
    jobs += [("kd_convnet", "float32")] if options.single else []
    cases = []
    for name, precision in jobs:
        whole = root / f"{name}-{precision}"
        args = command(
            name, whole, teacher, precision=precision, layout={"mesh.cpu_devices": 1}, processes=1
        )
        code, text = run(args, whole)
        if code:
            raise SystemExit(text[-3000:])
        want = outcome(whole)
        for i in options.layouts if precision == "float64" else [1]:
            title = list(LAYOUTS)[i]
            facts = {"run": name, "precision": precision, "layouts": title}
            facts |= moved(name, root, teacher, LAYOUTS[title], precision, want)
            cases.append(facts)
            print(json.dumps(facts), flush=True)
            write(options, cases)
    shutil.rmtree(root)


def write(options, cases):
    import jax

    result = {"steps": STEPS, "versions": {"jax": jax.__version__}, "cases": cases}
    if options.out:
        pathlib.Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
