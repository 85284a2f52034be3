"""Builds the wheel and the sdist, and tries each in a fresh environment.

    python tools/release.py --out=dist

Each file is installed with the versions of `constraints.txt` into an environment of its own.
There, in an empty folder, the command line prints its help and trains a network for seconds, and
the library is imported. For other versions of Python the dependencies are resolved, not installed,
unless an interpreter of that version is on the path and `--pythons` names it.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
RESOLVED = ("3.11", "3.12", "3.13")
PURE = ("promise",)  # dependencies without a wheel; of Python alone, so one wheel serves all


def run(*command, cwd=None):
    """Runs a command without this tree on the path; returns its output."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def build(out):
    """Builds both files from a clean copy of what git tracks; returns their paths."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = pathlib.Path(scratch, "tree")
        run("git", "clone", "--quiet", "--depth=1", f"file://{ROOT}", tree)
        venv = pathlib.Path(scratch, "venv")
        run(sys.executable, "-m", "venv", venv)
        run(venv / "bin/python", "-m", "pip", "install", "--quiet", "build")
        run(venv / "bin/python", "-m", "build", "--outdir", out, tree)
    return sorted(out.glob("*.whl")), sorted(out.glob("*.tar.gz"))


def check(package, python):
    """Installs a file into a fresh environment and uses it from an empty folder."""
    with tempfile.TemporaryDirectory() as scratch:
        venv, empty = pathlib.Path(scratch, "venv"), pathlib.Path(scratch, "empty")
        empty.mkdir()
        run(python, "-m", "venv", venv)
        start = time.monotonic()
        pinned = ["-c", ROOT / "constraints.txt"]
        run(venv / "bin/python", "-m", "pip", "install", "--quiet", *pinned, package)
        installed = time.monotonic()
        program = venv / "bin/distill-jax"
        assert "usage:" in run(program, "--help", cwd=empty)
        run(program, "--config=supervised:smoke", "--workdir=runs/a", cwd=empty)
        assert (empty / "runs/a/report.html").is_file()
        code = "import distill_jax as dj; print(dj.load('runs/a')); print(dj.__version__)"
        version = run(venv / "bin/python", "-c", code, cwd=empty).split()[-1]
        print(
            f"{package.name}: {version} with {python}, installed in {installed - start:.0f} s, "
            f"used in {time.monotonic() - installed:.0f} s"
        )


def resolve(package, version):
    """Resolves the dependencies for a version of Python, from wheels alone."""
    with tempfile.TemporaryDirectory() as scratch:
        pip = (sys.executable, "-m", "pip")
        run(*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", scratch, *PURE)
        options = ["--dry-run", "--only-binary=:all:", "--python-version", version]
        options += ["--find-links", scratch, "--target", f"{scratch}/target", "--quiet"]
        run(sys.executable, "-m", "pip", "install", *options, package)
    print(f"{package.name}: dependencies resolve for Python {version}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "dist")
    parser.add_argument("--pythons", nargs="*", default=[sys.executable])
    args = parser.parse_args()
    out = args.out.absolute()
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty")
    wheels, sdists = build(out)
    for python in args.pythons:
        if shutil.which(python) is None:
            raise SystemExit(f"{python} is not an interpreter")
        for package in (*wheels, *sdists):
            check(package, python)
    for version in RESOLVED:
        resolve(wheels[0], version)


if __name__ == "__main__":
    main()
