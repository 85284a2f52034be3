"""Monitors a run: where its time goes, whether it makes progress, and late compilations.

One loop runs in a process at a time. It reports its activity with `enter` and `during`. A separate
thread of the watch writes it down, and reports when nothing has happened for too long. Code far
from the loop (a barrier, the feed of a replica) reaches the current watch through the functions of
this module; without a watch they do nothing. The loop never waits for a file.
"""

import collections
import contextlib
import faulthandler
import json
import os
import pathlib
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from distill_jax.run import crash
from distill_jax.trainer.io.files import write_text

HEARTBEAT_SECONDS = 5.0
"""Between two heartbeats."""

QUIET_SECONDS = 10.0
"""Seconds after which a phase without a sign of life is reported; doubled after each report."""

FIRST_STEP = 6.0
"""Before the first step, which has to be compiled, patience is so many times as long."""

STALLED = 70
"""Exit code of a run that `watch.on_stall="exit"` ended."""

COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's event for a program that was compiled, or read from the compilation cache."""

OTHER = "other"

_PHASES = {
    "start": "making or reading the state",
    "compile": "compiling the step",
    "device": "taking the first step",
    "evaluation": "compiling and evaluating",
    "checkpoint": "saving",
}


_ACTIVITIES = {
    "start": "making or reading the state",
    "compile": "compiling the step",
    "data": "reading a batch",
    "evaluation": "evaluating",
    "checkpoint": "saving",
    "barrier": "waiting for the other processes",
}


class Stall(NamedTuple):
    """Nothing happened for too long: in which phase, after which step."""

    step: int
    phase: str
    message: str


class Watch:
    """Watches one loop; a context manager, inside which it is the current watch.

    Args:
      folders: run folders that get `heartbeat.json` and, after a stall, `stall.txt`. A process
        other than the first adds its number to these names.
      total: steps of the run.
      stall_seconds: seconds without a sign of life (another phase, a step, a batch of an
        evaluation) after which a stall of the run is reported. 0 is off.
      on_stall: "report", or "exit" with code `STALLED`.
      process: number of this process.
      log_line: prints a line.
      clock: seconds, monotonic.
      end: ends the process with a code.

    Attributes:
      step: finished steps, as the host knows.
      spent: seconds since the first step by phase; `spend` brings them up to date.
      stalls: the stalls that were reported.
      recompiled: late recompilations, one line for each.
    """

    def __init__(
        self,
        folders: Sequence[pathlib.Path],
        *,
        total: int,
        stall_seconds: float = 0.0,
        on_stall: str = "report",
        process: int = 0,
        log_line: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[int], None] = os._exit,
    ):
        self._folders, self._total, self._process = tuple(folders), total, process
        self._patience, self._on_stall = stall_seconds, on_stall
        self._log_line, self._clock, self._end = log_line, clock, end
        self._host, self._suffix = socket.gethostname(), f"-{process}" if process else ""
        self.step, self.started = 0, False
        self.spent: dict[str, float] = collections.defaultdict(float)
        self.stalls: list[Stall] = []
        self.recompiled: list[str] = []
        self.kind, self._seen = "step", set[str]()
        # Phase and since when. A thread reads it, hence replaced as one; plain, since steps do it.
        self._at: tuple[str, float] = ("start", clock())
        self._told: tuple[str, float] | None = None
        self._quiet, self._patient = self._at, QUIET_SECONDS
        self._failed: tuple[BaseException, str] | None = None  # the activity when it was raised
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    # Called by the loop.

    @property
    def phase(self) -> str:
        return self._at[0]

    def enter(self, phase: str) -> None:
        """Begins a phase, or shows that it goes on; cheap enough for every step."""
        now, (before, since) = self._clock(), self._at
        self.spent[before] += now - since
        self._at = (phase, now)

    def start(self, step: int) -> None:
        """Says that the first step is finished: from now on time is shared out."""
        self.step, self.started = step, True
        self.enter(OTHER)
        self.spent.clear()
        self._seen.add("step")

    def spend(self) -> dict[str, float]:
        """Returns the seconds since the first step by phase."""
        self.enter(self.phase)
        return dict(self.spent)

    @contextlib.contextmanager
    def during(self, phase: str, kind: str = "") -> Iterator[None]:
        """Is in a phase for a while.

        Args:
          phase: the phase that the time is counted for.
          kind: kind of activity. Compilations in its first execution are expected, later ones are
            not.
        """
        before = self.phase, self.kind
        self.enter(phase)
        self.kind = kind or self.kind
        try:
            yield
        except BaseException as error:
            if self._failed is None or self._failed[0] is not error:
                self._failed = error, self._activity()
            raise
        finally:
            if kind:
                self._seen.add(kind)
            self.enter(before[0])
            self.kind = before[1]

    def _activity(self) -> str:
        """Returns the current activity, as a phrase that follows "while"."""
        if self.kind.startswith("evaluation of "):
            return f"evaluating {self.kind.removeprefix('evaluation of ')}"
        if self.phase in ("dispatch", "device"):
            return "training"
        return _ACTIVITIES.get(self.phase, crash.done_so_far())

    # What others find out.

    def compiled(self, name: str, seconds: float) -> None:
        """Takes note of a compilation, on the thread that compiled."""
        if self.started and self.kind in self._seen:
            line = (
                f"warning: {name} was compiled again ({seconds:.2f} s) in {self.kind} "
                f"at step {self.step}, called from {_caller()}: its arguments have another shape, "
                "type or sharding than before, or each call creates it anew"
            )
            self.recompiled.append(line)
            self._log_line(line)

    def check(self) -> None:
        """Reports, once, that nothing has happened for too long."""
        at = phase, since = self._at
        waited = self._clock() - since
        patience = self._patience * (1 if self.started else FIRST_STEP)
        if not self._patience or waited < patience or at == self._told:
            return
        self._told = at
        message = (
            f"process {self._process} is in phase {phase!r} for {waited:.0f} s, "
            f"after step {self.step} of {self._total}"
        )
        self.stalls.append(Stall(self.step, phase, message))
        where = f"on {self._host} (pid {os.getpid()})"
        report = f"stalled: {message}, {where}; stacks of its threads:\n{_stacks()}"
        with contextlib.suppress(OSError):
            print(report, file=sys.stderr, flush=True)
        for folder in self._folders:
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                with (folder / f"stall{self._suffix}.txt").open("a", encoding="utf-8") as file:
                    file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {report}\n")
        if self._on_stall == "exit":
            with contextlib.suppress(OSError):
                line = f"error: stalled in phase {phase!r}; watch.on_stall ends the process"
                print(line, file=sys.stderr, flush=True)
            self.beat("stalled")
            self._end(STALLED)

    def report(self) -> None:
        """Logs phases that take long before the first step, or in their first execution."""
        at = phase, since = self._at
        if self._process or (self.started and self.kind in self._seen):
            return
        if at != self._quiet:
            self._quiet, self._patient = at, QUIET_SECONDS
        waited = self._clock() - since
        if waited >= self._patient:
            self._patient = 2 * waited
            self._log_line(f"{_PHASES.get(phase, phase)}, for {waited:.0f} s so far")

    def beat(self, phase: str = "") -> None:
        """Writes the heartbeats, each whole or not at all."""
        now, since = self._at
        content = json.dumps(
            {
                "step": self.step,
                "total": self._total,
                "phase": phase or now,
                "seconds_in_phase": round(self._clock() - since, 3),
                "time": round(time.time(), 3),
                "host": self._host,
                "pid": os.getpid(),
                "process": self._process,
            }
        )
        for folder in self._folders:
            path = folder / f"heartbeat{self._suffix}.json"
            with contextlib.suppress(OSError):  # a full disk must not end the run
                folder.mkdir(parents=True, exist_ok=True)
                write_text(path, content)

    def _watch(self) -> None:
        pause = min(HEARTBEAT_SECONDS, self._patience / 4 or HEARTBEAT_SECONDS)
        beaten = -HEARTBEAT_SECONDS
        while True:
            if (now := self._clock()) - beaten >= HEARTBEAT_SECONDS:
                self.beat()
                beaten = now
            if self._closed.wait(pause):
                return
            self.check()
            self.report()

    def __enter__(self) -> "Watch":
        global _current
        _listen()
        _current = self
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        global _current
        _current = None
        if error is not None:
            same = self._failed is not None and self._failed[0] is error
            what = self._failed[1] if same and self._failed else self._activity()
            crash.doing(f"{what}, after step {self.step} of {self._total}")
        self._closed.set()
        self._thread.join()
        self.beat("stopped" if kind else "")


_current: Watch | None = None


def enter(phase: str) -> None:
    """Notifies the current watch that a phase begins."""
    if _current is not None:
        _current.enter(phase)


def alive() -> None:
    """Notifies the current watch that a long phase is still active."""
    if _current is not None:
        _current.enter(_current.phase)


def during(phase: str, kind: str = "") -> contextlib.AbstractContextManager[None]:
    """Notifies the current watch of the activity inside the block."""
    return contextlib.nullcontext() if _current is None else _current.during(phase, kind)


def _compiled(event: str, duration_secs: float, **info: Any) -> None:
    if event == COMPILED and _current is not None:
        _current.compiled(str(info.get("fun_name", "a program")), duration_secs)


_listening: list[str] = []


def _listen() -> None:
    """Listens for compilations, from the first watch of the process on."""
    if not _listening:
        from jax import monitoring

        monitoring.register_event_duration_secs_listener(_compiled)
        _listening.append(COMPILED)


def _caller() -> str:
    """Returns the file and line that called into JAX."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module != __name__ and module.partition(".")[0] not in ("jax", "jaxlib", "contextlib"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "a thread of JAX"


def _stacks() -> str:
    """Returns the names of all threads, and their stacks, most recent call first."""
    names = [f"Thread 0x{t.ident or 0:016x} is {t.name}" for t in threading.enumerate()]
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return "\n".join([*names, file.read().decode(errors="replace")])
