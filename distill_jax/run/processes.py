"""Several processes as one run: how they find each other, and their collective decisions.

`detect` is a pure function of the environment; `initialize` is the one place that calls
`jax.distributed`. A run of one process never initializes anything.
"""

import contextlib
import ctypes
import functools
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from distill_jax.core.errors import UserError, text_of
from distill_jax.run import environment, watch
from distill_jax.trainer.io import peers
from distill_jax.trainer.io.peers import any_process as any_process
from distill_jax.trainer.io.peers import barrier as barrier
from distill_jax.trainer.io.peers import count as count
from distill_jax.trainer.io.peers import from_first as from_first
from distill_jax.trainer.io.peers import is_loss_of_peer as is_loss_of_peer
from distill_jax.trainer.io.peers import is_main as is_main

peers.waiting = functools.partial(watch.during, "barrier")

PR_SET_PDEATHSIG = 1
"""From Linux's prctl.h: a signal for this process when the thread that started it ends."""

PORT = 8476
"""Port on which process 0 listens, unless an address sets another."""

TIMEOUT_SECONDS = 300
HEARTBEAT_SECONDS = 60
"""Seconds of silence after which a peer counts as dead, and every process ends."""

SHUTDOWN_SECONDS = 3600
"""Seconds that finished processes wait for the first one, which writes the report."""

PEER_LOST = 71
"""Exit code if another process of the run has ended, or did not connect."""

LAUNCHER = "DISTILL_JAX_LAUNCHER"
"""Environment variable in which a launcher on this machine passes its process id to children."""

LAUNCHER_SECONDS = 0.5
"""Seconds between two checks that the launcher still exists."""

ORPHAN_SECONDS = 4
"""Seconds that a process whose launcher is gone has to stop before it is ended in any case."""

LAST_WORD_SECONDS = 2
"""Seconds that process 0 stays after an error; the others are ended when it is gone."""


class PeersAbsent(UserError):
    """The processes did not connect in time; restarting all of them may help."""

    exit_code = PEER_LOST


class Settings(NamedTuple):
    """The participating processes. If all three are None, JAX reads the metadata of the TPU host.

    Attributes:
      coordinator: host:port of process 0.
      num_processes: how many processes there are.
      process_id: which of them this is.
      source: where these values come from, for messages.
      timeout: seconds that processes wait for each other at the start.
    """

    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    source: str
    timeout: int = TIMEOUT_SECONDS


def detect(
    environ: Mapping[str, str],
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Settings | None:
    """Returns how the processes of this run find each other, None where there is one process.

    The first that applies decides:

    1. the arguments (flags `--coordinator`, `--num_processes`, `--process_id`);
    2. `JAX_COORDINATOR_ADDRESS`, with `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, or
       `JOB_COMPLETION_INDEX` of an indexed Kubernetes job in place of the last;
    3. a SLURM step of several tasks: `SLURM_STEP_NUM_TASKS`, `SLURM_PROCID`, `SLURM_STEP_NODELIST`,
       with a port drawn from `SLURM_JOB_ID`. Outside `srun` these are absent;
    4. several `TPU_WORKER_HOSTNAMES` with `TPU_WORKER_ID`, as Kubernetes on TPU sets them;
    5. `DISTILL_JAX_PROCESSES=tpu`: a TPU VM, whose metadata JAX reads itself.

    `DISTILL_JAX_PROCESSES=off` switches 2 to 5 off. `DISTILL_JAX_TIMEOUT` is the number of seconds
    to wait.

    Args:
      environ: the environment, such as `os.environ`.
      coordinator: host:port of process 0.
      num_processes: how many there are.
      process_id: which one this is, from 0.

    Raises:
      UserError: one of several values is missing, no number, or out of range.
    """
    timeout = _integer(environ, "DISTILL_JAX_TIMEOUT", default=TIMEOUT_SECONDS)
    if timeout < 1:
        raise UserError("must be at least 1 second", where="DISTILL_JAX_TIMEOUT")
    given = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    if any(value is not None for value in given.values()):
        if num_processes == 1 and coordinator is None and not process_id:
            return None
        missing = [name for name, value in given.items() if value is None]
        if missing:
            raise UserError(
                f"missing beside {', '.join(n for n in given if n not in missing)}",
                where=", ".join(missing),
                hint="--coordinator=HOST:PORT --num_processes=N --process_id=I, I from 0 to N - 1",
            )
        return _checked(Settings(coordinator, num_processes, process_id, "flags", timeout))
    mode = environ.get("DISTILL_JAX_PROCESSES", "")
    if mode not in ("", "off", "tpu"):
        raise UserError(f"{mode!r} is neither off nor tpu", where="DISTILL_JAX_PROCESSES")
    if mode == "off":
        return None
    if address := environ.get("JAX_COORDINATOR_ADDRESS"):
        count = _integer(environ, "JAX_NUM_PROCESSES")
        names = ("JAX_PROCESS_ID", "JOB_COMPLETION_INDEX")
        name = next((name for name in names if name in environ), names[0])
        index = _integer(environ, name)
        return _checked(Settings(address, count, index, "JAX_COORDINATOR_ADDRESS", timeout))
    if _integer(environ, "SLURM_STEP_NUM_TASKS", default=1) > 1:
        host = first_host(environ.get("SLURM_STEP_NODELIST", ""))
        port = 61440 + _integer(environ, "SLURM_JOB_ID") % 4096
        return _checked(
            Settings(
                f"{host}:{port}",
                _integer(environ, "SLURM_STEP_NUM_TASKS"),
                _integer(environ, "SLURM_PROCID"),
                "SLURM",
                timeout,
            )
        )
    hosts = [h for h in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if h]
    if len(hosts) > 1:
        index = _integer(environ, "TPU_WORKER_ID")
        address = f"{hosts[0]}:{PORT}"
        return _checked(Settings(address, len(hosts), index, "TPU_WORKER_HOSTNAMES", timeout))
    return Settings(None, None, None, "TPU metadata", timeout) if mode == "tpu" else None


def first_host(nodes: str) -> str:
    """Returns the first host of a SLURM list: "a[01-03,7],b" -> "a01".

    Raises:
      UserError: there is none.
    """
    match = re.match(r"([^,\[\]]+)(?:\[([^\],-]+)[^\]]*\]([^,\[\]]*))?", nodes)
    if match is None:
        raise UserError(f"{nodes!r} names no host", where="SLURM_STEP_NODELIST")
    return match[1] + (match[2] or "") + (match[3] or "")


def _integer(environ: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        what = "is not set" if text is None else f"{text!r} is not a number"
        raise UserError(what, where=name, hint="see launch/README.md") from None


def _checked(settings: Settings) -> Settings:
    address, count, index, source, _ = settings
    assert address is not None and count is not None and index is not None
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit() and 0 < int(port) < 65536):
        raise UserError(f"{address!r} is no address of process 0", where=source, hint="HOST:PORT")
    if count < 1 or not 0 <= index < count:
        raise UserError(
            f"process {index} of {count}", where=source, hint="processes count from 0 to N - 1"
        )
    return settings


def initialize(settings: Settings | None) -> None:
    """Joins the other processes; must run before JAX touches a device. None does nothing.

    Every process uses all devices that it sees: start one per host, or hide the devices of the
    others.

    Raises:
      PeersAbsent: the others did not come in time.
    """
    if settings is None:
        return
    import jax

    # JAX's own handler of SIGTERM would hide the signal from a program that does not query it.
    with contextlib.suppress(AttributeError):
        jax.config.update("jax_enable_preemption_service", False)
    if settings.coordinator is None:
        arguments = {}
    else:
        _reachable(settings)
        arguments = {
            "coordinator_address": settings.coordinator,
            "num_processes": settings.num_processes,
            "process_id": settings.process_id,
            "cluster_detection_method": "deactivate",
        }
    # Where others are missing, JAX's client aborts the process with a stack trace: be earlier.
    alarm = threading.Timer(settings.timeout, _give_up, (_absent(settings, "timed out"),))
    alarm.daemon = True
    alarm.start()
    try:
        with _losses_end_the_process():
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=settings.timeout + 30,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )
    except Exception as error:
        first = text_of(error) or type(error).__name__
        raise _absent(settings, first) from error
    finally:
        alarm.cancel()


def follow(parent: int) -> None:
    """Ends this process soon after another one has ended, in whatever way.

    It gets SIGTERM, so that a run saves its state, and ends `ORPHAN_SECONDS` later in any case.
    On Linux the kernel sends the signal; elsewhere, and if the parent was already gone, a thread
    that checks the parent's process id does.

    Args:
      parent: process id of the parent of this process.
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(LAUNCHER_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        os._exit(PEER_LOST)

    threading.Thread(target=look, name="parent", daemon=True).start()


def follow_launcher() -> None:
    """Follows the launcher that started this process, if one did, see `follow`."""
    number = os.environ.pop(LAUNCHER, "")
    if number.isdigit():
        follow(int(number))


@contextlib.contextmanager
def _losses_end_the_process() -> Iterator[None]:
    """Makes clients of JAX's coordination service end the process with `PEER_LOST` on its errors.

    By default the client aborts the process. It accepts a callback instead, which
    `jax.distributed.initialize` does not pass on. In jaxlib 0.10 the conversion of the callback's
    argument for Python fails: the C++ exception `std::bad_cast` ends the process on a separate
    thread. This function installs a termination handler that distinguishes this exception from all
    others. Without such a callback or C++ library, the process is aborted as before.
    """
    from jax._src.distributed import _jax  # pyright: ignore[reportPrivateImportUsage]

    plain = _jax.get_distributed_runtime_client
    if "missed_heartbeat_callback" not in (plain.__doc__ or "") or not _handle_bad_cast():
        yield
        return
    setattr(  # noqa: B010
        _jax,
        "get_distributed_runtime_client",
        functools.partial(plain, missed_heartbeat_callback=_lost),
    )
    try:
        yield
    finally:
        setattr(_jax, "get_distributed_runtime_client", plain)  # noqa: B010


def _lost(*_: Any) -> None:
    line = (
        "error: another process of this run has ended, or process 0 cannot be reached\n"
        "  the same command, for all processes, continues from the last checkpoint, if any\n"
    )
    with contextlib.suppress(OSError):
        os.write(2, line.encode())
    os._exit(PEER_LOST)


_handlers: list[Any] = []


def _handle_bad_cast() -> bool:
    """Has `std::terminate` call `_lost` for a `std::bad_cast`; returns whether it could."""
    if _handlers:
        return True
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        kind_of_exception, set_terminate = (
            library.__cxa_current_exception_type,
            library._ZSt13set_terminatePFvvE,
        )
    except (OSError, AttributeError):
        return False
    handler_type = ctypes.CFUNCTYPE(None)
    kind_of_exception.restype = set_terminate.restype = ctypes.c_void_p
    set_terminate.argtypes = [ctypes.c_void_p]
    before: list[int | None] = []

    def handle() -> None:
        if (kind := kind_of_exception()) is not None:
            # std::type_info: a pointer to its functions, then one to the mangled name.
            name = ctypes.cast(kind, ctypes.POINTER(ctypes.c_char_p))[1]
            if name is not None and name.lstrip(b"*") == b"St8bad_cast":
                _lost()
        if before and before[0]:
            ctypes.cast(before[0], handler_type)()

    handler = handler_type(handle)
    _handlers.append(handler)  # C++ has its address from now on
    before.append(set_terminate(ctypes.cast(handler, ctypes.c_void_p)))
    return True


def _absent(settings: Settings, what: str) -> PeersAbsent:
    return PeersAbsent(
        f"process {settings.process_id} of {settings.num_processes} did not meet all other "
        "processes at "
        f"{settings.coordinator} in {settings.timeout} s: {what}",
        where=settings.source,
        hint="are all processes running, and can they reach that address? "
        "DISTILL_JAX_TIMEOUT=SECONDS waits longer",
    )


def _give_up(error: UserError) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(error.exit_code)


def _reachable(settings: Settings) -> None:
    """Waits until process 0 listens; otherwise JAX ends the process without a catchable error."""
    if not settings.process_id:
        return
    host, _, port = (settings.coordinator or "").rpartition(":")
    deadline = time.monotonic() + settings.timeout
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        time.sleep(0.2)
    raise _absent(settings, "nothing listens there")


def stop_if_asked(when: str) -> None:
    """Ends the run if any process got a signal to stop. All must call this at the same point.

    Args:
      when: the end of the message.

    Raises:
      Preempted: in every process.
    """
    if any_process(environment.asked_to_stop()):
        raise environment.Preempted(f"stopped {when}")


def leave(report: Callable[[], int]) -> None:
    """Ends this process at once after an error if there are several processes.

    With one process it does nothing. An orderly end would wait for the others, which may wait in a
    collective for this one.

    Args:
      report: reports the error and returns the exit code.
    """
    if count() == 1:
        return
    code = report()
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main():
        time.sleep(LAST_WORD_SECONDS)
    os._exit(code)
