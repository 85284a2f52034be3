"""The entrypoint: `python -m distill_jax.main --config=FILE --workdir=DIR [--mode=MODE] ...`."""

import contextlib
import errno
import functools
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Sequence

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
    errno.EISDIR: "a folder, where a file belongs",
    errno.ENOTDIR: "a file, where a folder belongs",
    errno.ELOOP: "a symbolic link in a circle",
    errno.ENAMETOOLONG: "a name that is too long",
    errno.EMFILE: "too many open files; see ulimit -n",
    errno.ENFILE: "too many open files on this machine",
    errno.EIO: "the device failed to read or write",
    errno.ESTALE: "the file system was mounted again",
}
"""What the machine refuses, which no change of the program would mend."""

SMALLER = (
    "a smaller batch_size, eval.batch_size or data set; `--mode=describe` tells what a step takes"
)


DOING = {
    "train": "building the experiment",
    "eval": "evaluating",
    "describe": "describing the config",
    "study": "running the study",
    "export": "exporting the network",
}
"""What is being done, until something says more, by mode."""


def main(argv: Sequence[str]) -> int:
    """Runs one command line and returns its exit code.

    0 done, 1 an error that nobody foresaw (one line on stderr, the trace in `crash.txt`), 2 a
    mistake that the user can mend (one message on stderr, no traceback), 3 a loss that is not
    finite, 70 a stall that `watch.on_stall` ends, 71 another process of the run has ended or did
    not come, 75 stopped by a signal with the state saved, 130 interrupted by a second Ctrl-C.
    """
    crash.doing("reading the command line")
    parsed: flags.Flags | None = None
    folder = _named_folder(argv)  # where the trace of an error goes
    crash.in_threads()
    try:
        parsed = flags.parse(argv)
        folder = None if parsed.mode == "describe" else parsed.workdir
        with crash.threads(folder, suffix=_suffix(parsed)):
            try:
                code = _run(parsed)
            except Exception as e:
                if _is_joined():
                    from distill_jax.run import processes

                    processes.leave(functools.partial(_report, e, parsed, folder))
                raise
        return crash.UNEXPECTED if crash.in_threads() and code == 0 else code
    except KeyboardInterrupt:
        print(f"interrupted while {crash.done_so_far()}; {_intact(parsed)}", file=sys.stderr)
        return crash.INTERRUPTED
    except Exception as e:
        return _report(e, parsed, folder)


def _named_folder(argv: Sequence[str]) -> pathlib.Path | None:
    """Returns the folder that a command line which was not understood names, if it is there."""
    named = [arg.partition("=")[2] for arg in argv if arg.startswith("--workdir=")]
    return pathlib.Path(named[0]) if named and os.path.isdir(named[0]) else None


def _suffix(parsed: flags.Flags | None) -> str:
    """Returns what tells the files of the processes of a run apart."""
    number = getattr(parsed, "process_id", None)
    if not number and "jax" in sys.modules:
        with contextlib.suppress(Exception):
            from jax._src import distributed

            number = distributed.global_state.process_id
    return f"-{number}" if number else ""


def _intact(parsed: flags.Flags | None) -> str:
    """Returns what a run that ended left whole; looks, and promises nothing else."""
    if parsed is None or parsed.workdir is None or parsed.mode == "describe":
        return "nothing was trained or changed"
    if parsed.mode in ("eval", "export"):
        return "the run is as it was"
    with contextlib.suppress(Exception):
        from distill_jax.run import workdir

        return workdir.intact(parsed.workdir, study=parsed.mode == "study")
    return "what was saved before is untouched"


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


def _run(parsed: flags.Flags) -> int:
    # Imported late: `--help` and mistakes in the command line answer before JAX is loaded.
    crash.doing("starting JAX")
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
    with contextlib.ExitStack() as stack:
        if parsed.mode in ("train", "study"):  # what can be continued
            stack.enter_context(environment.stop_on_signal())
        try:
            _do(parsed)
        except environment.Preempted as e:
            without = " without --start_over" if parsed.start_over else ""
            print(f"{e}; the same command{without} continues it", file=sys.stderr)
            return e.exit_code
        except BaseException as e:
            if isinstance(e, Exception) or not raised_by_code(e):
                raise
            what = f"code that the config names left the program ({type(e).__name__}: {text_of(e)})"
            raise ConfigError(what, where=raised_at(e), hint="let it return, or raise") from e
    return 0


def _do(parsed: flags.Flags) -> None:
    with console.deferring_interrupts():
        from distill_jax.run import build, processes
        from distill_jax.run import workdir as workdir_lib
        from distill_jax.run.train import evaluation, loop
        from distill_jax.run.train.result import format_result

    make_experiment = functools.partial(build.build, trusted=parsed.trusted)
    if processes.count() > 1:
        # Replicas are chosen by time, which processes measure differently.
        parsed.config.study.replicas = "no"
    main_process = processes.is_main()
    crash.doing(DOING[parsed.mode])
    log_line = _log_line if main_process else _silent

    config, workdir, trusted = parsed.config, parsed.workdir, parsed.trusted
    if parsed.mode == "describe":
        from distill_jax.run import describe

        print(describe.describe(config, trusted=trusted))
    elif parsed.mode == "study":
        from distill_jax.run import study

        assert workdir is not None
        over = parsed.start_over
        table = study.run_study(
            config, workdir, trusted=trusted, start_over=over, log_line=log_line
        )
        if main_process:
            print(table)
    elif parsed.mode == "export":
        from distill_jax.run import export

        assert workdir is not None
        if main_process:
            print(export.export_run(workdir, trusted=trusted, **parsed.export))
    elif parsed.mode == "eval":
        assert workdir is not None
        table = evaluation.evaluate_run(config, workdir, make_experiment=make_experiment)
        if main_process:
            print(table)
    else:
        assert workdir is not None
        with workdir_lib.claim(workdir, "run", start_over=parsed.start_over, log_line=log_line):
            result = loop.train(config, workdir, make_experiment=make_experiment, log_line=log_line)
            if main_process:
                print(format_result(result))
                from distill_jax import report  # not before the first step

                crash.doing("writing the report")
                print(f"report: {report.write_run_report(workdir)}")


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
    found = sys.modules.get("jax._src.distributed")
    return found is not None and found.global_state.client is not None


if __name__ == "__main__":
    run()
