"""The entrypoint: `python -m distill_jax.main --config=FILE --workdir=DIR [--mode=MODE] ...`."""

import contextlib
import dataclasses
import errno
import functools
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from distill_jax.core.errors import (
    ConfigError,
    UserError,
    raised_at,
    raised_by_code,
    text_of,
)
from distill_jax.run import console, crash, flags, paths

SURROUNDINGS = {
    errno.ENOSPC: "the disk is full, or has no room for more files",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would become larger than is allowed",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "the operation is not permitted; the file or folder may be immutable",
    errno.EISDIR: "a folder in place of a file",
    errno.ENOTDIR: "a file in place of a folder",
    errno.ELOOP: "a symbolic link in a circle",
    errno.ENAMETOOLONG: "a name that is too long",
    errno.EMFILE: "too many open files; see ulimit -n",
    errno.ENFILE: "too many open files on this machine",
    errno.EIO: "the device failed to read or write",
    errno.ESTALE: "the file system was mounted again",
}
"""Errors of the machine, which no change of the program would fix."""

SMALLER = (
    "a smaller batch_size, eval.batch_size or data set; `--mode=describe` prints what a step needs"
)


DOING = {
    "train": "building the experiment",
    "eval": "evaluating",
    "describe": "describing the config",
    "study": "running the study",
    "export": "exporting the network",
    "compare": "comparing the runs",
}
"""The activity of each mode, until a more specific one is set."""


def main(argv: Sequence[str]) -> int:
    """Runs one command line and returns its exit code.

    0 done, 1 an unexpected error (one line on stderr, traceback in `crash.txt`), 2 an error that
    the user can fix (one message on stderr, no traceback), 3 a loss that is not finite, 70 a stall
    that `watch.on_stall` ends, 71 another process of the run has ended or did not start, 75 stopped
    by a signal with the state saved, 130 interrupted by a second Ctrl-C.
    """
    crash.doing("reading the command line")
    with _Command(_named_folder(argv)) as command:
        parsed = command.parsed = flags.parse(argv)
        command.folder = None if parsed.mode == "describe" else parsed.workdir
        if parsed.mode == "compare":
            from distill_jax.run import compare  # reads folders; does not start JAX

            crash.doing(DOING["compare"])
            assert parsed.workdir is not None
            print(compare.compare_runs(parsed.runs, parsed.workdir, metric=parsed.metric))
            return command.code
        with _started(command, parsed):
            if parsed.mode != "train":
                _do(parsed)
                return command.code
            with console.deferring_interrupts():
                from distill_jax.run import build, processes, workdir
                from distill_jax.run.train import loop
                from distill_jax.run.train.result import format_result

            crash.doing(DOING["train"])
            log_line = _log_line if processes.is_main() else _silent
            make, folder = functools.partial(build.build, trusted=parsed.trusted), parsed.workdir
            assert folder is not None
            with workdir.claim(folder, "run", start_over=parsed.start_over, log_line=log_line):
                result = loop.train(
                    parsed.config,
                    folder,
                    make_experiment=make,
                    changes=parsed.changes,
                    stop_at=parsed.stop_at,
                    log_line=log_line,
                )
                if processes.is_main():
                    print(format_result(result))
                    from distill_jax import report  # not before the first step

                    crash.doing("writing the report")
                    print(f"report: {report.write_run_report(folder)}")
    return command.code


@dataclasses.dataclass
class _Command:
    """A running command line. Within it, exceptions become a message and an exit code.

    Attributes:
      folder: folder for the traceback of an error.
      parsed: the command line, once it is parsed.
      code: the exit code.
    """

    folder: pathlib.Path | None
    parsed: flags.Flags | None = None
    code: int = 0

    def __enter__(self) -> "_Command":
        crash.in_threads()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, KeyboardInterrupt):
            left = f"interrupted while {crash.done_so_far()}; {_intact(self.parsed)}"
            print(left, file=sys.stderr)
            self.code = crash.INTERRUPTED
        elif isinstance(error, Exception):
            self.code = _report(error, self.parsed, self.folder)
        elif error is None and crash.in_threads() and self.code == 0:
            self.code = crash.UNEXPECTED
        return isinstance(error, KeyboardInterrupt | Exception)


def _named_folder(argv: Sequence[str]) -> pathlib.Path | None:
    """Returns the folder that a command line with errors names, if it exists."""
    named = [arg.partition("=")[2] for arg in argv if arg.startswith("--workdir=")]
    return pathlib.Path(named[0]) if named and os.path.isdir(named[0]) else None


def _suffix(parsed: flags.Flags | None) -> str:
    """Returns a suffix that distinguishes the files of the processes of a run."""
    number = getattr(parsed, "process_id", None)
    if not number and "jax" in sys.modules:
        with contextlib.suppress(Exception):
            from jax._src import distributed

            number = distributed.global_state.process_id
    return f"-{number}" if number else ""


def _intact(parsed: flags.Flags | None) -> str:
    """Returns a clause on what is intact after a run that ended, from what is found there."""
    if parsed is None or parsed.workdir is None or parsed.mode == "describe":
        return "nothing was trained or changed"
    if parsed.mode in ("eval", "export", "compare"):
        return "the run is unchanged" if parsed.mode != "compare" else "the runs are unchanged"
    with contextlib.suppress(Exception):
        from distill_jax.run import workdir

        return workdir.intact(parsed.workdir, study=parsed.mode == "study")
    return "earlier checkpoints are untouched"


def _is_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the host or of a device."""
    message = text_of(error, most=100_000, lines=None).lower()
    of_jax = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    return isinstance(error, MemoryError) or (
        of_jax
        and (
            "out of memory" in message or ("resource_exhausted" in message and "memory" in message)
        )
    )


def _report(
    error: Exception,
    parsed: flags.Flags | None = None,
    folder: pathlib.Path | None = None,
) -> int:
    """Prints an error and returns the exit code; no traceback goes to the console."""
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, OSError) and error.errno in SURROUNDINGS:
        where = f"{error.filename}: " if error.filename else ""
        what = SURROUNDINGS[error.errno]
        print(f"error: {where}{what}\n  {_intact(parsed)}", file=sys.stderr)
        return UserError.exit_code
    if _is_memory(error):
        first = text_of(error).removeprefix("RESOURCE_EXHAUSTED: ")
        what = f": {first}" if first else ""
        print(f"error: not enough memory{what}\n  {SMALLER}", file=sys.stderr)
        return UserError.exit_code
    from distill_jax.run import processes

    if processes.is_loss_of_peer(error):
        first = f"another process of this run has ended: {text_of(error)}"
        print(f"error: {first}\n  {_intact(parsed)}", file=sys.stderr)
        return processes.PEER_LOST
    return crash.report(error, folder=folder, intact=_intact(parsed), suffix=_suffix(parsed))


@contextlib.contextmanager
def _started(command: _Command, parsed: flags.Flags) -> Iterator[None]:
    """Starts JAX and joins the other processes; ends what is stopped by a signal with its code."""
    with crash.threads(command.folder, suffix=_suffix(parsed)):
        try:
            # Imported late: `--help` and errors in the command line must not load JAX.
            crash.doing("starting JAX")
            with console.deferring_interrupts():
                from distill_jax.run import environment
            _start_jax(parsed)
            continues = parsed.mode in ("train", "study")
            with environment.stop_on_signal() if continues else contextlib.nullcontext():
                try:
                    yield
                except environment.Preempted as e:
                    left_out = [*["--start_over"] * parsed.start_over, *filter(None, [e.flag])]
                    without = f" without {' and '.join(left_out)}" if left_out else ""
                    print(f"{e}; the same command{without} continues it", file=sys.stderr)
                    command.code = e.exit_code
                except BaseException as e:
                    if isinstance(e, Exception) or not raised_by_code(e):
                        raise
                    left = f"{type(e).__name__}: {text_of(e)}"
                    what = f"code that the config names left the program ({left})"
                    hint = "let it return, or raise"
                    raise ConfigError(what, where=raised_at(e), hint=hint) from e
        except Exception as e:
            if _is_joined():
                from distill_jax.run import processes

                processes.leave(functools.partial(_report, e, parsed, command.folder))
            raise


def _start_jax(parsed: flags.Flags) -> None:
    with console.deferring_interrupts():
        from distill_jax.run import environment, processes
    settings = None
    if parsed.mode != "describe":
        given = {name: getattr(parsed, name) for name in flags.PROCESS_FLAGS}
        settings = processes.detect(os.environ, **given)
    count = settings.num_processes or 1 if settings else 1
    environment.configure_jax(
        cpu_devices=environment.cpu_devices(parsed.config, processes=count),
        x64=parsed.config.precision == "float64",
    )
    processes.initialize(settings)
    environment.check_devices()
    environment.cache_compiled_programs()
    if processes.count() > 1:
        # Replicas are chosen by time, which processes measure differently.
        parsed.config.study.replicas = "no"


def _do(parsed: flags.Flags) -> None:
    """Runs the modes other than a single training run, and prints their output."""
    with console.deferring_interrupts():
        from distill_jax.run import build, processes
        from distill_jax.run.train import evaluation

    crash.doing(DOING[parsed.mode])
    log_line = _log_line if processes.is_main() else _silent
    config, workdir, trusted = parsed.config, parsed.workdir, parsed.trusted
    if parsed.mode == "describe":
        from distill_jax.run import describe

        print(describe.describe(config, trusted=trusted))
        return
    assert workdir is not None
    if parsed.mode == "study":
        from distill_jax.run import study

        over = parsed.start_over
        table = study.run_study(
            config, workdir, trusted=trusted, start_over=over, log_line=log_line
        )
    elif parsed.mode == "export":
        from distill_jax.run import export

        if not processes.is_main():
            return
        table = export.export_run(workdir, trusted=trusted, **parsed.export)
    else:
        make_experiment = functools.partial(build.build, trusted=trusted)
        table = evaluation.evaluate_run(
            config, workdir, make_experiment=make_experiment, changes=parsed.changes
        )
    if processes.is_main():
        print(table)


def _log_line(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line)


def _silent(line: str) -> None:
    del line


def run() -> None:
    """The console script."""
    console.guard()
    if "DISTILL_JAX_LAUNCHER" in os.environ:
        from distill_jax.run import processes

        processes.follow_launcher()
    try:
        paths.make_importable()
    except UserError as error:  # the current folder is gone, without which JAX cannot compile
        code = _report(error)
    else:
        code = main(sys.argv)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    if code and not _is_joined():
        # Threads of a failed save or of a compilation may take minutes to end by themselves.
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(code)
    sys.exit(code)


def _is_joined() -> bool:
    """Whether this process is one of several, which an end without a word would abort."""
    distributed = sys.modules.get("jax._src.distributed")
    return distributed is not None and distributed.global_state.client is not None


if __name__ == "__main__":
    run()
