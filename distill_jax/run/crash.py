"""What is printed and kept of an error that nobody foresaw: one line, and a trace in a file."""

import contextlib
import pathlib
import platform
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import distill_jax
from distill_jax.core.errors import text_of

UNEXPECTED = 1
"""Exit code of an error that nobody foresaw."""

INTERRUPTED = 130
"""Exit code after a second Ctrl-C, or after the first one if nothing can be continued."""

TRACE = "crash.txt"

_doing = "starting"
_in_threads: list[str] = []


def doing(what: str) -> None:
    """Records the current activity, as a phrase that follows "while"."""
    global _doing
    _doing = what


def done_so_far() -> str:
    """Returns the activity that was recorded last."""
    return _doing


def report(
    error: BaseException,
    *,
    folder: pathlib.Path | None = None,
    intact: str = "",
    suffix: str = "",
    thread: str = "",
) -> int:
    """Prints an error in one line, writes its trace to `crash.txt`, and returns the exit code.

    Args:
      error: the exception.
      folder: of the run, created if absent. Without one, or if it cannot be written to, the trace
        goes to the folder for temporary files.
      intact: what is left whole, a clause.
      suffix: of the name of the file, for one process of several.
      thread: name of the thread that raised it, where it was not the main one.
    """
    kind = type(error).__name__
    first = text_of(error)
    where = f" in thread {thread}" if thread else ""
    what = f"unexpected {kind}{where} while {_doing}{': ' if first else ''}{first}"
    path = _write(error, what, folder, TRACE.replace(".", f"{suffix}."))
    trace = f"the traceback is in {path}" if path else "the traceback could not be written anywhere"
    print(f"error: {what}; {trace}{'; ' if intact else ''}{intact}", file=sys.stderr, flush=True)
    return UNEXPECTED


def _write(
    error: BaseException, what: str, folder: pathlib.Path | None, name: str
) -> pathlib.Path | None:
    trace = "".join(traceback.format_exception(error))
    text = (
        f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {what}\n"
        f"command: {' '.join(sys.argv)}\n"
        f"distill_jax {distill_jax.__version__}, Python {platform.python_version()}, "
        f"{platform.platform()}\n\n{trace}\n"
    )
    for place in (folder, pathlib.Path(tempfile.gettempdir())):
        if place is None:
            continue
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            with (place / name).open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return place / name
    return None


@contextlib.contextmanager
def threads(folder: pathlib.Path | None, *, suffix: str = "") -> Iterator[None]:
    """Reports errors that end a thread as `tell` does; the run continues without the thread.

    Args:
      folder: of the run.
      suffix: of the name of the file.
    """
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        error = args.exc_value
        if error is None or isinstance(error, SystemExit):
            return
        name = args.thread.name if args.thread else "unknown"
        _in_threads.append(name)
        report(error, folder=folder, intact="the run continues", suffix=suffix, thread=name)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def in_threads() -> bool:
    """Whether an error has ended a thread since the last call."""
    any_thread = bool(_in_threads)
    _in_threads.clear()
    return any_thread


def guarded(
    work: Callable[[], int], *, folder: pathlib.Path | None = None, intact: str = ""
) -> int:
    """Returns the exit code of a program's work, and reports the error that ends it.

    Args:
      work: the program; returns its exit code.
      folder: for the trace of an error.
      intact: what is left whole, a clause.
    """
    in_threads()
    try:
        with threads(folder):
            code = work()
    except KeyboardInterrupt:
        print(f"interrupted while {_doing}; {intact}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return report(error, folder=folder, intact=intact)
    return UNEXPECTED if in_threads() and code == 0 else code


@contextlib.contextmanager
def during(what: str) -> Iterator[None]:
    """Records the current activity inside the block; an error keeps the record."""
    before = _doing
    doing(what)
    yield
    doing(before)
