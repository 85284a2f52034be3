"""Silent faults of public programs, and whether they are refused before the first step.

  python benchmarks/silent_faults.py [NAME ...]

Every fault of `tests/silent_faults.py` is run as a command line in one process. Seconds are
from the command line to the refusal; the start of Python and of JAX is not among them (the first
command is given twice, and the second counts). The seconds of the processor, of all threads, are
beside them, since others may share the machine. Writes `benchmarks/results/silent_faults.json`,
unless faults are named.
"""

import contextlib
import io
import json
import os
import pathlib
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402

from distill_jax import main  # noqa: E402
from tests import silent_faults  # noqa: E402


def run(fault, folder: pathlib.Path, workdir: pathlib.Path):
    """Returns what became of one fault."""
    out, err = io.StringIO(), io.StringIO()
    began, busy = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.main(["distill-jax", *silent_faults.argv(fault, folder, workdir)])
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    lines = out.getvalue().splitlines() + err.getvalue().splitlines()
    warnings = [line for line in lines if line.startswith("warning:")]
    error = err.getvalue().partition("error: ")[2]
    message = error.strip() if code else "; ".join(warnings)
    return {
        "name": fault.name,
        "source": fault.source,
        "expected": fault.expected,
        "found": silent_faults.outcome(fault, code, out.getvalue(), err.getvalue()),
        "seconds": round(seconds, 3),
        "processor_seconds": round(busy, 3),
        "message": message.replace(str(folder), "TEACHERS").replace(str(workdir), "WORKDIR"),
    }


def measure(names: list[str]) -> dict:
    chosen = [f for f in silent_faults.FAULTS if not names or any(n in f.name for n in names)]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        with contextlib.redirect_stdout(io.StringIO()):
            silent_faults.make(folder)
        run(chosen[0], folder, folder / "warm")
        rows = []
        for i, fault in enumerate(chosen):
            rows.append(run(fault, folder, folder / f"run{i}"))
            row = rows[-1]
            good = "" if row["found"] == row["expected"] else f"  NOT {row['expected']}"
            print(f"{row['found']:8} {row['seconds']:6.2f} s  {fault.name}{good}", flush=True)
            if good or names:
                print("    ", row["message"].replace("\n", "\n     "))
    refused = [row for row in rows if row["found"] == "refused"]
    return {
        "jax": jax.__version__,
        "python": sys.version.split()[0],
        "faults": len(rows),
        "refused": len(refused),
        "refused_within_5_s": sum(row["seconds"] < 5 for row in refused),
        "warned": sum(row["found"] == "warned" for row in rows),
        "neither": [row["name"] for row in rows if row["found"] not in ("refused", "warned")],
        "slowest_refusal_seconds": max((row["seconds"] for row in refused), default=None),
        "slowest_refusal_processor_seconds": max(
            (row["processor_seconds"] for row in refused), default=None
        ),
        "load_average": os.getloadavg()[0],
        "rows": rows,
    }


if __name__ == "__main__":
    result = measure(sys.argv[1:])
    print({k: v for k, v in result.items() if k != "rows"})
    if not sys.argv[1:]:
        path = ROOT / "benchmarks" / "results" / "silent_faults.json"
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
