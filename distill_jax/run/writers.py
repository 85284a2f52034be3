"""Where numbers go: a line of JSON, TensorBoard, and the console.

Writers see Python floats that have left the device; nothing here waits for a device or imports
TensorFlow.
"""

import contextlib
import glob
import json
import math
import os
import pathlib
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TextIO

import numpy as np
import tqdm

from distill_jax.core.errors import UserError, text_of
from distill_jax.run.loggers import LoggerProcess
from distill_jax.trainer.io import files
from distill_jax.trainer.io.files import replacing

FLUSH_SECONDS = 120.0
"""Between two times that TensorBoard events are forced to disk."""


def save_arrays(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """Writes a compressed `.npz` file, whole or not at all."""
    with replacing(path) as temporary:
        np.savez_compressed(temporary, **arrays)


class Writer(Protocol):
    """Takes the metrics of a step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes finished numbers by name."""
        ...

    def close(self) -> None:
        """Flushes and lets go of the file."""
        ...


class JsonlWriter:
    """Appends `{"step": ..., name: value, ...}` lines to a file, each flushed as it is written.

    Args:
      path: the file; created where it is absent.
      resume_step: step at which the run continues, see `resume_lines`; existing rows of this step
        are not written again, so that a resumed run repeats none.
      log_line: prints a line.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        resume_step: int = 0,
        log_line: Callable[[str], None] = print,
    ):
        self._path = pathlib.Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        rows = resume_lines(self._path, resume_step, log_line=log_line)
        at_step = (row for row in rows if row["step"] == resume_step)
        self._there = {(resume_step, frozenset(row)) for row in at_step}
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line; a number that JSON cannot hold becomes null."""
        row = {"step": int(step)} | {name: _number(value) for name, value in metrics.items()}
        if (row["step"], frozenset(row)) in self._there:
            return
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def resume_lines(
    path: pathlib.Path, step: int, *, log_line: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Drops the rows of a JSON-lines file after a step, and a last line that a kill cut off.

    Damaged lines are moved to `<name>.damaged` beside it, with a warning. The file is replaced
    atomically, and only where something changes.

    Args:
      path: the file; may be absent.
      step: the last step to keep.
      log_line: prints a line.

    Returns:
      The rows that stay.
    """
    lines = files.read_lines(path)
    kept = [(data, row) for data, row in lines if row is not None and row["step"] <= step]
    damaged = files.damaged(lines)
    if damaged:
        aside = path.with_name(path.name + ".damaged")
        with aside.open("ab") as file:
            file.writelines(line.data for line in damaged)
        n = "1 line" if len(damaged) == 1 else f"{len(damaged)} lines"
        log_line(
            f"warning: {n} of {path.name} cannot be read and moved to {aside.name}; curves and "
            "alarms continue without them"
        )
    if len(kept) < len(lines):
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.writelines(data for data, _ in kept)
            file.flush()
            os.fsync(file.fileno())
    return [row for _, row in kept]


def _number(value: Any) -> float | int | str | None:
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    value = float(value)
    return value if math.isfinite(value) else None


def _drop_host(folder: pathlib.Path) -> None:
    """Takes the host out of the names of event files, which tensorboardX ends with it."""
    host = socket.gethostname()
    for path in folder.glob(f"events.out.tfevents.*.{glob.escape(host)}"):
        name, n = path.name.removesuffix(f".{host}"), 0
        while (new := path.with_name(f"{name}.{n}")).exists():
            n += 1
        path.rename(new)


class TensorBoardWriter:
    """Writes scalars as TensorBoard events, in the format of tensorboardX.

    The events are a copy for convenience: if they cannot be written, one warning is logged and the
    run continues without them. tensorboardX's own writer uses a thread. If that thread dies, the
    program blocks forever once the queue is full, so records are written here directly.

    Args:
      folder: where the event files go.
      resume_step: TensorBoard hides events of an earlier attempt beyond this step.
      log_line: prints a line.

    Raises:
      UserError: where tensorboardX is not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        resume_step: int = 0,
        log_line: Callable[[str], None] = print,
    ):
        self._modules = _import_tensorboardx()
        self._folder, self._log_line, self._file, self._flushed = folder, log_line, None, 0.0
        protocol = self._modules[1]
        with self._tolerated():
            os.makedirs(folder, exist_ok=True)
            self._file = self._modules[0].EventsWriter(os.path.join(folder, "events"))
            _drop_host(pathlib.Path(folder))
            if resume_step:
                started = protocol.SessionLog(status=protocol.SessionLog.START)
                event = protocol.Event(step=resume_step + 1, session_log=started)
                self._file.write_event(event)

    @contextlib.contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            failed, self._file = self._file, None
            with contextlib.suppress(Exception):
                if failed is not None:
                    failed.close()
            first = text_of(error) or type(error).__name__
            self._log_line(f"warning: no TensorBoard events from now on: {self._folder}: {first}")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._file is None:
            return
        _, protocol, scalar = self._modules
        with self._tolerated():
            for name, value in metrics.items():
                if not isinstance(value, str) and value is not None:
                    summary = scalar(name, float(value))
                    self._file.write_event(
                        protocol.Event(wall_time=time.time(), step=int(step), summary=summary)
                    )
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._file.flush()
                self._flushed = time.monotonic()

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes pictures, uint8 `[h, w, c]` with one channel or three, by name."""
        if self._file is None:
            return
        from tensorboardX.summary import image  # torch stays out of it, see `_import_tensorboardx`

        with self._tolerated():
            for name, picture in images.items():
                summary = image(name, picture, dataformats="HWC")
                event = self._modules[1].Event
                self._file.write_event(event(wall_time=time.time(), step=step, summary=summary))
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            with self._tolerated():
                self._file.close()


def _import_tensorboardx() -> Any:
    """Imports the used parts of tensorboardX, without torch, which takes seconds to load.

    Returns:
      The module of the record writer, that of the protocol, and the function that makes a scalar
      summary.
    """
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    try:
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        return event_file_writer, event_pb2, scalar
    except ImportError:
        raise UserError(
            "tensorboardX is not installed",
            where="log.tensorboard",
            hint="pip install tensorboardX",
        ) from None
    finally:
        if hidden:
            del sys.modules["torch"]


class MultiWriter:
    """Hands everything to several writers; no writers make a silent one."""

    def __init__(self, writers: Sequence[Writer] = ()):
        self._writers = tuple(writers)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, metrics)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Hands pictures to the writers that take them: TensorBoard's."""
        for writer in self._writers:
            if isinstance(writer, TensorBoardWriter):
                writer.write_images(step, images)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for writer in self._writers:
                stack.callback(writer.close)


def make_writer(
    workdir: str | os.PathLike[str],
    *,
    resume_step: int = 0,
    tensorboard: bool = False,
    loggers: Sequence[str] = (),
    is_main: bool = True,
    log_line: Callable[[str], None] = print,
) -> MultiWriter:
    """Builds the writer of a run: `metrics.jsonl` and, optionally, `tensorboard/` in the workdir.

    Args:
      workdir: folder of the run.
      resume_step: step at which the run continues.
      tensorboard: whether to write TensorBoard events too.
      loggers: names of tracking services, see `loggers`.
      is_main: whether this process writes; in a multi-process run only the first one does.
      log_line: prints a line.
    """
    if not is_main:
        return MultiWriter()
    workdir = pathlib.Path(workdir)
    writers: list[Writer] = [
        JsonlWriter(workdir / "metrics.jsonl", resume_step=resume_step, log_line=log_line)
    ]
    if tensorboard:
        folder = workdir / "tensorboard"
        writers.append(TensorBoardWriter(folder, resume_step=resume_step, log_line=log_line))
    writers += [LoggerProcess(name, workdir, log_line=log_line) for name in loggers]
    return MultiWriter(writers)


class Progress:
    """Shows the progress of a run: a bar on a terminal, an occasional line in a log file.

    Args:
      total: steps of the whole run.
      initial: step at which it starts or continues; the rate counts from there.
      description: what runs, in front of every line.
      every_seconds: pause between two lines where there is no terminal.
      file: where to; standard error by default.
      is_main: whether this process shows anything.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        description: str = "train",
        every_seconds: float = 30.0,
        file: TextIO | None = None,
        is_main: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._file = file or sys.stderr
        self._total, self._initial, self._description = total, initial, description
        self._every, self._clock = every_seconds, clock
        self._start = self._last = clock()
        self._step, self._loss, self._is_main = initial, None, is_main
        self._bar = tqdm.tqdm(
            total=total,
            initial=initial,
            desc=description,
            unit="step",
            file=self._file,
            disable=None if is_main else True,
            dynamic_ncols=True,
            mininterval=0.5,
        )

    def update(self, step: int, *, loss: float | None = None) -> None:
        """Moves to `step`, the number of finished steps; cheap enough for every step.

        Args:
          step: finished steps.
          loss: the latest loss that has left the device, shown from now on.
        """
        if loss is not None:
            self._loss = loss
            if not self._bar.disable:
                self._bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
        moved, self._step = step - self._step, step
        if not self._bar.disable:
            self._bar.update(moved)
        elif self._is_main and (now := self._clock()) - self._last >= self._every:
            self._last = now
            print(self._line(now), file=self._file, flush=True)

    def _line(self, now: float) -> str:
        rate = (self._step - self._initial) / max(now - self._start, 1e-9)
        loss = "" if self._loss is None else f" | loss {self._loss:.4g}"
        left = f" | {_spell(now - self._start)} passed"
        if rate:
            left += f", {_spell((self._total - self._step) / rate)} left"
        share = 100 * self._step / max(self._total, 1)
        return (
            f"{self._description}: step {self._step} of {self._total} ({share:.1f}%)"
            f" | {rate:.3g} steps/s{left}{loss}"
        )

    def close(self) -> None:
        """Leaves the bar, or a last line, as it stands."""
        if self._is_main and self._bar.disable and self._step > self._initial:
            print(self._line(self._clock()), file=self._file, flush=True)
            self._is_main = False
        self._bar.close()


def _spell(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
