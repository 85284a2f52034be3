"""The accelerator benchmark keeps to its time and loses nothing when it is cut off."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


workers = load("_accelerator_workers")


def start(tmp_path, code):
    command = (sys.executable, "-c", code)
    return workers.Worker(command, env=dict(os.environ), log=tmp_path / "log")


def test_time_that_a_part_leaves_goes_to_later_ones():
    assert workers.allowance(600.0, [2.0, 1.0, 1.0]) == 300.0
    assert workers.allowance(500.0, [1.0, 1.0]) == 250.0  # the first took 100 of its 300
    assert workers.allowance(-3.0, [1.0]) == 0.0


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import time; time.sleep(60)", "time budget"),
        ("print('{}'); raise ValueError('too large')", "ValueError: too large"),
    ],
)
def test_a_worker_that_fails_says_why_in_time(tmp_path, code, reason):
    worker, began = start(tmp_path, code), time.monotonic()
    with pytest.raises(workers.NotReady, match=reason):
        for _ in range(2):
            worker.answer(began + (0.3 if "sleep" in code else 20.0))
    worker.end()
    assert time.monotonic() - began < 20 and worker.process.returncode is not None


def test_a_write_that_fails_leaves_the_file(tmp_path):
    path = tmp_path / "result.json"
    workers.write(path, {"figure": 1})
    with pytest.raises(TypeError):
        workers.write(path, {"figure": object()})
    assert json.loads(path.read_text()) == {"figure": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers end by prctl")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_cut_off_keeps_results_and_ends_workers(tmp_path, number):
    # A worker that never gets ready stands for one that compiles.
    code = f"""
import os, sys, time
sys.path.insert(0, {str(FOLDER)!r})
import accelerator, _accelerator_workers as workers
serve = (
    f"import sys, os, time; sys.path.insert(0, {str(FOLDER)!r});"
    f"import _accelerator_workers as w; w.die_with_parent({{os.getpid()}});"
)
ready = 'w.serve(dict(loop=lambda n: None), dict, batch=1)'
def start(self, variant):
    body = ready if self.name == "mae" else "print(os.getpid(), file=sys.stderr); time.sleep(99)"
    log = accelerator.Path({str(tmp_path)!r}, f"{{self.name}}-{{variant}}.log")
    self.workers[variant] = workers.Worker(
        (sys.executable, "-c", serve + body), env=os.environ, log=log)
accelerator.Part.start = start
sys.argv[1:] = ["--tiny", "--part=mae,dino", "--out={tmp_path}/result.json"]
accelerator.main()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    log, ends = tmp_path / "dino-ours.log", time.monotonic() + 20
    while not (log.exists() and log.read_text().strip()):
        assert process.poll() is None and time.monotonic() < ends
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(10) != 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["parts"]["mae"]["finished"]
    assert result["parts"]["mae"]["variants"]["ours"]["rounds"] == 2
    assert result["ended"] == (
        "stopped: SystemExit 143" if number == signal.SIGTERM else "unfinished"
    )
    worker = pathlib.Path("/proc", log.read_text().strip())
    while worker.exists() and worker.joinpath("stat").read_text().split()[2] != "Z":
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_an_unknown_chip_has_no_peak(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    accelerator = load("accelerator")
    assert accelerator.peak_flops("NVIDIA H200") == accelerator.PEAKS["H200"]
    assert accelerator.peak_flops("cpu") is None
