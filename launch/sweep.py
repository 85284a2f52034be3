"""Trains a config with many values of its keys: a grid, or a random search.

  python launch/sweep.py --config=configs/distill/kd.py --workdir=runs/sweep_kd --jobs=2 -- \\
      --config.roles.teacher.init=runs/supervised
  python launch/sweep.py --config=configs/distill/kd.py --workdir=runs/drawn --random=20
  python launch/sweep.py --config=configs/distill/supervised.py --workdir=runs/rates \\
      --grid=optim.lr=0.03,0.1,0.3 --backend=replicas
  python launch/sweep.py --config=configs/distill/kd.py --workdir=runs/halved --random=27 \\
      --halving=3
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

`--halving=3` (backend `local`) stops hopeless trials early, by successive halving: of n trials the
best third by `eval.metric` at a first rung go on to a second at three times the length, and so on,
until the last third trains to the end (`distill_jax/run/halving.py` has the rule and its sources).
`--rungs=1` makes fewer cuts. The test part has no say: a trial that stops never reads it.
`halving.json` has the rungs. A stopped trial keeps its folder, and its `result.json` says why; its
own command, as `--dry_run` prints it, continues it.

`--dry_run` prints what would run. The exit code is 0 if every trial is done, otherwise that of the
first trial that is not.
"""

import argparse
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
if (ROOT / "distill_jax").is_dir():  # a source tree, whether installed or not
    sys.path.insert(0, str(ROOT))

from distill_jax.core.errors import UserError  # noqa: E402
from distill_jax.run import console, crash, halving  # noqa: E402
from distill_jax.run import workdir as rules  # noqa: E402
from distill_jax.run.sweep_space import (  # noqa: E402
    SweepError,
    draw,
    grid,
    read_grid,
    read_space,
)
from distill_jax.run.sweep_trials import (  # noqa: E402
    PREEMPTED,
    result,
    run_halved,
    run_local,
)
from distill_jax.run.workdir.names import NAMES  # noqa: E402
from distill_jax.trainer.io import files  # noqa: E402
from distill_jax.trainer.io.paths import absolute, check_folder, check_places  # noqa: E402


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
    trials: Sequence[Mapping[str, Any]],
    folders: Sequence[pathlib.Path],
    workdir: pathlib.Path,
    record: halving.Record | None = None,
) -> pathlib.Path | None:
    """Writes the report of a sweep with two finished or stopped trials or more; returns its path.

    Args:
      trials: values by config path.
      folders: of the trials.
      workdir: of the sweep.
      record: of the trials that successive halving stopped.
    """
    from distill_jax.report.of_comparison import read
    from distill_jax.report.of_sweep import write_sweep_report

    stopped = record.stopped() if record else {}
    finished = [
        i
        for i, folder in enumerate(folders)
        if result(folder) is not None
        or (_name(folder) in stopped and (folder / "config.json").is_file())
    ]
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
    return write_sweep_report(study, values, rungs=record.rungs if record else ())


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
    if [[ $code -eq {PREEMPTED} || $code -eq 143 ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
    exit "$code"
}}

case $SLURM_ARRAY_TASK_ID in
{cases}
esac
"""


def table(
    trials: Sequence[Mapping[str, Any]],
    folders: Sequence[pathlib.Path],
    record: halving.Record | None = None,
) -> str:
    """Returns the finished trials, the best first, by the metric that selects their checkpoints.

    What cannot be read is left out, and named below the table, as are stopped trials.
    """
    rows, notes, metric, sign = [], [], "", 1.0
    for trial, folder in zip(trials, folders, strict=True):
        if (found := result(folder, warn=True)) is None:
            continue
        try:
            config = files.read_json(folder / "config.json", shape={"eval": dict})
            metric, mode = (config["eval"][name] for name in ("metric", "mode"))
            value = found["best"].get(metric)
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
    stopped = record.stopped() if record else {}
    notes += [f"stopped: {trial}: {entry['why']}" for trial, entry in stopped.items()]
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
    parser.add_argument(
        "--halving", type=int, metavar="ETA", help="stop all but the best 1 in ETA at each rung"
    )
    parser.add_argument("--rungs", type=int, metavar="N", help="rungs of --halving")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
    parser.add_argument("--sbatch", default="", help="options of sbatch, separated by commas")
    parser.add_argument("--dry_run", action="store_true", help="print what would run")
    parser.add_argument("args", nargs="*", help="`--`, then flags of every trial")
    flags = parser.parse_args(argv)
    if flags.jobs < 1 or flags.random < 0:
        parser.error("--jobs is 1 or more, --random 0 or more")
    if flags.halving is not None and flags.halving < 2:
        parser.error("--halving is 2 or more")
    if flags.rungs is not None and (flags.rungs < 1 or flags.halving is None):
        parser.error("--rungs is 1 or more, and goes with --halving")
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
    record = _record(trials, flags, workdir) if flags.halving else None
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
        if record is not None:
            parts = ", ".join(rung["part"] for rung in record.rungs)
            print(f"# at {parts} of training 1 in {record.eta} goes on, by {record.metric}")
        return 0
    check_folder(workdir, where="--workdir")
    check_places(workdir, files=(*NAMES["sweep"], "crash.txt"))
    with rules.claim(workdir, "sweep", with_peers=False):
        _check_listing(workdir / "sweep.json", listed, folders)
        _check_rule(record, folders, workdir)
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
        elif record is not None:
            code = run_halved(lines, jobs=flags.jobs, folders=folders, record=record)
        else:
            code = run_local(lines, jobs=flags.jobs, folders=folders)
        crash.doing("making the table")
        print(table(trials, folders, record))
        if (page := write_report(trials, folders, workdir, record)) is not None:
            print(f"report: {page}")
        return code


def _config(flags: argparse.Namespace, workdir: pathlib.Path) -> Any:
    """Returns the config that trials share."""
    from distill_jax.run import flags as flags_lib

    single = [arg for arg in flags.args if arg.startswith("--config")]
    return flags_lib.parse(
        ["sweep", f"--config={flags.config}", f"--workdir={workdir}", *single]
    ).config


def _record(
    trials: Sequence[Mapping[str, Any]], flags: argparse.Namespace, workdir: pathlib.Path
) -> halving.Record:
    """Returns the record of successive halving in a folder, or a new one.

    Raises:
      SweepError: these trials cannot be halved.
    """
    if flags.backend != "local":
        what = f"trials of --backend={flags.backend} do not stop early"
        raise SweepError(what, where="--halving", hint="--backend=local")
    parts = halving.plan(len(trials), eta=flags.halving, most=flags.rungs)
    config = _config(flags, workdir / "0")
    halving.check(config, trials, parts)
    chosen = {"metric": config.eval.metric, "mode": config.eval.mode}
    return halving.Record.open(workdir / halving.FILE, eta=flags.halving, parts=parts, **chosen)


def _check_rule(
    record: halving.Record | None, folders: Sequence[pathlib.Path], workdir: pathlib.Path
) -> None:
    """Refuses a sweep that began with another rule for when its trials stop."""
    there = (workdir / halving.FILE).exists()
    if record is None and there:
        eta = halving.Record.read(workdir / halving.FILE).eta
        hint = f"give --halving={eta}, or continue one trial by its own command"
        raise SweepError("this sweep stops trials early", where=str(workdir), hint=hint)
    if record is not None and not there:
        if any((folder / "metrics.jsonl").exists() for folder in folders):
            what, hint = "this sweep began without --halving", "leave it out"
            raise SweepError(what, where=str(workdir), hint=hint)
        record.write()


def _run_study(
    trials: Sequence[Mapping[str, Any]], flags: argparse.Namespace, workdir: pathlib.Path
) -> tuple[int, list[pathlib.Path]]:
    """Runs the trials as a study; returns its exit code and the folders of the trials."""
    inside = workdir / "trials"
    config = _config(flags, inside)
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
    waiting = [folder for folder in folders if result(folder) is None]
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
