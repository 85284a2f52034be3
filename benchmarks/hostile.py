"""Hostile command lines, data and files: each ends as was written down before it was run.

  python benchmarks/hostile.py [--list] [--class=ah] [--only ID ...] [--quick] [--out=FILE]

Commands: (a) environment and console, (b) paths and folders, (c) names and code, (d) values,
(e) data named on the command line, (f) resume and concurrency, (g) modes and flags. Files:
(h) stored files that choose code or reach outside of a run, (i) damaged files, (j) files of other
programs. A case trains a perceptron of eight units on 8 x 8 images for nine steps. Every case
states its right outcomes, what a refusal must mention, what must survive byte for byte, and the
run whose metrics and log rows it must equal (`_hostile_commands.py`, `_hostile_files.py`).

A case fails where code was executed that a stored file chose (a canary file appears), a file of
others is changed or deleted, files are written outside of the workdir, a refusal changes or leaves
something, a traceback is printed, the outcome is another than the one written down, or 20 seconds
of a processor pass. `--out=FILE` writes all outcomes as JSON.
"""

import argparse
import collections
import contextlib
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("XLA_FLAGS", None)
warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)

import _hostile_box as boxes  # noqa: E402
import _hostile_commands as commands  # noqa: E402
import _hostile_files as files  # noqa: E402
import _record  # noqa: E402

CLASSES = {
    "a": "environment and console",
    "b": "paths and folders",
    "c": "names and code",
    "d": "values",
    "e": "data on the command line",
    "f": "resume and concurrency",
    "g": "modes and flags",
    "h": "stored files that choose code or reach outside",
    "i": "damaged files",
    "j": "files of other programs",
}
CASES = {case.id: case for case in [*commands.CASES, *files.CASES]}

GRAVE = ("executed", "foreign lost", "wrote outside", "lost work")
"""Kinds of failure that are named first."""

QUICK = (
    "a-locale-c",
    "b-unicode",
    "c-import-base-exception",
    "c-import-exits",
    "e-x-object",
    "e-file-header-code",
    "g-arm-dots",
    "h-config-own-load",
    "h-teacher-walk-os-train",
    "i-superscript",
    "j-half-checkpoints-2-model-bin",
)
"""What the fast tests run."""

_MISTAKE = commands.refused("--config.optim.lr=-1", says=("optim.lr",))
JUDGED = {
    case.id: case
    for case in (
        boxes.Case(
            id="executed",
            about="a canary",
            steps=(lambda box: box.write("CANARY", ""), _MISTAKE),
        ),
        boxes.Case(
            id="foreign",
            about="a changed file of others",
            steps=(
                lambda box: (box.foreign("runs/a/notes"), box.write("runs/a/notes", "other")),
                _MISTAKE,
            ),
        ),
        boxes.Case(
            id="fragment",
            about="a message without its fragment",
            steps=(commands.refused("--config.optim.lr=-1", says=("batch_size",)),),
        ),
        boxes.Case(
            id="outcome",
            about="code 0 where a refusal is right",
            steps=(commands.plain("--help", out="refused"),),
        ),
        boxes.Case(
            id="outside",
            about="a file outside of the workdir",
            steps=(
                lambda box: box.write("odd.py", "open('outside.txt', 'w').close()\n"),
                commands.refused(config="odd.py"),
            ),
        ),
        boxes.Case(
            id="unequal",
            about="another metric than the reference has",
            start="clean",
            steps=(
                lambda box: box.edit(
                    "runs/a/result.json", lambda r: r["metrics"].update({"test/nll": 0.5})
                ),
                commands.train(out="finished", equal="clean"),
            ),
        ),
    )
}
"""Cases that must be found wrong: they test the judge."""


def prepare() -> None:
    """Imports what commands import; nothing of JAX is started, so that this process may fork."""
    sys.path.insert(0, str(boxes.ROOT))
    import flax.linen  # noqa: F401
    import optax  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import tqdm  # noqa: F401

    from distill_jax import (
        main,  # noqa: F401
        report,  # noqa: F401
    )
    from distill_jax.contrib import replicas  # noqa: F401
    from distill_jax.data import idx_folder, npz_file, synthetic  # noqa: F401
    from distill_jax.models import mlp  # noqa: F401
    from distill_jax.run import build, describe, study  # noqa: F401


class Runner:
    """Runs cases one after the other in one folder.

    Args:
      folder: for the box, templates and compiled programs.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder, self.root = folder, folder / "box"
        self.broken: dict[str, str] = {}
        self.references: dict[str, Any] = {}
        (folder / "compiled").mkdir(exist_ok=True)
        os.chmod(folder / "compiled", 0o777)
        (folder / "templates").mkdir(exist_ok=True)

    def _template(self, name: str) -> pathlib.Path:
        folder = self.folder / "templates" / name
        if not folder.exists() and name not in self.broken:
            parent, steps = commands.TEMPLATES[name]
            box = self.fresh(parent)
            for step in steps:
                if not isinstance(step, boxes.Run):
                    step(box)
                    continue
                before = boxes.snapshot(box.root)
                ended = boxes.wait(step, *boxes.launch(box, step))
                wrong = boxes.judge(box, step, ended, before, self.reference)[1]
                if wrong:
                    self.broken[name] = f"template {name!r}: {wrong} {ended.text[-500:]}"
            shutil.copytree(box.root, folder, symlinks=True)
        if name in self.broken:
            raise RuntimeError(self.broken[name])
        return folder

    def fresh(self, start: str) -> boxes.Box:
        source = self._template(start) if start else None
        subprocess.run(["chmod", "-R", "u+rwx", str(self.root)], stderr=subprocess.DEVNULL)
        shutil.rmtree(self.root, ignore_errors=True)
        if source is not None:
            shutil.copytree(source, self.root, symlinks=True)
        else:
            self.root.mkdir()
        return boxes.Box(self.root)

    def reference(self, name: str) -> Any:
        """Returns the fingerprint of a clean run."""
        if name not in self.references:
            self.references[name] = boxes.fingerprint(self._template(name) / "runs/a")
        return self.references[name]

    def run(self, case: boxes.Case) -> dict[str, Any]:
        """Runs a case; returns its outcomes and what is wrong with them."""
        outcomes, wrong, seconds, busy, texts = [], [], 0.0, 0.0, []
        began = time.perf_counter()
        try:
            for step in case.steps:
                if isinstance(step, boxes.Run) and step.equal:
                    self.reference(step.equal)
            box = self.fresh(case.start)
            started: tuple[boxes.Run, dict[str, str], Any] | None = None
            child: tuple[int, float, pathlib.Path]
            for step in case.steps:
                if isinstance(step, boxes.Start):
                    before = boxes.snapshot(box.root)
                    started = (step.run, before, boxes.launch(box, step.run))
                    for _ in range(1200):
                        if (box / "held").exists():
                            break
                        time.sleep(0.05)
                    continue
                if isinstance(step, boxes.Join):
                    assert started is not None
                    (box / "go").touch()
                    run, before, child = started
                    started = None
                elif isinstance(step, boxes.Run):
                    run, before = step, boxes.snapshot(box.root)
                    child = boxes.launch(box, run)
                else:
                    step(box)
                    continue
                ended = boxes.wait(run, child[0], child[1], child[2])
                outcome, found = boxes.judge(box, run, ended, before, self.reference)
                outcomes.append(outcome)
                wrong += found
                texts.append(ended.text[-1500:])
                seconds += ended.seconds
                busy += ended.processor_seconds
                if found and started is None:
                    break
            if started is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(started[2][0], 9)
                os.waitpid(started[2][0], 0)
        except Exception as error:
            wrong.append(("harness", f"{type(error).__name__}: {error}"[:1500]))
        return {
            "id": case.id,
            "about": case.about,
            "expected": [s.out for s in case.steps if isinstance(s, boxes.Run)]
            or [s.run.out for s in case.steps if isinstance(s, boxes.Start)],
            "outcomes": outcomes,
            "wrong": sorted((list(p) for p in wrong), key=lambda p: (p[0] not in GRAVE, p)),
            "seconds": round(seconds or time.perf_counter() - began, 2),
            "processor_seconds": round(busy, 2),
            "output": texts[-1] if wrong and texts else "",
        }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns counts by class and what failed."""
    table = {}
    for letter, name in CLASSES.items():
        own = [row for row in rows if row["id"].startswith(f"{letter}-")]
        failed = [row for row in own if row["wrong"]]
        kinds = collections.Counter(kind for row in failed for kind, _ in row["wrong"][:1])
        table[letter] = {
            "name": name,
            "cases": len(own),
            "as_written": len(own) - len(failed),
            "failures": dict(kinds),
            "slowest_processor_seconds": max((r["processor_seconds"] for r in own), default=0.0),
        }
    return {
        "python": platform.python_version(),
        "versions": _record.versions("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy"),
        "commit": _commit(),
        "seed": files.SEED,
        "cases": len(rows),
        "as_written": sum(not row["wrong"] for row in rows),
        "classes": table,
        "rows": [{k: v for k, v in row.items() if k != "output"} for row in rows],
    }


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=boxes.ROOT, capture_output=True, text=True
    )
    return done.stdout.strip()


def show(result: dict[str, Any]) -> str:
    """Formats the table of classes."""
    lines = [f"{'':4}{'':48}{'cases':>6}{'right':>7}  failures"]
    for letter, row in result["classes"].items():
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(row["failures"].items()))
        lines.append(f"{letter:4}{row['name']:48}{row['cases']:6}{row['as_written']:7}  {kinds}")
    lines.append(f"{'':4}{'':48}{result['cases']:6}{result['as_written']:7}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--class", dest="classes", default="")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--judge", action="store_true", help="cases that must be found wrong")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    chosen = list(CASES.values())
    if args.classes:
        chosen = [case for case in chosen if case.id[0] in args.classes]
    if args.only or args.quick:
        names = [*args.only, *(QUICK if args.quick else ())]
        chosen = [CASES[name] for name in names]
    if args.judge:
        chosen = list(JUDGED.values())
    if args.list:
        for case in chosen:
            outs = " then ".join(
                s.out if isinstance(s, boxes.Run) else s.run.out
                for s in case.steps
                if isinstance(s, (boxes.Run, boxes.Start))
            )
            print(f"{case.id:44} {outs:34} {case.about}")
        print(len(chosen), dict(collections.Counter(case.id[0] for case in chosen)))
        return 0
    prepare()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="hostile-"))
    os.chmod(folder, 0o755)
    runner, rows = Runner(folder), []
    try:
        for case in chosen:
            row = runner.run(case)
            rows.append(row)
            if row["wrong"]:
                print(f"{row['id']}: {row['about']}")
                for kind, detail in row["wrong"]:
                    print(f"    {kind}: {detail}")
                if args.verbose:
                    print(row["output"])
                sys.stdout.flush()
            if args.out and (len(rows) % 20 == 0 or len(rows) == len(chosen)):
                _record.write(summary(rows), args.out)
    finally:
        subprocess.run(["chmod", "-R", "u+rwx", str(folder)], stderr=subprocess.DEVNULL)
        shutil.rmtree(folder, ignore_errors=True)
    print(show(summary(rows)))
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
