"""Trains a config with many values of its keys: a grid, or a random search.

  python launch/sweep.py --config=configs/distill/kd.py --workdir=runs/sweep_kd --jobs=2 -- \\
      --config.roles.teacher.init=runs/supervised
  python launch/sweep.py --config=configs/distill/kd.py --workdir=runs/drawn --random=20
  python launch/sweep.py --config=configs/distill/supervised.py --workdir=runs/rates \\
      --grid=optim.lr=0.03,0.1,0.3 --backend=replicas
  python launch/sweep.py --config=configs/distill/kd.py --workdir=runs/on_slurm --backend=slurm \\
      --sbatch=--gpus=1,--time=2:00:00

`--grid=KEY=VALUE,VALUE,...`, once for each key, has the values to try. Without it, the config file
defines `sweep()` beside `get_config`: a dict from config paths to values, a list, or for `--random`
also `("uniform", low, high)` or `("log_uniform", low, high)`. `--random=20` draws 20 trials instead
of the grid. Arguments after `--` go to every trial.

Each trial is a run in `<workdir>/<number>`, and `<workdir>/sweep.json` lists them. `--backend`:

  local   runs `--jobs` trials at a time; a failed trial does not stop the others. The same command
          skips finished trials and continues the others. It ends with a table, the best trial
          first, by `eval.metric` on the held-out part: choose there, and test only the chosen one.
          `report.html` draws the metric against the values of each key.
  replicas  runs trials that differ in scalars alone side by side, as one program, and the others
          one after the other; trials are in `<workdir>/trials/<number>/seed<seed>`
  slurm   submits one array of SLURM jobs; each is requeued after preemption
  print   prints the commands

`--dry_run` prints what would run. The exit code is 0 if every trial is done, otherwise that of the
first trial that is not.
"""

import argparse
import ast
import itertools
import json
import math
import os
import pathlib
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
if (ROOT / "distill_jax").is_dir():  # a source tree, whether installed or not
    sys.path.insert(0, str(ROOT))

from distill_jax.core.errors import UserError  # noqa: E402
from distill_jax.run import config_files, console, crash, paths  # noqa: E402
from distill_jax.run import workdir as rules  # noqa: E402
from distill_jax.trainer.io import files  # noqa: E402
from distill_jax.trainer.io.paths import absolute, check_folder, check_places  # noqa: E402

PREEMPTED = 75

MOST = 100_000
"""Trials of a sweep."""


class SweepError(UserError):
    """A sweep that cannot be run as written."""


def read_space(spec: str) -> dict[str, Any]:
    """Returns what `sweep()` of a config file returns, its values as lists and ranges.

    Raises:
      UserError: there is no such file or function, it raises, or it returns something else.
    """
    paths.make_importable()
    path = config_files.find(spec.partition(":")[0])
    space = config_files.run(path).get("sweep")
    if not callable(space):
        raise SweepError(f"{path} has no function sweep()")
    with config_files.explained(path):
        found = space()
    if not isinstance(found, Mapping) or not found:
        raise SweepError(f"sweep() of {path} returned no dict of values by config path")
    return {name: _checked(name, values) for name, values in found.items()}


def _checked(path: Any, values: Any) -> Any:
    """Returns the values of a config path as a list, or a range as it is.

    Raises:
      SweepError: neither, or a value that a command line cannot hold.
    """
    where = f"sweep() at {path!r}"
    if not isinstance(path, str) or not path:
        raise SweepError("is no config path", where=where, hint="such as 'optim.lr'")
    if _is_range(values):
        kind, low, high = values
        numbers = all(isinstance(x, (int, float)) and math.isfinite(x) for x in (low, high))
        if not numbers or not low < high or (kind == "log_uniform" and low <= 0):
            hint = f"({kind!r}, low, high), low < high"
            hint += ", both above 0" if kind == "log_uniform" else ""
            raise SweepError(f"{values!r} is no range", where=where, hint=hint)
        return values
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        hint = f"[{values!r}] for this one value"
        raise SweepError(f"{values!r} is no list of values", where=where, hint=hint)
    listed = [_plain(value, where) for value in itertools.islice(values, MOST + 1)]
    if not listed:
        raise SweepError("has no values", where=where, hint="list one or more")
    kinds = [isinstance(value, (int, float)) for value in listed[1:]]
    if isinstance(values, tuple) and isinstance(listed[0], str) and any(kinds):
        hint = " or ".join(f"({kind!r}, low, high)" for kind in _DRAWS)
        raise SweepError(f"{values!r} is no range", where=where, hint=hint)
    return listed


def _plain(value: Any, where: str) -> Any:
    """Returns a value of Python's own types, such as a number of NumPy's as Python's."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, (tuple, list)):
        return tuple(_plain(item, where) for item in value)
    finite = not isinstance(value, float) or math.isfinite(value)
    if not finite or not (value is None or isinstance(value, (bool, int, float, str))):
        what = f"{value!r} cannot stand on a command line"
        raise SweepError(what, where=where, hint="numbers, strings, None and tuples of them")
    return value


def _is_range(values: Any) -> bool:
    return isinstance(values, tuple) and len(values) == 3 and _draws(values[0])


def _draws(kind: Any) -> bool:
    return isinstance(kind, str) and kind in _DRAWS


_DRAWS = {
    "uniform": lambda generator, low, high: generator.uniform(low, high),
    "log_uniform": lambda generator, low, high: math.exp(
        generator.uniform(math.log(low), math.log(high))
    ),
}


def read_grid(given: Sequence[str]) -> dict[str, Any]:
    """Returns the values by config path of `--grid=KEY=VALUE,VALUE` flags.

    Raises:
      SweepError: a flag is no key and values, or a key is given twice.
    """
    space: dict[str, Any] = {}
    for text in given:
        path, mark, values = text.partition("=")
        path = path.strip().removeprefix("config.")
        if not mark or not path or not values:
            raise SweepError(f"{text!r} is no grid", where="--grid", hint="optim.lr=0.03,0.1,0.3")
        if path in space:
            raise SweepError("the key is given twice", where=f"--grid={path}", hint="keep one")
        space[path] = _checked(path, [_value(part) for part in _split(values)])
    return space


def _split(text: str) -> list[str]:
    """Splits at commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        depth += (letter in "([{") - (letter in ")]}") if not quote else 0
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _value(text: str) -> Any:
    constants = {"true": True, "false": False, "none": None}
    if text.lower() in constants:
        return constants[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def grid(space: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns every combination; the last path varies fastest.

    Raises:
      SweepError: a path has a range in place of values.
    """
    for path, values in space.items():
        if _is_range(values) or not values:
            raise SweepError(f"{path} has no list of values: give --random=N, or list them")
    n = math.prod(len(values) for values in space.values())
    if n > MOST:
        raise SweepError(f"{n:,} combinations, at most {MOST:,}", hint="--random=N draws some")
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def draw(space: Mapping[str, Any], *, n: int, seed: int) -> list[dict[str, Any]]:
    """Returns n independent draws; the first m of n are those of m."""
    generator = random.Random(seed)

    def one(values: Any) -> Any:
        if _is_range(values):
            kind, low, high = values
            return float(f"{_DRAWS[kind](generator, low, high):.6g}")
        return generator.choice(list(values))

    return [{path: one(values) for path, values in space.items()} for _ in range(n)]


def _text(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else repr(value)


def commands(
    trials: Sequence[Mapping[str, Any]],
    *,
    config: str,
    workdir: pathlib.Path,
    args: Sequence[str],
    python: str = sys.executable,
) -> list[list[str]]:
    """Returns the command of each trial."""
    width = len(str(max(len(trials) - 1, 1)))
    shared = [python, "-m", "distill_jax.main", f"--config={config}"]
    return [
        [
            *shared,
            f"--workdir={workdir / f'{i:0{width}}'}",
            *args,
            *(f"--config.{path}={_text(value)}" for path, value in trial.items()),
        ]
        for i, trial in enumerate(trials)
    ]


def study_command(
    trials: Sequence[Mapping[str, Any]],
    *,
    config: str,
    workdir: pathlib.Path,
    args: Sequence[str],
    metric: str,
    seed: int,
    python: str = sys.executable,
) -> list[str]:
    """Returns the command of a study with one arm for each trial, side by side where it can."""
    width = len(str(max(len(trials) - 1, 1)))
    arms = [
        f"--config.study.arms.{i:0{width}}.{path}={_text(value)}"
        for i, trial in enumerate(trials)
        for path, value in trial.items()
    ]
    return [
        *(python, "-m", "distill_jax.main", "--mode=study", f"--config={config}"),
        *(f"--workdir={workdir}", *args, "--config.study.arms={}", *arms),
        *(f"--config.study.seeds={seed},", "--config.study.replicas=auto"),
        *(f"--config.study.metric={metric}", f"--config.study.reference={0:0{width}}"),
    ]


def write_report(
    trials: Sequence[Mapping[str, Any]], folders: Sequence[pathlib.Path], workdir: pathlib.Path
) -> pathlib.Path | None:
    """Writes the report of a sweep with two finished trials or more; returns its path."""
    from distill_jax.report.of_comparison import read, write_sweep_report

    finished = [i for i, folder in enumerate(folders) if _result(folder) is not None]
    if len(finished) < 2:
        return None
    config = files.read_json(folders[finished[0]] / "config.json", shape={"eval": dict})
    names = {folders[i].absolute(): _name(folders[i]) for i in finished}
    study = read(
        [folders[i] for i in finished],
        workdir,
        metric=config["eval"]["metric"],
        names=names,
        state="best",
    )
    values = {
        _name(folder): {path: _text(v) if v is None else v for path, v in trial.items()}
        for folder, trial in zip(folders, trials, strict=True)
    }
    return write_sweep_report(study, values)


def _name(folder: pathlib.Path) -> str:
    """Returns the number of a trial; in a study its folder is `<number>/seed<seed>`."""
    return folder.parent.name if folder.name.startswith("seed") else folder.name


def slurm_script(lines: Sequence[Sequence[str]], *, jobs: int, options: Sequence[str]) -> str:
    """Returns a batch script with one task of an array for each command."""
    cases = "\n".join(f"    {i}) run {shlex.join(line)} ;;" for i, line in enumerate(lines))
    extra = "".join(f"#SBATCH {option}\n" for option in options)
    return f"""#!/bin/bash
#SBATCH --job-name=sweep
#SBATCH --array=0-{len(lines) - 1}%{jobs}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.log
#SBATCH --signal=TERM@120
{extra}set -u
trap ':' TERM

run() {{
    srun --ntasks=1 "$@"
    code=$?
    if [[ $code -eq {PREEMPTED} ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
    exit "$code"
}}

case $SLURM_ARRAY_TASK_ID in
{cases}
esac
"""


def run_local(lines: Sequence[Sequence[str]], *, jobs: int, folders: Sequence[pathlib.Path]) -> int:
    """Runs the commands, `jobs` at a time, each with a log in its folder; returns the exit code.

    SIGTERM and Ctrl-C are handed on and start nothing new.
    """
    waiting = [i for i in range(len(lines)) if _result(folders[i]) is None]
    print(f"{len(lines) - len(waiting)} of {len(lines)} trials are done", flush=True)
    running: dict[int, subprocess.Popen] = {}
    codes: dict[int, int] = {}
    stopping: list[int] = []

    def stop(number, frame):
        del frame
        stopping.append(number)
        for child in running.values():
            child.send_signal(signal.SIGTERM)

    previous = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        while running or (waiting and not stopping):
            while waiting and len(running) < jobs and not stopping:
                i = waiting.pop(0)
                folders[i].mkdir(parents=True, exist_ok=True)
                with (folders[i] / "log.txt").open("a") as log:
                    running[i] = subprocess.Popen(
                        lines[i],
                        env={**os.environ, "DISTILL_JAX_LAUNCHER": str(os.getpid())},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
            for i, child in list(running.items()):
                if (code := child.poll()) is not None:
                    del running[i]
                    codes[i] = code if code >= 0 else 128 - code
                    print(f"{folders[i]}: {_outcome(codes[i])}", flush=True)
            time.sleep(0.1)
    finally:
        for child in running.values():
            child.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)
    if stopping:
        return PREEMPTED
    return next((code for _, code in sorted(codes.items()) if code), 0)


def _outcome(code: int) -> str:
    meanings = {0: "done", 2: "a user error", 3: "a loss that is not finite", 70: "stalled"}
    meanings[PREEMPTED] = "stopped"
    return meanings.get(code, f"exit code {code}") + ("" if code == 0 else "; see its log.txt")


def _result(folder: pathlib.Path, *, warn: bool = False) -> dict[str, Any] | None:
    """Returns the result of a finished trial, None where it is not finished or is damaged."""
    try:
        found = files.read_json(folder / "result.json", shape={"status": str})
        if found["status"] != "done":
            return None
        return files.read_json(folder / "result.json", shape={"best": dict})
    except files.MissingFile:
        return None
    except files.DamagedFile as error:
        if warn:
            print(f"warning: {error}", file=sys.stderr)
        return None


def table(trials: Sequence[Mapping[str, Any]], folders: Sequence[pathlib.Path]) -> str:
    """Returns the finished trials, the best first, by the metric that selects their checkpoints.

    What cannot be read is left out, and named below the table.
    """
    rows, notes, metric, sign = [], [], "", 1.0
    for trial, folder in zip(trials, folders, strict=True):
        if (result := _result(folder, warn=True)) is None:
            continue
        try:
            config = files.read_json(folder / "config.json", shape={"eval": dict})
            metric, mode = (config["eval"][name] for name in ("metric", "mode"))
            value = result["best"].get(metric)
        except (files.DamagedFile, KeyError, TypeError) as error:
            what = str(error) if isinstance(error, UserError) else "its config.json is damaged"
            notes.append(f"left out: {folder.name}: {what}")
            continue
        sign = 1.0 if mode == "max" else -1.0
        if isinstance(value, (int, float)):
            rows.append((sign * value, _name(folder), trial))
        elif value is not None:
            notes.append(f"left out: {folder.name}: {metric} is {value!r}")
    rows.sort(key=lambda row: (-row[0], row[1]))
    lines = [f"{'trial':<8}{metric:>24}"] if rows else ["no finished trial has a metric"]
    for value, name, trial in rows:
        values = "  ".join(f"{path}={_text(v)}" for path, v in trial.items())
        lines.append(f"{name:<8}{sign * value:>24.6g}  {values}")
    return "\n".join([*lines, *notes])


def main(argv: Sequence[str]) -> int:
    """Parses the command line and carries the sweep out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config file with sweep()")
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="folder of the trials")
    parser.add_argument(
        "--grid", action="append", default=[], metavar="KEY=V,V", help="values of a key"
    )
    parser.add_argument(
        "--random", type=int, default=0, metavar="N", help="number of draws; 0: the grid"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")
    parser.add_argument(
        "--backend",
        choices=("local", "replicas", "slurm", "print"),
        default="local",
        help="where trials run",
    )
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
    parser.add_argument("--sbatch", default="", help="options of sbatch, separated by commas")
    parser.add_argument("--dry_run", action="store_true", help="print what would run")
    parser.add_argument("args", nargs="*", help="`--`, then flags of every trial")
    flags = parser.parse_args(argv)
    if flags.jobs < 1 or flags.random < 0:
        parser.error("--jobs is 1 or more, --random 0 or more")
    try:
        return _carry_out(flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _carry_out(flags: argparse.Namespace) -> int:
    crash.doing("reading the sweep")
    space = read_grid(flags.grid) if flags.grid else read_space(flags.config)
    trials = draw(space, n=flags.random, seed=flags.seed) if flags.random else grid(space)
    workdir = absolute(flags.workdir, where="--workdir")
    lines = commands(trials, config=flags.config, workdir=workdir, args=flags.args)
    folders = [pathlib.Path(line[4].partition("=")[2]) for line in lines]
    listed = [{"folder": f.name, "values": t} for f, t in zip(folders, trials, strict=True)]
    listing = json.dumps(listed, indent=1)
    script = slurm_script(lines, jobs=flags.jobs, options=[o for o in flags.sbatch.split(",") if o])
    if flags.dry_run and flags.backend == "slurm":
        print(script, end="")
        return 0
    if flags.dry_run or flags.backend == "print":
        print("\n".join(shlex.join(line) for line in lines))
        return 0
    check_folder(workdir, where="--workdir")
    check_places(workdir, files=("sweep.json", "sweep.sh", "report.html", "crash.txt"))
    with rules.claim(workdir, "sweep", with_peers=False):
        _check_listing(workdir / "sweep.json", listed, folders)
        files.write_text(workdir / "sweep.json", listing)
        if flags.backend == "slurm":
            path = workdir / "sweep.sh"
            files.write_text(path, script)
            if shutil.which("sbatch") is None:
                raise SweepError("there is no sbatch on this machine", where="--backend=slurm")
            return subprocess.run(["sbatch", str(path)], check=False).returncode
        crash.doing("running the trials")
        if flags.backend == "replicas":
            code, folders = _run_study(trials, flags, workdir)
        else:
            code = run_local(lines, jobs=flags.jobs, folders=folders)
        crash.doing("making the table")
        print(table(trials, folders))
        if (page := write_report(trials, folders, workdir)) is not None:
            print(f"report: {page}")
        return code


def _run_study(
    trials: Sequence[Mapping[str, Any]], flags: argparse.Namespace, workdir: pathlib.Path
) -> tuple[int, list[pathlib.Path]]:
    """Runs the trials as a study; returns its exit code and the folders of the trials."""
    from distill_jax.run import flags as flags_lib

    inside = workdir / "trials"
    single = [arg for arg in flags.args if arg.startswith("--config")]
    line = ["sweep", f"--config={flags.config}", f"--workdir={inside}", *single]
    config = flags_lib.parse(line).config
    command = study_command(
        trials,
        config=flags.config,
        workdir=inside,
        args=flags.args,
        metric=config.eval.metric,
        seed=config.seed,
    )
    width = len(str(max(len(trials) - 1, 1)))
    folders = [inside / f"{i:0{width}}" / f"seed{config.seed}" for i in range(len(trials))]
    waiting = [folder for folder in folders if _result(folder) is None]
    print(f"{len(trials) - len(waiting)} of {len(trials)} trials are done", flush=True)
    environ = {**os.environ, "DISTILL_JAX_LAUNCHER": str(os.getpid())}
    child = subprocess.Popen(command, env=environ)
    previous = {
        n: signal.signal(n, lambda number, frame: child.send_signal(number))
        for n in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        return child.wait(), folders
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _refuse_logs(folders: Sequence[pathlib.Path]) -> None:
    """Refuses logs in the folders of trials that a new sweep would write to."""
    for path in (folder / "log.txt" for folder in folders):
        if path.exists():
            hint = "name another --workdir, or move it away"
            raise UserError("was not written by this sweep", where=str(path), hint=hint)


def _check_listing(
    path: pathlib.Path, listed: list[dict[str, Any]], folders: Sequence[pathlib.Path]
) -> None:
    """Raises `UserError` where a folder holds another sweep, or one whose list is damaged."""
    try:
        there = files.read_value(path)
    except files.MissingFile:
        _refuse_logs(folders)
        return
    if there != json.loads(json.dumps(listed)):
        raise SweepError(
            "holds another sweep", where=str(path.parent), hint="name another --workdir"
        )


def entry() -> None:
    """The console script."""
    console.guard()
    argv = sys.argv[1:]
    named = [arg.partition("=")[2] for arg in argv if arg.startswith("--workdir=")]
    folder = pathlib.Path(named[0]) if named and pathlib.Path(named[0]).is_dir() else None
    intact = "finished trials are kept, and the same command goes on with the others"
    sys.exit(crash.guarded(lambda: main(argv), folder=folder, intact=intact))


if __name__ == "__main__":
    entry()
