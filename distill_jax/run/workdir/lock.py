"""Who writes to a folder: one process at a time, on one machine or several."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from distill_jax.core.errors import UserError

LOCK = ".distill_jax.lock"


HEARTBEAT_SECONDS = 3.0
"""Between two signs of life of the owner of a lock, and so the time that a refusal takes where the
owner is on another machine."""


STALE_SECONDS = 60.0
"""Seconds without a sign of life after which a lock of another machine is taken over. File
attributes that an NFS client caches (up to 60 s) do not count: the lock is opened before its time
is read."""


class InUse(UserError):
    """Another process writes to the folder."""


@contextlib.contextmanager
def hold(folder: pathlib.Path, *, log_line: Callable[[str], None] = print) -> Iterator[None]:
    """Holds the lock of an existing folder; nested inside itself it does nothing.

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
    with writable(folder):
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
            "another process has taken over this folder: this process gave no sign of life for "
            f"{STALE_SECONDS:.0f} s",
            where=str(folder),
            hint="earlier checkpoints are intact",
        )


@contextlib.contextmanager
def writable(folder: pathlib.Path) -> Iterator[None]:
    """Turns the refusal of a file system into a message."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f"cannot be written: {e.strerror or e}",
            where=str(folder),
            hint="choose another folder or change its permissions",
        ) from e


def _boot() -> str:
    """Returns the scope in which process ids are unique: the boot and the namespace, on Linux."""
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
_beating: list[int] = []


def _beat() -> None:
    while True:
        time.sleep(HEARTBEAT_SECONDS)
        for lock in list(_held.values()):
            lock.beat()


def _owner(path: pathlib.Path) -> tuple[dict[str, Any], float]:
    """Returns the content of a lock, empty if unreadable, and the time of its last sign of life."""
    with path.open(encoding="utf-8") as file:
        when = os.fstat(file.fileno()).st_mtime
        try:
            content = json.loads(file.read())
        except ValueError:
            content = {}
    return (content if isinstance(content, dict) else {}), when


def _is_here(owner: Mapping[str, Any]) -> bool:
    """Whether the owner of a lock is a process of this machine."""
    return owner.get("boot") == _boot()


def _acquire(folder: pathlib.Path, log_line: Callable[[str], None]) -> _Lock:
    """Takes the lock of a folder.

    The lock is a file that is made by `link`, which NFS carries out atomically, with its content
    in it from the start. Locks of the kernel (`flock`) end with the process but are local to a
    machine, or refused, on many network file systems; here such a lock only keeps two processes of
    a machine from taking over the same stale lock. Between machines, the process whose content
    remains after both have written wins.

    Whether an owner on this machine is running is known from its process id and start time. For an
    owner on another machine, this waits until it gives a sign of life, and so is alive, or has
    given none for long enough, measured only by the clock of the file system.

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
        if not temporary.samefile(path):  # else the reply to the first attempt was lost
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


def _in_use(folder: pathlib.Path, owner: Mapping[str, Any]) -> InUse:
    return InUse(
        f"in use by process {owner.get('pid', '?')} on {owner.get('host', 'an unknown host')}, "
        f"begun {owner.get('since', 'at an unknown time')}",
        where=str(folder),
        hint="wait for that process or stop it, or name another folder",
    )
