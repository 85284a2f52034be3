"""Standard output and error that may be closed, full or gone: a run goes on without them."""

import contextlib
import os
import sys
from typing import Any


class Tolerant:
    """A text stream that stops writing, instead of raising, once nobody can read it.

    Args:
      stream: the stream; everything but writing is left to it.
    """

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        with self._tolerated():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._tolerated():
            self._stream.flush()

    @contextlib.contextmanager
    def _tolerated(self):
        try:
            yield
        except (OSError, ValueError):  # a closed pipe, a full disk; a closed stream
            with contextlib.suppress(OSError, ValueError):
                _to_null(self._stream.fileno())  # what is buffered must go somewhere

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _to_null(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)


def guard() -> None:
    """Makes the standard streams of this process tolerant.

    A closed descriptor is opened on the null device first: the next file that is opened would get
    its number otherwise, and what libraries print would be written into that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            _to_null(number)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            stream = os.fdopen(number, "w", encoding="utf-8", closefd=False)
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")
        if not isinstance(stream, Tolerant):
            setattr(sys, name, Tolerant(stream))
