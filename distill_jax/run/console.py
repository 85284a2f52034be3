"""Standard output and error that may be closed, full or gone: a run goes on without them."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any


class Tolerant:
    """A text stream that stops writing, instead of raising, once nobody can read it.

    Args:
      stream: the stream; everything except writing is delegated to it.
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


@contextlib.contextmanager
def deferring_interrupts() -> Iterator[None]:
    """Raises `KeyboardInterrupt` for a first Ctrl-C at the end of the block, for a second at once.

    For imports: extension modules print an interrupt with its trace, and raise `ImportError`.
    """
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        if came:
            signal.default_int_handler(number, frame)
        came.append(number)

    own = threading.current_thread() is threading.main_thread()
    if not own or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt


def guard() -> None:
    """Makes the standard streams of this process tolerant.

    A closed descriptor is first opened on the null device. Otherwise the next file that is opened
    would get its number, and the output of libraries would be written into that file.
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
