"""Runs the commands of trials as processes of this machine, all to their end or halved."""

import fractions
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distill_jax.run import halving
from distill_jax.run import workdir as rules
from distill_jax.trainer.io import files

PREEMPTED = 75


def run_local(lines: Sequence[Sequence[str]], *, jobs: int, folders: Sequence[pathlib.Path]) -> int:
    """Runs the commands, `jobs` at a time, each with a log in its folder; returns the exit code.

    SIGTERM and Ctrl-C are handed on and start nothing new.
    """
    waiting = [i for i in range(len(lines)) if result(folders[i]) is None]
    print(f"{len(lines) - len(waiting)} of {len(lines)} trials are done", flush=True)
    codes: dict[int, int] = {}
    if _run(lines, waiting, jobs=jobs, folders=folders, ended=codes.__setitem__):
        return PREEMPTED
    return _worst(codes)


def _worst(codes: Mapping[int, int]) -> int:
    return next((code for _, code in sorted(codes.items()) if code), 0)


def _run(
    lines: Sequence[Sequence[str]],
    waiting: Sequence[int],
    *,
    jobs: int,
    folders: Sequence[pathlib.Path],
    ended: Callable[[int, int], None],
) -> bool:
    """Runs those commands that wait, by number; returns whether a signal stopped that.

    `ended` is called with the number of each command and its exit code.
    """
    waiting = list(waiting)
    running: dict[int, subprocess.Popen] = {}
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
                    code = code if code >= 0 else 128 - code
                    print(f"{folders[i]}: {_outcome(code)}", flush=True)
                    ended(i, code)
            time.sleep(0.1)
    finally:
        for child in running.values():
            child.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return bool(stopping)


def run_halved(
    lines: Sequence[Sequence[str]],
    *,
    jobs: int,
    folders: Sequence[pathlib.Path],
    record: halving.Record,
) -> int:
    """Runs the commands as `run_local` does, with successive halving; returns the exit code.

    A trial whose loss is not finite, or whose settings are refused, is out. A rung at which another
    trial failed is decided once the same command has carried that one to the rung.
    """
    number = {folder.name: i for i, folder in enumerate(folders)}
    going = list(number)
    for k, rung in enumerate(record.rungs):
        if "on" not in rung:
            flag = halving.stop_flag(fractions.Fraction(rung["part"]))
            failed: dict[int, int] = {}

            def ended(i: int, code: int, k: int = k, failed: dict[int, int] = failed) -> None:
                if code in _NEVER_AGAIN or code == 0:
                    record.add(k, folders[i].name, folders[i], _NEVER_AGAIN.get(code, ""))
                else:
                    failed[i] = code

            waiting = [number[trial] for trial in going if trial not in rung["at"]]
            print(f"rung {k + 1} of {len(record.rungs)}: {rung['part']} of training", flush=True)
            flagged = [[*line, flag] for line in lines]
            if _run(flagged, waiting, jobs=jobs, folders=folders, ended=ended):
                return PREEMPTED
            if failed:
                return _worst(failed)
            record.decide(k, going)
        going = list(rung["on"])
        _close(folders, record)
        print(f"{len(going)} of {len(folders)} trials go on: {', '.join(going)}", flush=True)
    return run_local(
        [lines[number[trial]] for trial in going],
        jobs=jobs,
        folders=[folders[number[trial]] for trial in going],
    )


_NEVER_AGAIN = {2: "the settings are refused, see log.txt", 3: "a loss that is not finite"}


def _close(folders: Sequence[pathlib.Path], record: halving.Record) -> None:
    """Writes into the folders of stopped trials why they stopped, unless they went on since."""
    from distill_jax.report import write_run_report

    stopped = record.stopped()
    for folder in folders:
        entry = stopped.get(folder.name)
        if entry is None or entry["step"] is None or (folder / "result.json").exists():
            continue
        config = files.read_json(folder / "config.json", shape={"seed": int})
        told = {"status": "stopped", "seed": config["seed"], "steps": entry["step"]}
        with rules.claim(folder, "run", with_peers=False):
            files.write_text(
                folder / "result.json", json.dumps({**told, "reason": entry["why"]}, indent=1)
            )
            write_run_report(folder)


def _outcome(code: int) -> str:
    meanings = {0: "done", 2: "a user error", 3: "a loss that is not finite", 70: "stalled"}
    meanings[PREEMPTED] = "stopped"
    return meanings.get(code, f"exit code {code}") + ("" if code == 0 else "; see its log.txt")


def result(folder: pathlib.Path, *, warn: bool = False) -> dict[str, Any] | None:
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
