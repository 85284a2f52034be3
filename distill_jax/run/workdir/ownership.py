"""Whose a folder is: a run, a study, a sweep or a teacher cache of this program, or another's."""

import contextlib
import dataclasses
import fnmatch
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from distill_jax.core.errors import UserError
from distill_jax.run.workdir.lock import hold, writable
from distill_jax.run.workdir.names import MARK, NAMES
from distill_jax.run.workdir.results import has_failed
from distill_jax.trainer.io.files import peek, write_text
from distill_jax.trainer.io.step_folder import is_step, not_of_step, remove_step, step_number
from distill_jax.trainer.io.step_index import INDEX, has_steps, newest_meta

_TEMPORARY = ".*.tmp-????????*"

_claimed: set[pathlib.Path] = set()


@contextlib.contextmanager
def claim(
    folder: pathlib.Path,
    kind: str,
    *,
    start_over: bool = False,
    with_peers: bool = True,
    log_line: Callable[[str], None] = print,
) -> Iterator[None]:
    """Claims a folder for this program and this process inside the block.

    With several processes, the first one claims, and the others raise the same error. Nested inside
    a claim of the same folder, this does nothing. If the block fails before the folder became a
    run, for a reason that a message explains, the folder is left as it was.

    Args:
      folder: need not exist.
      kind: kind of its contents, a key of `NAMES`.
      start_over: whether the files of an earlier run are set aside.
      with_peers: whether the processes that JAX knows take part. A launcher must not initialize
        JAX, which would acquire devices.
      log_line: prints a line.

    Raises:
      InUse: another process writes to it.
      UserError: it holds files of another program under names that would be written, holds
        something else of this program, or cannot be written.
    """
    folder = folder.absolute()
    if folder in _claimed:  # by all processes; one of them holds the lock
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
            log_line(f"moved the earlier content aside: {moved}")
        _claimed.add(folder)
        stack.callback(_claimed.discard, folder)
        yield


def is_run(folder: pathlib.Path) -> bool:
    """Whether a folder holds a run: a state that was completely saved, or a result.

    Other files of a start, such as a config or a log, do not constrain a later start.
    """
    result = peek(folder / "result.json")
    done = isinstance(result, dict) and result.get("status") == "done"
    return done or has_steps(folder / "checkpoints")


def foreign(folder: pathlib.Path, kind: str) -> pathlib.Path | None:
    """Returns a file in a folder that would be overwritten or deleted and is not this program's.

    Args:
      folder: may be absent.
      kind: kind of its future contents, a key of `NAMES`.

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
        if step_number(step) is not None and (stranger := not_of_step(path)) is not None:
            return stranger
    return None


def refuse_foreign(folder: pathlib.Path, kind: str) -> None:
    """Raises `UserError` if `foreign` finds a file in a folder."""
    if (stranger := foreign(folder, kind)) is not None:
        raise UserError(
            "was not written by this program, which would overwrite or delete it",
            where=str(stranger),
            hint="name another folder, or move this away",
        )


def set_aside(folder: pathlib.Path, kind: str) -> pathlib.Path | None:
    """Moves the files of this program in a folder, if any, into `earlier-<n>` there."""
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
                f"is inside the checkpoints of the run {above.parent}",
                where=str(folder),
                hint="name another folder",
            )
    with writable(folder):
        refuse_foreign(folder, kind)
        created = _make(folder)
        began = {p.name for p in folder.iterdir()}
    leave = _Leave(folder, kind, created, marked=MARK in began)
    stack.push(leave.remove_folders)
    stack.enter_context(hold(folder, log_line=log_line))
    with writable(folder):
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
    created: Sequence[pathlib.Path]
    marked: bool

    def undo(self, kind: type[BaseException] | None, *_: Any) -> None:
        from distill_jax.run.environment import Preempted

        if kind is None:
            return
        if issubclass(kind, Exception) and not issubclass(kind, (UserError, Preempted, OSError)):
            return  # unexpected error: the files may help to find the cause
        with contextlib.suppress(OSError):
            if self.kind == "run" and not is_run(self.folder):
                _clear(self.folder, self.kind)
            if not self.marked and not _named(self.folder, self.kind):
                (self.folder / MARK).unlink(missing_ok=True)

    def remove_folders(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None:
            with contextlib.suppress(OSError):
                for path in self.created:
                    path.rmdir()  # of those that are empty


def _make(folder: pathlib.Path) -> list[pathlib.Path]:
    """Makes a folder; returns it and those above it that were created, the innermost first."""
    created = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        created.append(path)
    folder.mkdir(parents=True, exist_ok=True)
    return created


def _clear(folder: pathlib.Path, kind: str) -> None:
    """Deletes the files of a start that did not become a run; the folder is this program's."""
    for path in _named(folder, kind):
        if path.name == "checkpoints":
            for step in path.iterdir():
                if step_number(step.name.partition(".")[0]) is not None and is_step(step):
                    remove_step(step)
            (path / INDEX).unlink(missing_ok=True)
        elif path.name == "tensorboard":
            for events in path.glob("events.out.tfevents.*"):
                events.unlink()
        elif path.is_file() and (path.name != "result.json" or has_failed(path)):
            path.unlink()
        if path.is_dir():
            with contextlib.suppress(OSError):
                path.rmdir()


def _named(folder: pathlib.Path, kind: str) -> list[pathlib.Path]:
    """Returns the entries of a folder that have names of a kind."""
    try:
        entries = sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    return [p for p in entries if any(fnmatch.fnmatchcase(p.name, n) for n in NAMES[kind])]


def _kind_by_content(folder: pathlib.Path) -> str | None:
    """Infers the kind of a folder without a mark: folders of version 0.1 have none."""
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
