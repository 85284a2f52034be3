"""Pairs of the same command on one fresh workdir: one trains, the other is refused.

  python benchmarks/launch_pairs.py [--pairs=20] [--out=benchmarks/results/launch_pairs.json]

The second process starts 0 to 1 s after the first. Right is that one of them ends with 0 and the
other with 2 and one message, before the first has ended and after at most 5 processor seconds of
its own work (beyond its imports, taken from a process that only imports; wall-clock seconds are
recorded too, but others may share the machine). The run is then equal to one that was alone: every
array of the last checkpoint byte for byte, and all rows of the log but for clocks. Afterwards the
same command must find a finished run.
"""

import argparse
import json
import os
import pathlib
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import _survival as survival

STEPS, WITHIN, MOST = 400, 5.0, 180


def command(workdir: pathlib.Path) -> list[str]:
    values = {
        "roles.student.model": "mlp",
        "roles.student.kwargs.hidden": "(16,)",
        "total": STEPS,
        "eval.every": 40,
        "log.every_steps": 10,
        "log.tensorboard": False,
        "mesh.cpu_devices": 1,
    }
    return [
        *(sys.executable, "-m", "distill_jax.main"),
        *("--config=configs/distill/supervised.py:smoke", f"--workdir={workdir}"),
        *(f"--config.{path}={value}" for path, value in values.items()),
    ]


def start(workdir: pathlib.Path, output: pathlib.Path) -> subprocess.Popen:
    environ = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with output.open("wb") as out:
        return subprocess.Popen(
            command(workdir), cwd=survival.ROOT, env=environ, stdout=out, stderr=out
        )


def imports() -> tuple[float, float]:
    """Returns the seconds that imports take now, by the clock and of a processor."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    code = "import distill_jax.main, distill_jax.run.train.loop, distill_jax.run.build"
    subprocess.run([sys.executable, "-c", code], cwd=survival.ROOT, check=True)
    return time.perf_counter() - began, _spent(resource.getrusage(resource.RUSAGE_CHILDREN), before)


def _spent(used: resource.struct_rusage, before: resource.struct_rusage | None = None) -> float:
    seconds = used.ru_utime + used.ru_stime
    return seconds - (before.ru_utime + before.ru_stime if before else 0.0)


def final(workdir: pathlib.Path) -> tuple[dict[str, bytes], list[dict]]:
    """Returns the arrays of the last checkpoint as bytes, and the rows of the log."""
    steps = [
        p for p in (workdir / "checkpoints").iterdir() if p.name.isascii() and p.name.isdigit()
    ]
    last = max(steps, key=lambda p: int(p.name))
    arrays = survival.arrays(last)
    rows = [{k: v for k, v in r.items() if k == "step" or "/" in k} for r in survival.rows(workdir)]
    return {name: x.tobytes() for name, x in arrays.items()}, [row for row in rows if len(row) > 1]


def pair(folder: pathlib.Path, number: int, stagger: float) -> dict:
    """Starts two processes on one workdir and waits for both, for `MOST` seconds."""
    workdir = folder / f"pair{number}"
    outputs = [folder / f"out{number}-{i}" for i in range(2)]
    importing, importing_busy = imports()
    children, began = [], []
    for i in range(2):
        began.append(time.perf_counter())
        children.append(start(workdir, outputs[i]).pid)
        if i == 0:
            time.sleep(stagger)
    codes: list[int | None] = [None, None]
    ended, busy = [0.0, 0.0], [0.0, 0.0]
    while None in codes:
        late = time.perf_counter() - began[0] > MOST
        for i in range(2):
            if codes[i] is None:
                if late:
                    os.kill(children[i], 9)
                done, status, used = os.wait4(children[i], 0 if late else os.WNOHANG)
                if done:
                    codes[i], ended[i] = os.waitstatus_to_exitcode(status), time.perf_counter()
                    busy[i] = _spent(used)
        time.sleep(0.01)
    seconds = [e - b for b, e in zip(began, ended, strict=True)]
    texts = [path.read_text("utf-8", "replace") for path in outputs]
    problems = []
    found = {
        "stagger": round(stagger, 3),
        "codes": codes,
        "seconds": [round(s, 2) for s in seconds],
        "processor_seconds": [round(s, 2) for s in busy],
        "import_seconds": round(importing, 2),
        "import_processor_seconds": round(importing_busy, 2),
    }
    if sorted(map(str, codes)) != ["0", "2"]:
        problems.append(f"codes {codes}: " + " | ".join(t.strip()[-300:] for t in texts))
    else:
        loser = codes.index(2)
        message = [line for line in texts[loser].splitlines() if line.startswith("error: ")]
        found |= {
            "refused": ["first", "second"][loser],
            "refused_after_imports": round(max(0.0, seconds[loser] - importing), 2),
            "work_of_the_refused": round(max(0.0, busy[loser] - importing_busy), 2),
            "refused_before_the_other_ended": ended[loser] < ended[1 - loser],
            "message": message[0][:200].replace(str(workdir), "WORKDIR") if message else "",
        }
        if len(message) != 1 or "Traceback" in texts[loser]:
            problems.append(f"{len(message)} messages: {texts[loser][-500:]}")
        if found["work_of_the_refused"] > WITHIN or ended[loser] > ended[1 - loser]:
            problems.append(f"refused after {found['work_of_the_refused']} s of work")
    return found | {"problems": problems}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(survival.ROOT))
    folder = pathlib.Path(tempfile.mkdtemp(prefix="pairs-"))
    draw, rows = random.Random(args.seed), []
    staggers = [0.0, *(draw.random() for _ in range(args.pairs - 1))][: args.pairs]
    try:
        alone = start(folder / "alone", folder / "out-alone")
        if alone.wait(timeout=300):
            print((folder / "out-alone").read_text())
            return 1
        arrays, log = final(folder / "alone")
        for number, stagger in enumerate(staggers):
            row = pair(folder, number, stagger)
            try:
                found, found_log = final(folder / f"pair{number}")
                row["equal_arrays"], row["equal_log"] = found == arrays, found_log == log
                again = start(folder / f"pair{number}", folder / "out-again")
                row["again"] = again.wait(timeout=120)
            except Exception as error:
                row["problems"].append(f"{type(error).__name__}: {error}"[:300])
            if not (row.get("equal_arrays") and row.get("equal_log") and row.get("again") == 0):
                row["problems"].append("the run differs from one alone")
            rows.append(row)
            print(number, json.dumps(row), flush=True)
            shutil.rmtree(folder / f"pair{number}", ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    refusals = [r["refused_after_imports"] for r in rows if "refused" in r]
    work = [r["work_of_the_refused"] for r in rows if "refused" in r]
    result = {
        "python": sys.version.split()[0],
        "pairs": len(rows),
        "right": sum(not row["problems"] for row in rows),
        "refused_after_imports_median": statistics.median(refusals) if refusals else None,
        "refused_after_imports_most": max(refusals, default=None),
        "work_of_the_refused_most": max(work, default=None),
        "seed": args.seed,
        "rows": rows,
    }
    print({k: v for k, v in result.items() if k != "rows"})
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    return int(result["right"] != len(rows))


if __name__ == "__main__":
    sys.exit(main())
