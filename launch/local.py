"""Runs one command line as several processes on this machine, on its CPU.

  python launch/local.py --processes=2 -- --config=configs/distill/supervised.py:smoke \\
      --workdir=runs/two

Arguments after `--` go to `python -m distill_jax.main`. Each line of output begins with the number
of its process. When one process fails, the others are stopped. The exit code is that of the first
process that fails: 0 done, 1 an unexpected error, 2 a user error, 3 a non-finite loss, 71 when a
signal ended one of several processes, 75 stopped with the state saved (the same command continues),
128 + n when signal n ended the only process. SIGTERM and Ctrl-C are forwarded, so that the state is
saved. If this process is killed, the others stop within seconds. `--dry_run` prints the commands.
"""

import argparse
import contextlib
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
if (ROOT / "distill_jax").is_dir():  # a source tree, whether installed or not
    sys.path.insert(0, str(ROOT))

from distill_jax.run import console, crash  # noqa: E402

PREEMPTED, PEER_LOST = 75, 71


def free_port() -> int:
    """Returns a port that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def commands(
    args: Sequence[str], *, processes: int, devices: int, port: int, python: str = sys.executable
) -> list[list[str]]:
    """Returns the command of each process.

    Args:
      args: flags of `distill_jax.main`.
      processes: number of processes.
      devices: CPU devices per process; 0 is automatic.
      port: port of process 0.
      python: path of the interpreter.
    """
    command = [python, "-m", "distill_jax.main", *args]
    if devices:
        command.append(f"--config.mesh.cpu_devices={devices}")
    if processes == 1:
        return [command]
    shared = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}"]
    return [[*command, *shared, f"--process_id={i}"] for i in range(processes)]


def run(lines: Sequence[Sequence[str]], *, grace: float, stdout: Any = None) -> int:
    """Runs the commands side by side to their end and returns the exit code.

    Args:
      lines: commands.
      grace: seconds between asking the others to stop and ending them, once one has failed.
      stdout: where their output goes, line by line; standard output by default.
    """
    stdout = stdout or sys.stdout
    # By the last one, children end soon after this process, in whatever way it does.
    environment = {"JAX_PLATFORMS": "cpu", **os.environ, "DISTILL_JAX_LAUNCHER": str(os.getpid())}
    children = [
        subprocess.Popen(
            line,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a Ctrl-C of the terminal comes once, from here
        )
        for line in lines
    ]
    lock = threading.Lock()

    def copy(index: int, child: subprocess.Popen) -> None:
        assert child.stdout is not None
        with child.stdout as lines:
            for line in lines:
                with lock:
                    stdout.write(f"[{index}] {line}")
                    stdout.flush()

    readers = [threading.Thread(target=copy, args=pair) for pair in enumerate(children)]
    for reader in readers:
        reader.start()

    def forward(number, frame):
        del frame
        _signal(children, number)

    previous = {n: signal.signal(n, forward) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = _wait(children, grace, stdout)
    finally:
        _signal(children, signal.SIGKILL)
        for number, handler in previous.items():
            signal.signal(number, handler)
        for reader in readers:
            reader.join()
    return code


def _signal(children: Sequence[subprocess.Popen], number: int) -> None:
    for child in children:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(number)


def _wait(children: Sequence[subprocess.Popen], grace: float, stdout) -> int:
    """Returns the code of the first process that did not end well, once all have ended.

    Where a signal ended one of several, that is `PEER_LOST`: which of them is seen first is chance,
    and all go on from the last checkpoint.
    """
    first, deadline = 0, None
    while True:
        codes = [child.poll() for child in children]
        bad = [code for code in codes if code]
        if bad and deadline is None:
            first, deadline = bad[0], time.monotonic() + grace
            killed = [(i, -code) for i, code in enumerate(codes) if code and code < 0]
            if len(children) > 1 and killed:
                index, number = killed[0]
                stdout.write(f"process {index} was ended by {signal.Signals(number).name}\n")
                first = PEER_LOST
            # Preempted processes saved together: the others are about to end by themselves.
            if first != PREEMPTED:
                _signal(children, signal.SIGTERM)
        if None not in codes:
            return first if first >= 0 else 128 - first
        if deadline is not None and time.monotonic() > deadline:
            _signal(children, signal.SIGKILL)
        time.sleep(0.05)


def main(argv: Sequence[str]) -> int:
    """Parses the command line, and runs it or prints it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, help="number of processes")
    parser.add_argument(
        "--devices", type=int, default=0, help="CPU devices per process; 0: automatic"
    )
    parser.add_argument("--port", type=int, default=0, help="port of process 0; 0: any free one")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds to stop after a failure")
    parser.add_argument("--dry_run", action="store_true", help="print the commands")
    parser.add_argument("args", nargs="*", help="`--`, then flags of distill_jax.main")
    flags = parser.parse_args(argv)
    if flags.processes < 1 or flags.devices < 0 or not flags.args:
        parser.error("needs --processes of 1 or more and, behind --, flags of distill_jax.main")
    lines = commands(
        flags.args,
        processes=flags.processes,
        devices=flags.devices,
        port=flags.port or free_port(),
    )
    if flags.dry_run:
        for line in lines:
            print(shlex.join(line))
        return 0
    return run(lines, grace=flags.grace)


def entry() -> None:
    """The console script."""
    console.guard()
    crash.doing("running the processes")
    sys.exit(crash.guarded(lambda: main(sys.argv[1:])))


if __name__ == "__main__":
    entry()
