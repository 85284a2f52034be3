"""Processes, time budgets and the results file of `accelerator.py`; imports no framework."""

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def allowance(remaining: float, shares: Sequence[float]) -> float:
    """Returns the seconds of the next part: its share of what is left for it and those after it.

    Time that a part does not use goes to the parts that follow.

    Args:
      remaining: seconds that are left in all.
      shares: of the next part and of those after it, in order.
    """
    return max(0.0, remaining) * shares[0] / sum(shares)


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Replaces a JSON file at once: a kill at any moment leaves the old file or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def die_with_parent(parent: int) -> None:
    """Lets the kernel end this process when its parent ends, however that ends (Linux)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL("libc.so.6").prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the parent has ended")


class NotReady(Exception):
    """A worker ended, or did not answer in time; the text is the reason."""


class Worker:
    """A process that prints a line of JSON once it is ready, and one for each line it reads.

    Args:
      command: of the process.
      env: its environment.
      log: file that takes its standard error, whose end says why it failed.
    """

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], log: Path):
        self._log = log
        self.began = time.monotonic()
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                env=dict(env),
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        self._lines: queue.Queue[tuple[float, str]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # libraries may print other lines
                self._lines.put((time.monotonic(), line))
        self._lines.put((time.monotonic(), ""))

    def answer(self, deadline: float) -> dict[str, Any]:
        """Returns the next answer, and the seconds from the start of the process as "at".

        Raises:
          NotReady: there is none before `deadline`, a time of `time.monotonic`.
        """
        try:
            at, line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise NotReady("no answer within the time budget") from None
        if not line:
            code = self.process.wait()
            said = [text.strip() for text in self._log.read_text(errors="replace").splitlines()]
            said = [text for text in said if text]
            found = (
                [text for text in said if "Error" in text.split(" ")[0]] or said or ["no message"]
            )
            raise NotReady(f"ended with code {code}: {found[-1][:300]}")
        return {**json.loads(line), "at": round(at - self.began, 3)}

    def ask(self, deadline: float, **request: Any) -> dict[str, Any]:
        """Sends a request and returns the answer; raises as `answer` does."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended; the answer says why
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self.answer(deadline)

    def end(self) -> None:
        """Kills the process and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join()
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(OSError):  # a request that was not sent
            self.process.stdin.close()
        self.process.stdout.close()


def serve(
    advance: Mapping[str, Callable[[int], None]],
    facts: Callable[[], Mapping[str, Any]],
    *,
    events: Callable[[], Mapping[str, Any]] | None = None,
    **ready: Any,
) -> None:
    """Answers a parent: a ready line, then the seconds of each block, facts and events when asked.

    Args:
      advance: functions by mode that take a number of steps and wait for the last.
      facts: what is known after the steps.
      events: what happens between steps of a run, and its cost.
      **ready: part of the ready line.
    """
    print(json.dumps({"ready": True, "modes": list(advance), **ready}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "events" in request and events is not None:
            print(json.dumps(events()), flush=True)
            continue
        if "steps" not in request:
            print(json.dumps(facts()), flush=True)
            continue
        began = time.perf_counter()
        advance[request["mode"]](request["steps"])
        print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)
