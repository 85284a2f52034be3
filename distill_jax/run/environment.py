"""The surroundings of a run: devices, compilation cache, versions and signals."""

import concurrent.futures
import contextlib
import ctypes
import functools
import importlib.metadata
import math
import os
import pathlib
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from distill_jax.core.errors import UserError

T = TypeVar("T")

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml-collections")


@functools.cache
def _process_start() -> float:
    """Returns when this process began, on the clock of `time.perf_counter` (Linux)."""
    now = time.perf_counter()
    try:
        ticks = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(pathlib.Path("/proc/uptime").read_text().split()[0])
        return now - (uptime - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return now


_started_runs: list[float] = []


def startup_seconds() -> float:
    """Returns the seconds from process start to the first run in it; 0 for later runs."""
    _started_runs.append(time.perf_counter())
    return _started_runs[0] - _process_start() if len(_started_runs) == 1 else 0.0


def available_cores() -> int:
    """Returns how many cores this process may run on, which a scheduler may have limited."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_devices(config, *, processes: int = 1) -> int:
    """How many devices to split a CPU into: one per core where that is faster and the batch fits.

    With several processes, each gets its share, as if they shared one machine.

    Convolutional networks and transformers gain (docs/performance.md); the step of a perceptron is
    too short to pay for the exchange of its gradients. Replicas of a study exchange nothing.
    """
    if config.mesh.cpu_devices:
        return config.mesh.cpu_devices
    learning = {r.model for r in config.roles.values() if not r.frozen and r.ema_of is None}
    mesh = config.mesh
    free = mesh.data == -1 and mesh.fsdp == mesh.model == 1
    if free and learning == {"mlp"} and config.study.replicas == "no":
        return 1
    fixed = math.prod(size for size in (mesh.data, mesh.fsdp, mesh.model) if size != -1)
    if -1 not in (mesh.data, mesh.fsdp, mesh.model):
        return max(1, fixed // processes)
    cores = max(1, available_cores() // processes)
    totals = [n * processes for n in range(1, cores + 1)]
    split = max(1, mesh.model)
    fits = [n for n in totals if n % fixed == 0 and config.batch_size % max(1, n // split) == 0]
    return max(fits, default=max(fixed, processes)) // processes


def configure_jax(*, cpu_devices: int, x64: bool = False) -> None:
    """Splits the CPU into devices.

    Must run before JAX touches a device; later calls leave the devices as they are. On Linux freed
    memory stays in the process, see `keep_freed_memory`. `x64` lets arrays have 64 bits.

    Decompositions inside a step use one thread, unless `OPENBLAS_NUM_THREADS` is set: their
    matrices are small, XLA has its own threads, and on shared cores the threads of OpenBLAS wait
    for each other (the eigenvalues of a matrix `[128, 128]`: 80 ms instead of 2 ms).
    """
    try:
        import jax  # NumPy comes with it, whose own copy of OpenBLAS keeps its threads
    except ValueError as error:  # an environment variable that JAX cannot read
        names = [name for name in os.environ if name.startswith("JAX_")]
        hint = f"set here: {', '.join(names)}" if names else ""
        raise UserError(str(error), where="importing JAX", hint=hint) from error

    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when SciPy is first imported
    keep_freed_memory()

    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    if x64:
        jax.config.update("jax_enable_x64", True)


def check_devices() -> None:
    """Starts JAX's backend, and checks that programs are compiled.

    Raises:
      UserError: there is no such backend on this machine, or compilation is switched off.
    """
    import jax

    where = "JAX_PLATFORMS" if os.environ.get("JAX_PLATFORMS") else "JAX"
    hint = "unset JAX_PLATFORMS to use the devices that exist, or set JAX_PLATFORMS=cpu"
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        lines = str(error).splitlines() or [f"JAX finds no backend {platforms!r} on this machine"]
        raise UserError(lines[0][:300], where=where, hint=hint) from error
    if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
        raise UserError(
            "compilation is disabled, and every step must be compiled",
            where="JAX_DISABLE_JIT",
            hint="unset it",
        )


def in_background(do: Callable[[], T]) -> Callable[[], T]:
    """Starts `do` on a thread; the function returned waits for its result, or raises its error.

    The process ends only when `do` has: a thread must not be inside XLA when Python goes away.
    """
    import jax

    wide = jax.numpy.result_type(float) == "float64"  # on this thread

    def run() -> T:
        with jax.enable_x64(wide):
            return do()

    pool = concurrent.futures.ThreadPoolExecutor(1, "compile")
    future = pool.submit(run)
    pool.shutdown(wait=False)
    return future.result


def cache_compiled_programs() -> bool:
    """Switches the persistent compilation cache on; returns whether it did.

    The cache lies in `$DISTILL_JAX_CACHE`, by default `~/.cache/distill_jax`; "off" disables it.
    On several CPU devices it takes only programs that are safe to read back (`program_cache`), and
    CPU processes that work together use none.
    """
    import jax

    from distill_jax.run import program_cache

    cache = os.environ.get("DISTILL_JAX_CACHE", "~/.cache/distill_jax")
    several = jax.default_backend() == "cpu" and jax.device_count() > 1
    alone = jax.process_count() == 1
    if cache == "off" or (several and not (alone and program_cache.write_ordered_only())):
        return False
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return True


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory in the process; returns whether it could.

    XLA:CPU allocates the buffers of a step anew each time. Large ones come from `mmap` and go back
    at once, so that every step pays for the page faults of all of them: a quarter of the time of a
    transformer's step (docs/performance.md). The process then never shrinks. Set
    `DISTILL_JAX_KEEP_MEMORY=off` where memory is shared with other programs.
    """
    if os.environ.get("DISTILL_JAX_KEEP_MEMORY") == "off" or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    # From malloc.h: no mmap at all, no trimming, one arena for all threads.
    no_mmap, trim_threshold, arenas = (-4, 0), (-1, 2**31 - 1), (-8, 1)
    return all([mallopt(*option) for option in (no_mmap, trim_threshold, arenas)])


def describe_environment() -> dict[str, Any]:
    """Returns versions, devices, host and command line, as stored in `env.json`."""
    import jax

    import distill_jax

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "absent"

    return {
        "versions": {
            "distill_jax": distill_jax.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "x64": bool(jax.config.read("jax_enable_x64")),
        "host": {
            "system": platform.system(),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
        },
        "command": " ".join(sys.argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


class Preempted(Exception):
    """A signal stopped the run; its saved files are intact, and the same command continues it."""

    exit_code = 75
    flag = ""


class Paused(Preempted):
    """A run reached the step that `--stop_at` names; without the flag the command continues it."""

    exit_code = 0
    flag = "--stop_at"


class StopFlag:
    """Whether a polite signal to stop has come, and which."""

    signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


_stop: StopFlag | None = None


def asked_to_stop() -> bool:
    """Whether a signal has come within `stop_on_signal`."""
    return bool(_stop)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopFlag]:
    """Turns SIGTERM and the first Ctrl-C into a flag that is read between steps and runs.

    A second Ctrl-C interrupts at once. Outside the main thread, signals are not changed. Nested
    inside another one, it returns the flag of the outer one.
    """
    global _stop
    if _stop is not None:
        yield _stop
        return
    flag = _stop = StopFlag()

    def stop(number, frame):
        del frame
        if flag and number == signal.SIGINT:
            signal.default_int_handler(number, None)  # raises; `raise` would look like a config's
        flag.signal = number
        if number == signal.SIGINT:  # print() may be what was interrupted
            os.write(2, b"\nstopping where it can be continued; Ctrl-C again stops at once\n")

    previous = {}
    with contextlib.suppress(ValueError):
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, stop)
    try:
        yield flag
    finally:
        _stop = None
        for number, handler in previous.items():
            signal.signal(number, handler)
