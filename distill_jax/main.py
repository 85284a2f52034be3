"""The entrypoint: `python -m distill_jax.main --config=FILE --workdir=DIR [--mode=MODE] ...`."""

import os
import sys
from collections.abc import Sequence

from distill_jax.core.errors import UserError
from distill_jax.run import flags


def main(argv: Sequence[str]) -> int:
    """Runs one command line and returns its exit code.

    0 done, 2 a mistake that the user can mend (one message on stderr, no traceback), 3 a loss that
    is not finite, 75 stopped by a signal with the state saved.
    """
    try:
        parsed = flags.parse(argv)
        return _run(parsed)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code


def _run(parsed: flags.Flags) -> int:
    # Imported late: `--help` and mistakes in the command line answer before JAX is loaded.
    from distill_jax.run import environment, processes

    settings = None
    if parsed.mode != "describe":
        given = {name: getattr(parsed, name) for name in flags.PROCESS_FLAGS}
        settings = processes.detect(os.environ, **given)
    count = settings.num_processes or 1 if settings else 1
    environment.configure_jax(cpu_devices=environment.cpu_devices(parsed.config, processes=count))
    processes.initialize(settings)
    from distill_jax.run import loop

    if processes.count() > 1:
        # Lanes are chosen by time, which processes measure differently.
        parsed.config.study.lanes = "no"
    main_process = processes.is_main()
    say = _say if main_process else _silent

    config, workdir = parsed.config, parsed.workdir
    try:
        if parsed.mode == "describe":
            from distill_jax.run import describe

            print(describe.describe(config))
        elif parsed.mode == "study":
            from distill_jax.run import study

            assert workdir is not None
            table = study.run_study(config, workdir, say=say)
            if main_process:
                print(table)
        elif parsed.mode == "eval":
            assert workdir is not None
            table = loop.evaluate_run(config, workdir)
            if main_process:
                print(table)
        else:
            assert workdir is not None
            result = loop.train(config, workdir, say=say)
            if main_process:
                print(loop.format_result(result))
                from distill_jax.run import report  # not before the first step

                print(f"report: {report.write_run_report(workdir)}")
    except loop.Preempted as e:
        print(f"{e}; the same command continues it", file=sys.stderr)
        return e.exit_code
    return 0


def _say(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line)


def _silent(line: str) -> None:
    del line


def run() -> None:
    """The console script."""
    sys.exit(main(sys.argv))


if __name__ == "__main__":
    run()
