"""Kills a run at random steps and checks that it ends byte-equal to an uninterrupted one.

  python benchmarks/kills.py --kills=20 --out=benchmarks/results/kills.json

Each kill is a process that is signalled (SIGKILL and SIGTERM in turn) once its metrics show a
random step, then started again with the same command. Also resumes runs across device counts.
"""

import argparse
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

CONFIG = "configs/distill/kd.py:smoke"
STEPS = 200
OVERRIDES = [
    f"--config.total.steps={STEPS}",
    "--config.log.every_steps=5",
    "--config.eval.every.steps=50",
    "--config.checkpoint.every.steps=20",
    "--config.log.tensorboard=false",
]


def command(workdir, teacher, *, devices):
    return [
        sys.executable,
        "-m",
        "distill_jax.main",
        f"--config={CONFIG}",
        f"--workdir={workdir}",
        f"--config.roles.teacher.init={teacher}",
        f"--config.mesh.cpu_devices={devices}",
        *OVERRIDES,
    ]


def rows(workdir):
    path = pathlib.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(workdir):
    return max((row["step"] for row in rows(workdir)), default=0)


def run_until(args, workdir, *, step=None, number=None):
    """Runs a command; signals it once its log has reached `step`. Returns the exit code."""
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while step is not None and process.poll() is None:
        if last_step(workdir) >= step:
            process.send_signal(number)
            break
        time.sleep(0.002)
    _, stderr = process.communicate()
    if "Traceback" in stderr and number is None:
        raise SystemExit(stderr)
    return process.returncode


def final_arrays(workdir):
    """Every array of the last checkpoint, read back through the project's own reader."""
    code = (
        "import sys, pathlib, numpy as np, jax\n"
        "from distill_jax.run import build, config, checkpoint\n"
        "c = config.from_json((pathlib.Path(sys.argv[1]) / 'config.json').read_text())\n"
        "c.mesh.cpu_devices = 1\n"
        "e = build.build(c)\n"
        "s = checkpoint.Checkpointer(pathlib.Path(sys.argv[1]) / 'checkpoints')"
        ".restore(e.abstract_state, step=c.total.steps).state\n"
        "leaves = [np.asarray(x) for x in jax.tree.leaves(s)]\n"
        "np.savez(sys.argv[2], *leaves)\n"
    )
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        subprocess.run([sys.executable, "-c", code, str(workdir), file.name], check=True)
        with np.load(file.name) as arrays:
            return [arrays[name] for name in arrays.files]


def selected(workdir):
    """The selected step and its metrics, and those of the last state."""
    result = json.loads((workdir / "result.json").read_text())
    return result["best"], result["metrics"]


def equal(a, b):
    return len(a) == len(b) and all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    root = pathlib.Path(tempfile.mkdtemp(prefix="kills"))
    teacher = root / "teacher"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "distill_jax.main",
            "--config=configs/distill/supervised.py:smoke",
            f"--workdir={teacher}",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    whole = root / "whole"
    assert run_until(command(whole, teacher, devices=2), whole) == 0
    want, chosen = final_arrays(whole), selected(whole)

    kills = []
    for i in range(options.kills):
        number = (signal.SIGKILL, signal.SIGTERM)[i % 2]
        step = draw.randrange(5, STEPS - 20)
        workdir = root / f"kill{i}"
        args = command(workdir, teacher, devices=2)
        code = run_until(args, workdir, step=step, number=number)
        at = last_step(workdir)
        again = run_until(args, workdir)
        same = again == 0 and equal(want, final_arrays(workdir))
        steps = [row["step"] for row in rows(workdir) if "train/loss" in row]
        kills.append(
            {
                "signal": number.name,
                "asked_at": step,
                "logged_up_to": at,
                "exit": code,
                "byte_equal": same,
                "same_selection": selected(workdir) == chosen,
                "log_complete": steps == sorted(set(steps)) and steps[-1] == STEPS,
            }
        )
        print(kills[-1], flush=True)
        shutil.rmtree(workdir)

    moves = []
    for before, after in ((8, 1), (1, 8)):
        workdir = root / f"move{before}to{after}"
        run_until(
            command(workdir, teacher, devices=before), workdir, step=100, number=signal.SIGTERM
        )
        resumed_at = last_step(workdir)
        code = run_until(command(workdir, teacher, devices=after), workdir)
        mine = {row["step"]: row for row in rows(workdir) if "train/loss" in row}
        theirs = {row["step"]: row for row in rows(whole) if "train/loss" in row}
        first = min(step for step in mine if step > resumed_at)
        moves.append(
            {
                "devices": [before, after],
                "exit": code,
                "resumed_at": resumed_at,
                "first_step": first,
                "first_loss_difference": abs(
                    mine[first]["train/loss"] - theirs[first]["train/loss"]
                ),
            }
        )
        print(moves[-1], flush=True)
    shutil.rmtree(root)
    result = {
        "kills": kills,
        "byte_equal": sum(kill["byte_equal"] for kill in kills),
        "same_selection": sum(kill["same_selection"] for kill in kills),
        "of": len(kills),
        "moves": moves,
        "seed": options.seed,
    }
    print(f"{result['byte_equal']} of {result['of']} byte-equal")
    if options.out:
        pathlib.Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
