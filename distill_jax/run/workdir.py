"""Folders that the program writes: whose they are, who writes them, and what a run consists of.

The rules, each in one function:

- `claim`: one writer per folder, files of other programs are left alone, and a start that fails
  leaves the folder as it was. `foreign` finds those files; `hold` is the lock alone.
- `is_run`: a folder is a run once it holds a finished checkpoint or a result.
- `set_aside`: starting over moves what is there into a subfolder.
- `check_config`: a run continues under the config that is stored in its newest checkpoint.
- `check_inputs`: a run continues with the data and the networks that it began with, by checksum.
- `environment_changes`: versions, devices and precision that differ from the start before.

Nothing here imports JAX at the top, so that launchers may use it.
"""

import contextlib
import dataclasses
import fcntl
import fnmatch
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from distill_jax.core.errors import CheckpointError, ConfigError, NonFiniteError, UserError
from distill_jax.run import config as config_lib
from distill_jax.run import paths
from distill_jax.run.config import ConfigDict
from distill_jax.stored import (
    NUMBERS,
    RESULT,
    RESULT_PARTS,
    DamagedFile,
    MissingFile,
    parse_json,
    read_bytes,
    read_json,
    read_text,
    write_text,
)

MARK = ".distill_jax.json"
"""States that this program made the folder, and what for."""

LOCK = ".distill_jax.lock"

CHECKSUMS = "digest.json"
INDEX = "index.json"
META = "meta/metadata"

NAMES = {
    "run": (
        "config.json",
        "env.json",
        "metrics.jsonl",
        "alarms.jsonl",
        "heartbeat.json",
        "heartbeat-*.json",
        "stall.txt",
        "stall-*.txt",
        "checkpoints",
        "tensorboard",
        "trust.npz",
        "predictions.npz",
        "embeddings.npz",
        "masks.npz",
        "result.json",
        "eval.json",
        "report.html",
    ),
    "study": ("study.json", "table.txt", "report.html"),
    "sweep": ("sweep.json", "sweep.sh"),
    "cache": ("key.json", "[0-9]" * 5 + "-" + "[0-9]" * 5),
}
"""What is written into a folder of each kind, as patterns of names."""

_STEP_ITEM = re.compile(
    r"(role\..+|optimizer|memory|meta|_CHECKPOINT_METADATA|commit_success\.txt|digest\.json)"
    r"(\.tmp.*|\.orbax-checkpoint-tmp.*)?"
)
_TEMPORARY = ".*.tmp-????????*"

HEARTBEAT_SECONDS = 3.0
"""Between two signs of life of the owner of a lock, and so the time that a refusal takes where the
owner is on another machine."""

STALE_SECONDS = 60.0
"""A lock of another machine without a sign of life for so long is taken over. File attributes that
an NFS client caches (up to 60 s) do not count: the lock is opened before its time is read."""

RUNTIME_ONLY = (
    "mesh.",
    "partition.",
    "log.",
    "checkpoint.",
    "eval.batch_size",
    "data.resident",
    "study.",
    "watch.stall_seconds",
    "watch.on_stall",
    "watch.spike",
)
"""Config paths that change how a run is carried out and not what it computes."""

META_PARTS = {
    "metric": (int, float, type(None)),
    "config": Mapping,
    "inputs": (Mapping, type(None)),
    "signature": Mapping,
    "environment": (Mapping, type(None)),
    "seconds": (int, float),
    "skipped": int,
    "metrics": NUMBERS,
    "unlogged": list,
    "first_spread": NUMBERS,
}
"""What may be stored beside the state of a step and its number."""

START_OVER = "--start_over sets aside what is there and begins at step 0"

CONFIG_HINT = f"restore it from a copy, or name another --workdir; {START_OVER}"


# Files.


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file whole or not at all; of several processes the first one does."""
    from distill_jax.run import processes

    if processes.is_main():
        write_text(path, json.dumps(value, indent=1))


def peek(path: pathlib.Path) -> Any:
    """Returns what a JSON file holds, None where it is absent or cannot be read."""
    try:
        return json.loads(read_text(path))
    except (DamagedFile, ValueError, RecursionError):
        return None


def read_result(
    folder: pathlib.Path, *, log_line: Callable[[str], None] = print
) -> dict[str, Any] | None:
    """Returns the result of a finished run, None where it is not finished or is damaged.

    Args:
      folder: of the run.
      log_line: prints a line.
    """
    try:
        result = read_json(folder / "result.json", shape={"status": str})
        if result["status"] == "done":
            path = folder / "result.json"
            return read_json(path, shape=RESULT, optional=RESULT_PARTS)
    except MissingFile:
        pass
    except DamagedFile as error:
        log_line(f"warning: {error}; it is made again from the checkpoints")
    return None


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return isinstance(value, float) or abs(value) < 2**1023  # JSON has longer integers


def _is_row(value: Any) -> bool:
    """Whether a value is `[name, [number, ...]]`."""
    pair = isinstance(value, list) and len(value) == 2
    return (
        pair
        and isinstance(value[0], str)
        and isinstance(value[1], list)
        and all(map(_is_number, value[1]))
    )


def _are_numbers(value: Any) -> bool:
    """Whether a value is a number or nested lists of numbers."""
    return all(map(_are_numbers, value)) if isinstance(value, list) else _is_number(value)


def _is_signature(value: Mapping[str, Any]) -> bool:
    """Whether a value has the types of `Experiment.signature`."""
    statistics, networks = value.get("statistics"), value.get("networks")
    return (
        isinstance(networks, Mapping)
        and all(
            isinstance(network, Mapping)
            and isinstance(network.get("model"), str)
            and isinstance(network.get("kwargs"), Mapping)
            for network in networks.values()
        )
        and isinstance(value.get("classes"), list)
        and all(isinstance(name, str) for name in value["classes"])
        and isinstance(value.get("cardinalities"), list)
        and _are_numbers(value["cardinalities"])
        and {"image_size", "input"} <= value.keys()
        and (
            statistics is None
            or (isinstance(statistics, list) and len(statistics) == 2 and _are_numbers(statistics))
        )
    )


def _are_inputs(value: Any) -> bool:
    """Whether a value has the types of what `check_inputs` compares."""
    data, networks = value.get("data", {}), value.get("networks", {})
    return (
        isinstance(data, Mapping)
        and isinstance(networks, Mapping)
        and all(isinstance(x, str | None) for x in networks.values())
        and all(
            isinstance(split, Mapping)
            and _is_number(split.get("n", 0))
            and all(isinstance(split.get(k), str | None) for k in ("sha256", "origin"))
            for split in data.values()
        )
    )


def write_result(folder: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Writes `result.json`; a damaged one becomes `result.json.damaged`."""
    from distill_jax.run import processes

    path = folder / "result.json"
    if processes.is_main() and path.is_file() and not _has_failed(path):
        taken = len(list(folder.glob("result.json.damaged*")))
        path.rename(folder / f"result.json.damaged{taken or ''}")
    write_json(path, result)


def _has_failed(path: pathlib.Path) -> bool:
    """Whether a `result.json` is the record of a run that a study gave up."""
    result = peek(path)
    return isinstance(result, dict) and result.get("status") == "failed"


# Checkpoint folders, as far as they decide what a run is.


def step_number(name: str) -> int | None:
    """Returns the step that a folder is named for, None for any other name."""
    return int(name) if re.fullmatch(r"0|[1-9][0-9]{0,17}", name) else None


def finished_steps(checkpoints: pathlib.Path) -> list[int]:
    """Returns the steps that were saved to their end, oldest first."""
    try:
        folders = [p for p in checkpoints.iterdir() if not p.is_symlink()]
        names = [p.name for p in folders if (p / CHECKSUMS).exists()]
    except OSError:
        return []
    return sorted(step for step in map(step_number, names) if step is not None)


def read_meta(step: pathlib.Path) -> Mapping[str, Any]:
    """Returns what was stored beside the state of a step.

    Raises:
      CheckpointError: it is not as it was written, or is that of another step.
    """
    try:
        data = read_bytes(step / META)
        written = read_json(step / CHECKSUMS).get(META)
        if hashlib.blake2b(data, digest_size=16).hexdigest() != written:
            raise CheckpointError(f"{META} differs from what was written", where=str(step))
        meta = parse_json(data, step / META, shape={"step": int}, optional=META_PARTS)
        metric = meta.get("metric")
        checks = {
            "metric": metric is None or (_is_number(metric) and not math.isnan(metric)),
            "seconds": _is_number(meta.get("seconds", 0)),
            "skipped": meta.get("skipped", 0) >= 0,
            "unlogged": all(map(_is_row, meta.get("unlogged", ()))),
            "inputs": _are_inputs(meta.get("inputs") or {}),
            "signature": "signature" not in meta or _is_signature(meta["signature"]),
        }
        for name, is_valid in checks.items():
            if not is_valid:
                raise DamagedFile(f"{name!r} holds no such values", where=str(step / META))
    except DamagedFile as e:
        raise CheckpointError(f"cannot be read: {e}", where=str(step)) from e
    if step_number(step.name) not in (None, meta["step"]):
        raise CheckpointError(f"holds the state of step {meta['step']}", where=str(step))
    return meta


def read_metrics(index: Any, part: str) -> dict[int, float | None] | None:
    """Returns the metrics by step in a part of `index.json`, None where it is no such part."""
    found = index.get(part) if isinstance(index, Mapping) else None
    if not isinstance(found, Mapping):
        return None
    metrics = {step_number(name): metric for name, metric in found.items()}
    whole = None not in metrics and all(x is None or _is_number(x) for x in metrics.values())
    return metrics if whole else None  # type: ignore[return-value]


def newest_meta(checkpoints: pathlib.Path) -> Mapping[str, Any] | None:
    """Returns what was stored beside the newest state of a run that can be read, if any."""
    for step in reversed(finished_steps(checkpoints)):
        with contextlib.suppress(CheckpointError):
            return read_meta(checkpoints / str(step))
    return None


def _not_a_step(path: pathlib.Path) -> pathlib.Path | None:
    """Returns what in the folder of a step was not written by this program, None if nothing."""
    if not path.is_dir() or path.is_symlink():
        return path
    found = (p for p in sorted(path.iterdir()) if not _STEP_ITEM.fullmatch(p.name))
    return next(found, None)


def is_step(path: pathlib.Path) -> bool:
    """Whether a folder is a step of this program, finished or not, and nothing else."""
    return _not_a_step(path) is None


def remove_step(path: pathlib.Path) -> None:
    """Deletes a step such that what is left of it, were this interrupted, does not count.

    What this program did not write stays, and so does then the folder.
    """
    (path / CHECKSUMS).unlink(missing_ok=True)
    for item in path.iterdir() if path.is_dir() else ():
        if _STEP_ITEM.fullmatch(item.name):
            if item.is_dir():
                shutil.rmtree(item, ignore_errors=True)
            else:
                item.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.rmdir()


def whole_steps(checkpoints: pathlib.Path) -> list[int]:
    """Returns the steps that look as if they were saved to their end, with or without a digest."""
    named = {p: step_number(p.name) for p in checkpoints.glob("*") if (p / META).is_file()}
    return sorted(step for p, step in named.items() if step is not None and is_step(p))


def has_steps(checkpoints: pathlib.Path) -> bool:
    """Whether any state was ever saved to its end, though it may have been damaged since."""
    if finished_steps(checkpoints) or any(checkpoints.glob("*.damaged*")):
        return True
    index = peek(checkpoints / INDEX)
    if isinstance(index, dict):
        return any(index.get(part) for part in ("saved", "lost"))
    return bool(whole_steps(checkpoints))


def is_run(folder: pathlib.Path) -> bool:
    """Whether a folder holds a run: a state that was saved to its end, or a result.

    What else a start has written there, such as a config or a log, binds no later start.
    """
    result = peek(folder / "result.json")
    done = isinstance(result, dict) and result.get("status") == "done"
    return done or has_steps(folder / "checkpoints")


# Whose a folder is.


def _kind_by_content(folder: pathlib.Path) -> str | None:
    """Returns what a folder without a mark holds: those of version 0.1 have none."""
    config = peek(folder / "config.json")
    if isinstance(config, dict) and {"roles", "objective", "data", "seed"} <= config.keys():
        return "run"
    meta = newest_meta(folder / "checkpoints")
    if meta is not None and "config" in meta:
        return "run"
    study = peek(folder / "study.json")
    if isinstance(study, dict) and {"arms", "metric", "reference"} <= study.keys():
        return "study"
    sweep = peek(folder / "sweep.json")
    if isinstance(sweep, list) and all(
        isinstance(x, dict) and {"folder", "values"} <= x.keys() for x in sweep
    ):
        return "sweep"
    key = peek(folder / "key.json")
    return "cache" if isinstance(key, dict) and {"key", "chunk"} <= key.keys() else None


def _named(folder: pathlib.Path, kind: str) -> list[pathlib.Path]:
    """Returns the entries of a folder that have names of a kind."""
    try:
        entries = sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    return [p for p in entries if any(fnmatch.fnmatchcase(p.name, n) for n in NAMES[kind])]


def foreign(folder: pathlib.Path, kind: str) -> pathlib.Path | None:
    """Returns what in a folder would be overwritten or deleted and is not this program's.

    Args:
      folder: may be absent.
      kind: what it is to hold, a key of `NAMES`.

    Raises:
      UserError: this program uses the folder for something else.
    """
    named = _named(folder, kind)
    mark = peek(folder / MARK)
    owner = mark.get("kind") if isinstance(mark, dict) else _kind_by_content(folder)
    if owner not in (None, kind):
        raise UserError(
            f"holds a {owner}, not a {kind}", where=str(folder), hint="name another folder"
        )
    used = [path for path in named if not path.is_dir() or any(path.iterdir())]
    if used and owner is None:
        steps = [p for p in used[0].glob("*/*") if step_number(p.parent.name) is not None]
        return min(steps, default=used[0])
    if kind != "run":
        return None
    result = peek(folder / "result.json")
    if isinstance(result, dict) and "status" not in result:
        return folder / "result.json"
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir():
        return checkpoints if checkpoints.exists() else None
    for path in sorted(checkpoints.iterdir()):
        step = path.name.partition(".orbax-checkpoint-tmp")[0]
        if step_number(step) is not None and (found := _not_a_step(path)) is not None:
            return found
    return None


def _clear(folder: pathlib.Path, kind: str) -> None:
    """Deletes what a start that did not become a run has left; the folder is this program's."""
    for path in _named(folder, kind):
        if path.name == "checkpoints":
            for step in path.iterdir():
                if step_number(step.name.partition(".")[0]) is not None and is_step(step):
                    remove_step(step)
            (path / INDEX).unlink(missing_ok=True)
        elif path.name == "tensorboard":
            for events in path.glob("events.out.tfevents.*"):
                events.unlink()
        elif path.is_file() and (path.name != "result.json" or _has_failed(path)):
            path.unlink()
        if path.is_dir():
            with contextlib.suppress(OSError):
                path.rmdir()


def set_aside(folder: pathlib.Path, kind: str) -> pathlib.Path | None:
    """Moves what this program has written in a folder into `earlier-<n>` there, if anything."""
    named = _named(folder, kind)
    if not named:
        return None
    n = 1
    while (target := folder / f"earlier-{n}").exists():
        n += 1
    target.mkdir()
    for path in named:
        path.rename(target / path.name)
    write_text(target / MARK, json.dumps({"kind": kind}))
    return target


# Who writes to a folder.


def _boot() -> str:
    """Returns what identifies the numbers of processes: the boot and the namespace, on Linux."""
    with contextlib.suppress(OSError):
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return f"{socket.gethostname()} {uuid.getnode()}"


def _started(pid: int) -> str | None:
    """Returns when a process of this machine began, None where it has ended."""
    if not pathlib.Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except OSError:
            pass
        return ""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


@dataclasses.dataclass
class _Lock:
    path: pathlib.Path
    token: str
    pid: int
    lost: bool = False

    def beat(self) -> None:
        """Gives a sign of life; notices a takeover."""
        try:
            if _owner(self.path)[0].get("token") == self.token:
                os.utime(self.path)
            else:
                self.lost = True
        except FileNotFoundError:
            self.lost = True
        except OSError:
            pass  # a file system that is away for a while

    def release(self) -> None:
        if self.pid == os.getpid():  # and not a fork of the owner
            with contextlib.suppress(OSError):
                if _owner(self.path)[0].get("token") == self.token:
                    self.path.unlink()


_held: dict[pathlib.Path, _Lock] = {}
_claimed: set[pathlib.Path] = set()
_beating: list[int] = []


def _beat() -> None:
    while True:
        time.sleep(HEARTBEAT_SECONDS)
        for lock in list(_held.values()):
            lock.beat()


def _owner(path: pathlib.Path) -> tuple[dict[str, Any], float]:
    """Returns what a lock states, empty where it cannot be read, and the time of its last sign."""
    with path.open(encoding="utf-8") as file:
        when = os.fstat(file.fileno()).st_mtime
        try:
            found = json.loads(file.read())
        except ValueError:
            found = {}
    return (found if isinstance(found, dict) else {}), when


def _is_here(owner: Mapping[str, Any]) -> bool:
    """Whether the owner of a lock is a process of this machine."""
    return owner.get("boot") == _boot()


def _acquire(folder: pathlib.Path, log_line: Callable[[str], None]) -> _Lock:
    """Takes the lock of a folder.

    The lock is a file that is made by `link`, which NFS carries out atomically, with its content
    in it from the start. Locks of the kernel (`flock`) end with the process but are local to a
    machine, or refused, on many network file systems; here one only keeps two processes of a
    machine from taking over the same stale lock. Between machines the one whose content remains
    after both have written wins.

    Whether an owner on this machine runs is known from its number and start time. One elsewhere is
    waited for until it gives a sign of life, and so is alive, or has given none for long enough, by
    the clock of the file system alone.

    Raises:
      UserError: another process has it, or the folder cannot be written.
    """
    path = folder / LOCK
    me = {
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "boot": _boot(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "folder": str(folder),
        "command": " ".join(sys.argv)[:300],
    }
    lock, text = _Lock(path, me["token"], os.getpid()), json.dumps(me)
    temporary = folder / f"{LOCK}.tmp-{me['token'][:8]}"
    seen: tuple[str, float] | None = None
    try:
        while True:
            temporary.write_text(text)
            try:
                _create(path, temporary, text)
                return lock
            except FileExistsError:
                pass
            try:
                owner, when = _owner(path)
            except FileNotFoundError:
                continue
            age = temporary.stat().st_mtime - when
            if not owner and age < 1:  # being written where there are no links
                time.sleep(0.1)
                continue
            if _is_here(owner):
                runs = _started(int(owner.get("pid", 0))) == owner.get("started")
                if runs and not _is_copy(path, owner):
                    raise _in_use(folder, owner)
            elif age < STALE_SECONDS:
                if seen is None:
                    seen, about = (owner.get("token", ""), when), _in_use(folder, owner).what
                    log_line(f"{folder}: {about}; waiting for a sign of life")
                elif seen != (owner.get("token", ""), when):
                    raise _in_use(folder, owner)
                time.sleep(0.2)
                continue
            with _guard(folder):
                if _owner(path)[0] == owner:
                    os.replace(temporary, path)
            if not _is_here(owner):
                time.sleep(0.5)
            if _owner(path)[0].get("token") == me["token"]:
                return lock
    finally:
        temporary.unlink(missing_ok=True)


def _is_copy(path: pathlib.Path, owner: Mapping[str, Any]) -> bool:
    """Whether a lock was copied, with its folder, while its owner held it.

    Then the owner gives signs of life in the folder that it took, and none here. Names and numbers
    of files are not enough: one folder may have two paths, by two mounts.
    """
    original = pathlib.Path(str(owner.get("folder", path.parent))) / path.name
    if original == path:
        return False
    try:
        if _owner(original)[0] != owner or original.samefile(path):
            return False
        before, end = _owner(path)[1], time.monotonic() + 3 * HEARTBEAT_SECONDS
        first = _owner(original)[1]
        while time.monotonic() < end:
            if _owner(original)[1] != first:
                return _owner(path)[1] == before
            time.sleep(0.1)
    except OSError:
        pass
    return False


def _create(path: pathlib.Path, temporary: pathlib.Path, text: str) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        if not temporary.samefile(path):  # else the answer to the first attempt was lost
            raise
    except OSError:  # no links on this file system
        with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644), "w") as file:
            file.write(text)


@contextlib.contextmanager
def _guard(folder: pathlib.Path) -> Iterator[None]:
    """Keeps other processes of this machine out, where the file system knows `flock`."""
    number = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


class InUse(UserError):
    """Another process writes to the folder."""


def _in_use(folder: pathlib.Path, owner: Mapping[str, Any]) -> InUse:
    return InUse(
        f"in use by process {owner.get('pid', '?')} on {owner.get('host', 'an unknown host')}, "
        f"begun {owner.get('since', 'at an unknown time')}",
        where=str(folder),
        hint="wait for that process or stop it, or name another folder",
    )


@contextlib.contextmanager
def hold(folder: pathlib.Path, *, log_line: Callable[[str], None] = print) -> Iterator[None]:
    """Holds the lock of a folder that exists; within itself it does nothing.

    Args:
      folder: to hold.
      log_line: prints a line.

    Raises:
      InUse: another process holds it.
      UserError: the folder cannot be written.
    """
    folder = folder.absolute()
    if (held := _held.get(folder)) is not None and held.pid == os.getpid():
        yield
        return
    with _writable(folder):
        lock = _acquire(folder, log_line)
    _held[folder] = lock
    if os.getpid() not in _beating:
        _beating[:] = [os.getpid()]
        threading.Thread(target=_beat, name="lock", daemon=True).start()
    try:
        yield
    finally:
        _held.pop(folder, None)
        lock.release()


def check_held(folder: pathlib.Path) -> None:
    """Raises `InUse` where another process has taken the folder over from this one."""
    lock = _held.get(folder.absolute())
    if lock is not None and lock.lost:
        raise InUse(
            "another process has taken this folder over: this one gave no sign of life for "
            f"{STALE_SECONDS:.0f} s",
            where=str(folder),
            hint="what was saved is intact",
        )


@contextlib.contextmanager
def _writable(folder: pathlib.Path) -> Iterator[None]:
    """Turns the refusal of a file system into a message."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f"cannot be written: {e.strerror or e}",
            where=str(folder),
            hint="choose another folder or change its permissions",
        ) from e


def _make(folder: pathlib.Path) -> list[pathlib.Path]:
    """Makes a folder; returns it and those above it that were made, the innermost first."""
    made = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        made.append(path)
    folder.mkdir(parents=True, exist_ok=True)
    return made


@contextlib.contextmanager
def claim(
    folder: pathlib.Path,
    kind: str,
    *,
    start_over: bool = False,
    with_peers: bool = True,
    log_line: Callable[[str], None] = print,
) -> Iterator[None]:
    """Makes a folder this program's and this process's own for the time of the block.

    Of several processes the first one claims, and the others raise what it raises. Within a claim
    of the same folder this does nothing. Where the block fails, for a reason that a message
    explains, before the folder became a run, the folder is left as it was.

    Args:
      folder: need not exist.
      kind: what it holds, a key of `NAMES`.
      start_over: whether what an earlier run has left there is set aside.
      with_peers: whether processes that JAX knows take part. A launcher must not wake JAX, which
        takes hold of devices.
      log_line: prints a line.

    Raises:
      InUse: another process writes to it.
      UserError: it holds files of another program under names that would be written, holds
        something else of this program, or cannot be written.
    """
    folder = folder.absolute()
    if folder in _claimed:  # by all processes, of which one holds the lock
        yield
        return
    stack = contextlib.ExitStack()
    with stack:
        enter = lambda: _enter(stack, folder, kind, start_over, log_line)  # noqa: E731
        if with_peers:
            from distill_jax.run import processes

            moved = processes.from_first(enter, where=str(folder))
        else:
            moved = enter()
        if moved:
            log_line(f"set aside what was there: {moved}")
        _claimed.add(folder)
        stack.callback(_claimed.discard, folder)
        yield


def _enter(
    stack: contextlib.ExitStack,
    folder: pathlib.Path,
    kind: str,
    start_over: bool,
    log_line: Callable[[str], None],
) -> str | None:
    """Claims a folder until the stack unwinds; returns where earlier content was moved."""
    for above in folder.parents:
        if above.name == "checkpoints" and is_run(above.parent):
            raise UserError(
                f"lies among the checkpoints of the run {above.parent}",
                where=str(folder),
                hint="name another folder",
            )
    with _writable(folder):
        refuse_foreign(folder, kind)
        made = _make(folder)
        began = {p.name for p in folder.iterdir()}
    leave = _Leave(folder, kind, made, marked=MARK in began)
    stack.push(leave.remove_folders)
    stack.enter_context(hold(folder, log_line=log_line))
    with _writable(folder):
        refuse_foreign(folder, kind)
        for path in folder.glob(_TEMPORARY):
            path.unlink(missing_ok=True)
        moved = set_aside(folder, kind) if start_over else None
        if kind == "run" and not is_run(folder):
            _clear(folder, kind)
        if not (folder / MARK).exists():
            write_text(folder / MARK, json.dumps({"kind": kind}))
    stack.push(leave.undo)
    return None if moved is None else str(moved)


@dataclasses.dataclass
class _Leave:
    """How a claim ends, as two calls of `__exit__`: within the lock, and after it."""

    folder: pathlib.Path
    kind: str
    made: Sequence[pathlib.Path]
    marked: bool

    def undo(self, kind: type[BaseException] | None, *_: Any) -> None:
        from distill_jax.run.environment import Preempted

        if kind is None:
            return
        if issubclass(kind, Exception) and not issubclass(kind, (UserError, Preempted, OSError)):
            return  # nobody foresaw it: what is there may tell why
        with contextlib.suppress(OSError):
            if self.kind == "run" and not is_run(self.folder):
                _clear(self.folder, self.kind)
            if not self.marked and not _named(self.folder, self.kind):
                (self.folder / MARK).unlink(missing_ok=True)

    def remove_folders(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None:
            with contextlib.suppress(OSError):
                for path in self.made:
                    path.rmdir()  # of those that are empty


def refuse_foreign(folder: pathlib.Path, kind: str) -> None:
    """Raises `UserError` where a folder holds what `foreign` finds."""
    if (found := foreign(folder, kind)) is not None:
        raise UserError(
            "was not written by this program, which would overwrite or delete it",
            where=str(found),
            hint="name another folder, or move this away",
        )


# What a run consists of.


def stored_config(folder: pathlib.Path) -> ConfigDict | None:
    """Returns the config of a run: that of its newest checkpoint, else `config.json`.

    None where the folder holds no run.

    Raises:
      UserError: it holds one whose config cannot be read.
    """
    if not is_run(folder):
        return None
    meta = newest_meta(folder / "checkpoints")
    if meta is not None and "config" in meta:
        where = folder / "checkpoints" / str(meta["step"]) / META
        return config_lib.from_json(json.dumps(meta["config"]), where=str(where))
    return config_lib.from_json(read_text(folder / "config.json", hint=CONFIG_HINT))


def check_config(config: ConfigDict, folder: pathlib.Path) -> None:
    """Checks that a folder holds no run, or one of the same config.

    It may have been moved, together with the study whose networks the run starts from.

    Raises:
      ConfigError: the folder holds a run that differs in something that changes its result.
    """
    before = stored_config(folder)
    if before is None:
        return
    before, config = paths.of_config(before), paths.of_config(config)
    for name, role in before.roles.items():
        if name in config.roles and _moved(role.init, config.roles[name].init, folder):
            role.init = config.roles[name].init
    changes = config_lib.differences(before, config)
    changes = [change for change in changes if not change.startswith(RUNTIME_ONLY)]
    if changes:
        raise ConfigError(
            "holds a run of another config:\n    " + "\n    ".join(changes),
            where=str(folder),
            hint=f"give the same config to continue it, or another --workdir; {START_OVER}",
        )


def _moved(old: str | None, new: str | None, folder: pathlib.Path) -> bool:
    """Whether a network has the place in the study of a run that `old`, now gone, named."""
    if not old or not new:
        return False
    was, now = (paths.parse_origin(init, where=str(folder)) for init in (old, new))
    here = pathlib.Path(os.path.relpath(now.path, folder.parent.parent)).parts  # arm, seed
    same = was.path.parts[-2:] == here and was[1:] == now[1:]
    return same and not was.path.exists()


def data_checksums(dataset: Any) -> dict[str, dict[str, Any]]:
    """Returns `{split: {"n", "sha256", "origin"}}` of a data set.

    `sha256` is that of the part's provenance; `origin` is that of the source at the root of its
    chain, before anything was held out or corrupted, which runs of one file have in common.
    """
    found = {}
    for split in ("train", "held_out", "test"):
        root = part = getattr(dataset, split)
        while hasattr(root, "source"):
            root = root.source
        provenance = part.provenance
        origin = root.provenance.sha256
        found[split] = {"n": len(part), "sha256": provenance.sha256, "origin": origin}
    return found


def check_inputs(before: Any, now: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Checks that a run goes on with the data and the networks that it began with.

    What either side does not know (data without a checksum, a checkpoint of an earlier version, a
    network that is gone and not needed any more) is not compared.

    Args:
      before: the "inputs" of a checkpoint, None where it names none.
      now: `{"data": see data_checksums, "networks": {role: checksum or None}}`.
      folder: of the run, for the message.

    Raises:
      ConfigError: names what differs.
    """
    if not isinstance(before, Mapping):
        return
    lines = []
    for split, new in now["data"].items():
        old = before.get("data", {}).get(split, {})
        differs = [k for k in ("n", "sha256") if old.get(k) and new[k] and old[k] != new[k]]
        if differs:
            lines.append(
                f"data, {split}: {old['n']} examples with checksum {old['sha256'][:12]} -> "
                f"{new['n']} with {new['sha256'][:12]}"
            )
    for role, new in now["networks"].items():
        old = before.get("networks", {}).get(role)
        if old and new and old != new:
            lines.append(f"roles.{role}.init: checksum {old[:12]} -> {new[:12]}")
    if lines:
        raise ConfigError(
            "the run began with other data or networks than are there now:\n    "
            + "\n    ".join(lines),
            where=str(folder),
            hint=f"restore them to continue this run, or name another --workdir; {START_OVER}",
        )


class Alike:
    """Checks that runs of one study read the same data from the same place."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, dict[str, str]]] = {}

    def check(self, config: ConfigDict, data: Any, label: str, *, done: bool = True) -> None:
        """Compares a run with those before it.

        Args:
          config: of the run.
          data: its `data_checksums`, None where they are not known.
          label: names the run in the message.
          done: whether it is finished; later runs are compared with it.

        Raises:
          ConfigError: a run with the same `data.name` and arguments had other data.
        """
        if not isinstance(data, Mapping):
            return
        group = {k: config.data[k] for k in ("name", "held_out")}
        key = json.dumps(group | {"kwargs": config.data.kwargs.to_dict()}, sort_keys=True)
        origins = {split: found["origin"] for split, found in data.items() if found.get("origin")}
        first, before = self._seen.get(key, (label, origins))
        if done:
            self._seen.setdefault(key, (label, origins))
        changed = [s for s in origins.keys() & before.keys() if origins[s] != before[s]]
        if changed:
            split = sorted(changed)[0]
            raise ConfigError(
                f"the data of {label} are not those of {first}: checksum of {split} "
                f"{before[split][:12]} -> {origins[split][:12]}",
                where="data",
                hint="restore the data, or compare in another study folder; " + START_OVER,
            )


def arithmetic(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what of an environment may change the bits that a run computes, by name."""
    fields = ("platform", "device", "devices", "processes", "x64")
    found = {name: environment[name] for name in fields if name in environment}
    versions = environment.get("versions")
    return (dict(versions) if isinstance(versions, Mapping) else {}) | found


def environment_changes(before: Any, now: Mapping[str, Any]) -> list[str]:
    """Returns `"name: old -> new"` of what may change the bits that a run computes.

    Args:
      before: `arithmetic` of the start before; None where it is not known.
      now: that of this start.
    """
    if not isinstance(before, Mapping):
        return []
    old, new = before, now
    names = [name for name in old if name in new and old[name] != new[name]]
    return [f"{name}: {old[name]} -> {new[name]}" for name in names]


def describe(config: ConfigDict, folder: pathlib.Path, environment: Mapping, step: int) -> None:
    """Writes `config.json` and `env.json`, in which earlier starts stay listed as "history"."""
    before = peek(folder / "env.json")
    history = []
    if isinstance(before, dict) and step:
        history = [*before.pop("history", []), before]
    write_json(folder / "env.json", {**environment, "step": step, "history": history})
    write_json(folder / "config.json", json.loads(config_lib.to_json(config)))


def explain_divergence(error: NonFiniteError, folder: pathlib.Path) -> NonFiniteError:
    """Adds how a changed config can be tried, where the folder holds checkpoints of this one."""
    if not is_run(folder):
        return error
    more = f"a changed config needs another --workdir, or starts over: {START_OVER}"
    hint = f"{error.hint}\n  {more}" if error.hint else more
    return NonFiniteError(error.what, where=error.where, hint=hint)
