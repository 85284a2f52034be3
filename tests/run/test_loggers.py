"""Tracking services: they get the metrics of a run, and cannot stop, change or delay it."""

import json
import pathlib
import signal
import struct
import subprocess
import sys
import textwrap
import time

import pytest

from distill_jax.core.errors import UserError
from distill_jax.run import loggers, writers

STUB = """
import json, os, pathlib, time
BEHAVIOUR = {behaviour!r}
def init(*, name, id, config, dir, project, resume):
    if BEHAVIOUR == "fails":
        raise ConnectionError("no such host")
    return Run(pathlib.Path(dir))
class Run:
    def __init__(self, folder):
        self.folder = folder
        (folder / "stub-started").touch()
    def log(self, metrics, step):
        with open(self.folder / "stub.jsonl", "a") as file:
            file.write(json.dumps([step, metrics]) + "\\n")
        if BEHAVIOUR == "hangs":
            time.sleep(1000)
    def finish(self):
        (self.folder / "stub-finished").touch()
"""


@pytest.fixture
def service(tmp_path, monkeypatch):
    """Puts a stand-in for wandb on the path, of this process and of its children."""

    def install(behaviour=""):
        home = tmp_path / "packages"
        home.mkdir(exist_ok=True)
        (home / "wandb.py").write_text(
            textwrap.dedent(STUB).replace("{behaviour!r}", repr(behaviour))
        )
        monkeypatch.setenv("PYTHONPATH", str(home))
        monkeypatch.syspath_prepend(str(home))

    return install


def begin(folder, lines, **kwargs):
    return writers.make_writer(folder, loggers=("wandb",), log_line=lines.append, **kwargs)


def sent(folder):
    path = folder / "stub.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(path, seconds=30.0):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} does not appear"
        time.sleep(0.05)


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(r.pop("step"), r) for r in map(json.loads, lines)]


def test_a_service_gets_every_line_once_over_a_resume(tmp_path, service, monkeypatch):
    monkeypatch.setattr(loggers, "LINGER_SECONDS", 60.0)
    service()
    said = []
    writer = begin(tmp_path / "run", said)
    writer.write(1, {"train/loss": 2.0, "held_out/accuracy": float("nan")})
    writer.write(2, {"train/loss": 1.0})
    writer.close()
    assert sent(tmp_path / "run") == [[1, {"train/loss": 2.0}], [2, {"train/loss": 1.0}]]
    (tmp_path / "run/stub-finished").unlink()
    writer = begin(tmp_path / "run", said, resume_step=1)  # step 2 comes again, equal
    writer.write(2, {"train/loss": 1.0})
    writer.write(3, {"train/loss": 0.5})
    writer.close()
    assert [step for step, _ in sent(tmp_path / "run")] == [1, 2, 3]
    assert (tmp_path / "run/stub-finished").exists()
    assert said == []


@pytest.mark.parametrize("behaviour", ["fails", "hangs", "killed"])
def test_a_broken_service_does_not_touch_the_run(tmp_path, service, monkeypatch, behaviour):
    monkeypatch.setattr(loggers, "LINGER_SECONDS", 0.3)
    service(behaviour)
    said, folder = [], tmp_path / "run"
    writer = begin(folder, said)
    process = writer._writers[-1]._process
    started = time.perf_counter()
    for step in range(50):
        writer.write(step, {"train/loss": 1.0 / (step + 1)})
    assert time.perf_counter() - started < 2
    if behaviour == "killed":
        process.send_signal(signal.SIGKILL)
    if behaviour == "hangs":
        wait_for(folder / "stub.jsonl")
    else:
        process.wait(60)
    writer.write(50, {"train/loss": 0.0})
    writer.close()
    assert [step for step, _ in rows(folder)] == list(range(51))
    assert len(said) == 1
    if behaviour == "hangs":
        assert "in the background" in said[0]
        process.send_signal(signal.SIGKILL)
    else:
        assert f"python -m distill_jax.run.loggers wandb {folder}" in said[0]


def test_what_was_not_sent_is_sent_later(tmp_path, service, capsys, monkeypatch):
    service()
    folder = tmp_path / "run"
    writer = writers.make_writer(folder)
    for step in (1, 2):
        writer.write(step, {"loss": float(step)})
    writer.close()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    for expected in (2, 0):
        assert loggers.main(["wandb", str(folder)]) == 0
        assert f"{expected} lines" in capsys.readouterr().out
    assert sent(folder) == [[1, {"loss": 1.0}], [2, {"loss": 2.0}]]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "name a logger and runs"),
        (["wandd", "."], "did you mean 'wandb'"),
        (["wandb", "nowhere"], "holds no metrics.jsonl"),
    ],
)
def test_wrong_commands_are_refused(service, capsys, args, said):
    service()
    assert loggers.main(args) == 2
    assert said in capsys.readouterr().err


def test_a_missing_package_is_named_before_the_run(monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"log\.to\.mlflow: mlflow is not installed"):
        loggers.check_installed(["mlflow"], where="log.to")


def wandb_records(path):
    """Yields the records of an offline file: LevelDB's log format after a header of 7 bytes."""
    data, at, record = path.read_bytes(), 7, b""
    while len(data) - at > 7:
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def read_wandb(folder):
    protocol = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    (path,) = pathlib.Path(folder).glob("wandb/offline-run-*/run-*.wandb")
    found = {}
    for data in wandb_records(path):
        record = protocol.Record()
        record.ParseFromString(data)
        items = record.history.item
        values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
        if values:
            step = values.get("_step", record.history.step.num)
            found.setdefault(step, {}).update(values)
    return found


def read_mlflow(folder):
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("distill_jax").experiment_id])
    found = {}
    for name in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, name):
            found.setdefault(point.step, {})[name] = point.value
    return found


def read_trackio(folder):
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    (run,) = storage.get_runs("distill_jax")
    found = {}
    for row in storage.get_logs("distill_jax", run):
        found.setdefault(row["step"], {}).update(row)
    return found


@pytest.mark.parametrize(
    ("name", "kwargs", "read"),
    [
        ("wandb", {"mode": "offline"}, read_wandb),
        ("mlflow", {"uri": "sqlite:///{folder}/mlflow.db"}, read_mlflow),
        ("trackio", {}, read_trackio),
    ],
)
@pytest.mark.slow
def test_services_hold_the_values_of_metrics_jsonl(tmp_path, monkeypatch, name, kwargs, read):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip(name)
    folder = tmp_path / "run"
    writer = writers.make_writer(folder)
    for step in (1, 5, 9):
        writer.write(step, {"train/loss": 1 / step, "held_out/accuracy": 0.1 * step})
    writer.close()
    kwargs = {key: value.format(folder=tmp_path) for key, value in kwargs.items()}
    config = {"seed": 3, "optim": {"lr": 0.1}, "log": {"to": {name: kwargs}}}
    (folder / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "distill_jax.run.loggers", name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"3 lines to {name}" in done.stdout
    found = read(tmp_path if name == "mlflow" else folder)
    for step, metrics in rows(folder):
        assert {key: found[step][key] for key in metrics} == pytest.approx(metrics, rel=1e-12)
