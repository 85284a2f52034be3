"""The entrypoint: `python -m distill_jax.main --config=FILE --workdir=DIR [--mode=MODE] ...`."""

import contextlib
import errno
import functools
import os
import sys
import traceback
from collections.abc import Sequence

from distill_jax.core.errors import ConfigError, UserError, raised_at, raised_by_code
from distill_jax.run import flags, paths

RESUMES = "what was saved is intact, and the same command goes on from the last checkpoint"

DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would become larger than is allowed",
    errno.EROFS: "the file system is read-only",
}

SMALLER = (
    "a smaller batch_size, eval.batch_size or data set; `--mode=describe` tells what a step takes"
)


def main(argv: Sequence[str]) -> int:
    """Runs one command line and returns its exit code.

    0 done, 2 a mistake that the user can mend (one message on stderr, no traceback), 3 a loss that
    is not finite, 70 a stall that `watch.on_stall` ends, 71 another process of the run has ended
    or did not come, 75 stopped by a signal with the state saved.
    """
    try:
        parsed = flags.parse(argv)
        try:
            return _run(parsed)
        except Exception as e:
            if "jax" in sys.modules:
                from distill_jax.run import processes

                processes.leave(functools.partial(_tell, e))
            raise
    except Exception as e:
        full = isinstance(e, OSError) and e.errno in DISK
        if isinstance(e, UserError) or full or _is_memory(e):
            return _tell(e)
        raise


def _is_memory(error: Exception) -> bool:
    """Whether memory ran out, of the host or of a device."""
    of_jax = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    return isinstance(error, MemoryError) or (
        of_jax and str(error).startswith("RESOURCE_EXHAUSTED") and "memory" in str(error).lower()
    )


def _tell(error: Exception) -> int:
    """Prints an error, without a traceback where it is not a fault of the program."""
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, OSError) and error.errno in DISK:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{DISK[error.errno]}\n  {RESUMES}", file=sys.stderr)
        return UserError.exit_code
    if _is_memory(error):
        first = str(error).partition("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")[:200]
        what = f": {first}" if first else ""
        print(f"error: not enough memory{what}\n  {SMALLER}", file=sys.stderr)
        return UserError.exit_code
    from distill_jax.run import processes

    if processes.is_loss_of_peer(error):
        first = f"another process of this run has ended: {str(error).splitlines()[0][:200]}"
        print(f"error: {first}\n  {RESUMES}", file=sys.stderr)
        return processes.PEER_LOST
    traceback.print_exception(error)
    return 1


def _run(parsed: flags.Flags) -> int:
    # Imported late: `--help` and mistakes in the command line answer before JAX is loaded.
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
    environment.cache_compiled_programs()
    with contextlib.ExitStack() as stack:
        if parsed.mode in ("train", "study"):  # what can be continued
            stack.enter_context(environment.stop_on_signal())
        try:
            _do(parsed)
        except environment.Preempted as e:
            print(f"{e}; the same command continues it", file=sys.stderr)
            return e.exit_code
        except BaseException as e:
            if isinstance(e, Exception) or not raised_by_code(e):
                raise
            what = f"code that the config names left the program ({type(e).__name__}: {e})"
            raise ConfigError(what, where=raised_at(e), hint="let it return, or raise") from e
    return 0


def _do(parsed: flags.Flags) -> None:
    from distill_jax.run import build, loop, processes

    make_experiment = functools.partial(build.build, trusted=parsed.trusted)
    if processes.count() > 1:
        # Lanes are chosen by time, which processes measure differently.
        parsed.config.study.lanes = "no"
    main_process = processes.is_main()
    say = _say if main_process else _silent

    config, workdir, trusted = parsed.config, parsed.workdir, parsed.trusted
    if parsed.mode == "describe":
        from distill_jax.run import describe

        print(describe.describe(config, trusted=trusted))
    elif parsed.mode == "study":
        from distill_jax.run import study

        assert workdir is not None
        table = study.run_study(config, workdir, trusted=trusted, say=say)
        if main_process:
            print(table)
    elif parsed.mode == "eval":
        assert workdir is not None
        table = loop.evaluate_run(config, workdir, make_experiment=make_experiment)
        if main_process:
            print(table)
    else:
        assert workdir is not None
        result = loop.train(config, workdir, make_experiment=make_experiment, say=say)
        if main_process:
            print(loop.format_result(result))
            from distill_jax.run import report  # not before the first step

            print(f"report: {report.write_run_report(workdir)}")


def _say(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line)


def _silent(line: str) -> None:
    del line


def run() -> None:
    """The console script."""
    paths.make_importable()
    sys.exit(main(sys.argv))


if __name__ == "__main__":
    run()
