"""Sends the metrics of a run to Weights & Biases, MLflow or Trackio, from a process of its own.

A run writes `metrics.jsonl` and nothing else. For each entry of `log.to` a process follows this
file and sends its lines. The run never waits for it: if a service fails, hangs or is killed, the
run does not notice, and the same lines can be sent later:

    python -m distill_jax.run.loggers wandb runs/kd

Each process remembers in `logger-<name>.json` how many lines it has sent, so that resumed runs and
repeated commands send no line twice. Its output goes to `logger-<name>.txt`.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from distill_jax.core.errors import UserError, nearest
from distill_jax.report.sharing import scrubbed
from distill_jax.report.wording import flat
from distill_jax.trainer.io.files import peek, replacing

LINGER_SECONDS = 5.0
"""The longest wait for a logger at the end of a run; it goes on by itself after that."""

DEADLINE_SECONDS = 600.0
"""After the end of the run, until a logger that hangs ends itself."""

POLL_SECONDS = 1.0


class Logger(Protocol):
    """A run of a tracking service."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends finite numbers by name."""
        ...

    def finish(self) -> None:
        """Sends what is buffered."""
        ...


class Wandb:
    """A run of Weights & Biases; `WANDB_MODE=offline` keeps it on disk.

    Args:
      name: name of the run.
      id: identifies the run when it continues.
      config: nested config of the run.
      folder: folder of the run.
      **kwargs: further arguments of `wandb.init`, such as `project`, `entity`, `group` and `tags`.
    """

    def __init__(self, *, name: str, id: str, config: Any, folder: pathlib.Path, **kwargs: Any):
        import wandb  # pyright: ignore[reportMissingImports]

        kwargs = {"project": "distill_jax", "dir": str(folder), **kwargs}
        self._run = wandb.init(name=name, id=id, resume="allow", config=config, **kwargs)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self) -> None:
        self._run.finish()


class Mlflow:
    """A run of MLflow.

    Args:
      name: name of the run.
      id: as for `Wandb`; stored as the tag `distill_jax.id`, by which the run is found again.
      config: nested config, sent as parameters with dotted names.
      folder: folder of the run.
      uri: tracking server or folder; by default MLflow's own setting (`MLFLOW_TRACKING_URI`).
      experiment: name of the experiment.
    """

    def __init__(
        self,
        *,
        name: str,
        id: str,
        config: Any,
        folder: pathlib.Path,
        uri: str | None = None,
        experiment: str = "distill_jax",
    ):
        import mlflow  # pyright: ignore[reportMissingImports]

        del folder
        self._metric = mlflow.entities.Metric
        self._client = client = mlflow.MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        where = found.experiment_id if found else client.create_experiment(experiment)
        runs = client.search_runs([where], f"tags.`distill_jax.id` = '{id}'")
        if runs:
            self._id = runs[0].info.run_id
            return
        self._id = client.create_run(where, run_name=name, tags={"distill_jax.id": id}).info.run_id
        for key, value in flat(config).items():
            client.log_param(self._id, _allowed(key), value[:500])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        rows = [self._metric(_allowed(name), value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self._id, metrics=rows)

    def finish(self) -> None:
        self._client.set_terminated(self._id)


class Trackio:
    """A run of Trackio, kept on disk unless `space_id` is given.

    Args:
      name: name of the run.
      id: as for `Wandb`; its first letters are appended to the name, which identifies the run.
      config: nested config of the run.
      folder: folder of the run.
      **kwargs: further arguments of `trackio.init`, such as `project` and `space_id`.
    """

    def __init__(self, *, name: str, id: str, config: Any, folder: pathlib.Path, **kwargs: Any):
        import trackio  # pyright: ignore[reportMissingImports]

        del folder
        kwargs = {"project": "distill_jax", "embed": False, **kwargs}
        name = f"{name}-{id[:6]}"
        self._module = trackio
        trackio.init(name=name, config=flat(config), resume="allow", **kwargs)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._module.log(dict(metrics), step=step)

    def finish(self) -> None:
        self._module.finish()


LOGGERS: Mapping[str, Callable[..., Logger]] = {
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}


def check_names(names: Sequence[str], *, where: str) -> None:
    """Raises UserError for a logger that does not exist."""
    for name in names:
        if name not in LOGGERS:
            raise UserError(f"unknown logger {name!r}", where=where, hint=nearest(name, LOGGERS))


def check_installed(names: Sequence[str], *, where: str) -> None:
    """Raises UserError for a logger whose package is not installed, without importing it."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            hint = f"pip install {name}, or pip install 'distill_jax[loggers]'"
            raise UserError(f"{name} is not installed", where=f"{where}.{name}", hint=hint)


class LoggerProcess:
    """A writer of a run that leaves everything to a process of its own.

    Args:
      name: a key of `LOGGERS`.
      folder: folder of the run.
      log_line: prints a line.
    """

    def __init__(self, name: str, folder: pathlib.Path, *, log_line: Callable[[str], None]):
        self._name, self._folder, self._log_line = name, folder, log_line
        self._process: subprocess.Popen[bytes] | None = None
        command = [sys.executable, "-m", "distill_jax.run.loggers", "--follow", name, str(folder)]
        root = str(pathlib.Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        with self._tolerated(), _output(name, folder).open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C stops the run, whose end the logger then sees
            )

    @contextlib.contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._warn(f"{type(error).__name__}: {error}")

    def _warn(self, why: str) -> None:
        self._log_line(
            f"warning: {self._name} got no metrics from here on ({why}); the run goes on, and "
            f"`python -m distill_jax.run.loggers {self._name} {self._folder}` sends the rest"
        )
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Notices where the process has ended; it reads the metrics itself."""
        del step, metrics
        if self._process is not None and self._process.poll() is not None:
            self._warn(f"its process ended; see {_output(self._name, self._folder).name}")

    def close(self) -> None:
        """Announces the end of the run, and waits a moment."""
        process = self._process
        if process is None:
            return
        with self._tolerated():
            assert process.stdin is not None
            process.stdin.close()
            try:
                code = process.wait(LINGER_SECONDS)
            except subprocess.TimeoutExpired:
                self._log_line(f"{self._name} is still sending, in the background")
                process.returncode = 0  # it outlives this process on purpose
                return
            if code:
                self._warn(f"code {code}; see {_output(self._name, self._folder).name}")


def send(name: str, folder: pathlib.Path, *, ended: Callable[[], bool]) -> int:
    """Sends the lines of `metrics.jsonl` that were not sent yet; returns their number.

    Args:
      name: a key of `LOGGERS`.
      folder: folder of the run.
      ended: whether no more lines will come.
    """
    config = peek(folder / "config.json")
    config = config if isinstance(config, dict) else {}
    kwargs = ((config.get("log") or {}).get("to") or {}).get(name) or {}
    memory = folder / f"logger-{name}.json"
    stored = peek(memory)
    known = stored if isinstance(stored, dict) else {}
    identity, sent = str(known.get("id") or uuid.uuid4().hex), int(known.get("lines") or 0)
    before = sent
    _remember(memory, identity, sent)
    logger = LOGGERS[name](
        name=folder.name, id=identity, config=scrubbed(config, folder), folder=folder, **kwargs
    )
    try:
        for number, line in enumerate(_lines(folder / "metrics.jsonl", ended)):
            if number < sent:
                continue
            row = json.loads(line)
            numbers = {
                key: float(value)
                for key, value in row.items()
                if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
            }
            logger.log(int(row["step"]), numbers)
            sent = number + 1
            _remember(memory, identity, sent)
    finally:
        logger.finish()
    return sent - before


def _lines(path: pathlib.Path, ended: Callable[[], bool]) -> Iterator[bytes]:
    """Yields whole lines of a file as it grows."""
    rest = b""
    with path.open("rb") as file:
        while True:
            last = ended()  # asked before reading, so that nothing written before it is missed
            *lines, rest = (rest + file.read()).split(b"\n")
            yield from lines
            if last:
                return
            time.sleep(POLL_SECONDS)


def _remember(path: pathlib.Path, identity: str, lines: int) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"id": identity, "lines": lines}), "utf-8")


def _output(name: str, folder: pathlib.Path) -> pathlib.Path:
    return folder / f"logger-{name}.txt"


def _allowed(name: str) -> str:
    return re.sub(r"[^\w\-. /]", "_", name)


def main(argv: Sequence[str]) -> int:
    """Runs `python -m distill_jax.run.loggers [--follow] NAME FOLDER ...` and returns its code."""
    follow, args = "--follow" in argv, [arg for arg in argv if arg != "--follow"]
    try:
        if len(args) < 2:
            hint = f"python -m distill_jax.run.loggers {'|'.join(LOGGERS)} RUN ..."
            raise UserError("name a logger and runs", where="command line", hint=hint)
        name, folders = args[0], [pathlib.Path(arg) for arg in args[1:]]
        check_names([name], where="logger")
        check_installed([name], where="logger")
        for folder in folders:
            if not (folder / "metrics.jsonl").is_file():
                hint = "name the --workdir of runs"
                raise UserError("holds no metrics.jsonl", where=str(folder), hint=hint)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    stop = threading.Event()
    if follow:
        threading.Thread(target=_wait_for_end, args=(stop,), daemon=True).start()
    else:
        stop.set()
    for folder in folders:
        count = send(name, folder, ended=stop.is_set)
        print(f"{folder}: {count} lines to {name}")
    return 0


def _wait_for_end(stop: threading.Event) -> None:
    """Waits until the run closes this process's standard input, or ends."""
    sys.stdin.buffer.read()
    stop.set()
    timer = threading.Timer(DEADLINE_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
