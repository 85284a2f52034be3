"""The entrypoint: `python -m distill_jax.main --config=FILE --workdir=DIR [--mode=MODE] ...`."""

import sys
from collections.abc import Sequence

from distill_jax.core.errors import UserError
from distill_jax.run import flags


def main(argv: Sequence[str]) -> int:
    """Runs one command line and returns its exit code.

    0 done, 2 a mistake that the user can mend (one message on stderr, no traceback), 75 stopped
    by a signal with the state saved.
    """
    try:
        parsed = flags.parse(argv)
        return _run(parsed)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code


def _run(parsed: flags.Flags) -> int:
    # Imported late: `--help` and mistakes in the command line answer before JAX is loaded.
    from distill_jax.run import environment

    environment.configure_jax(cpu_devices=environment.cpu_devices(parsed.config))
    from distill_jax.run import loop

    config, workdir = parsed.config, parsed.workdir
    try:
        if parsed.mode == "describe":
            from distill_jax.run import describe

            print(describe.describe(config))
        elif parsed.mode == "study":
            from distill_jax.run import study

            assert workdir is not None
            print(study.run_study(config, workdir, say=_say))
        elif parsed.mode == "eval":
            assert workdir is not None
            print(loop.evaluate_run(config, workdir))
        else:
            assert workdir is not None
            result = loop.train(config, workdir, say=_say)
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


def run() -> None:
    """The console script."""
    sys.exit(main(sys.argv))


if __name__ == "__main__":
    run()
