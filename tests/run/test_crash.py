"""Errors that nobody foresaw end in one line, with a trace in a file and what is left whole."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading

import pytest

from distill_jax import main, report
from distill_jax.core.errors import NonFiniteError, UserError
from distill_jax.run import console, crash, describe, study, watch, workdir
from distill_jax.run.build import data
from distill_jax.run.train import evaluation, loop
from distill_jax.run.train import result as result_lib
from distill_jax.trainer.io import checkpoint, step_folder
from tests.run.test_survival import make_state

CONFIG = "--config=configs/distill/supervised.py:smoke"
STUDY = "--config=configs/studies/demo.py:smoke"


class Surprise(Exception):
    """Raised by no code of the program."""


def fail(*_, **__):
    raise Surprise("first line\nsecond line")


def traces(folder):
    return (folder / "crash.txt").read_text()


def one_line(capsys) -> str:
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize(
    "where, mode, config, doing, intact",
    [
        ((data, "open_dataset"), "train", CONFIG, "reading data", "starts from the beginning"),
        ((loop, "train"), "train", CONFIG, "building the experiment", "from the beginning"),
        ((evaluation, "evaluate_run"), "eval", CONFIG, "evaluating", "the run is unchanged"),
        ((describe, "describe"), "describe", CONFIG, "describing the config", "nothing was"),
        ((study, "run_study"), "study", STUDY, "running the study", "0 runs are finished"),
    ],
)
def test_every_mode_ends_in_one_line(
    where, mode, config, doing, intact, monkeypatch, capsys, tmp_path, temporary
):
    monkeypatch.setattr(*where, fail)
    workdir = tmp_path / "run"
    if mode == "eval":
        workdir.mkdir()
    code = main.main(["distill-jax", config, f"--workdir={workdir}", f"--mode={mode}"])
    assert code == crash.UNEXPECTED
    line = one_line(capsys)
    assert line.startswith(f"error: unexpected Surprise while {doing}: first line; ")
    assert intact in line and "second line" not in line
    folder = temporary if mode == "describe" else workdir
    assert f"the traceback is in {folder / 'crash.txt'}" in line
    assert "in fail" in traces(folder) and "second line" in traces(folder)
    assert (workdir / "crash.txt").exists() == (mode != "describe")


def test_a_folder_that_cannot_be_written_gives_way_to_the_temporary_one(
    monkeypatch, capsys, tmp_path, temporary
):
    def gone(*_, **__):
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").touch()
        fail()

    monkeypatch.setattr(loop, "train", gone)
    assert main.main(["distill-jax", CONFIG, f"--workdir={tmp_path / 'run'}"]) == 1
    assert f"the traceback is in {temporary / 'crash.txt'}" in one_line(capsys)
    assert "Surprise" in traces(temporary)


def test_no_place_for_the_trace_is_said(monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/proc/nowhere")
    assert crash.report(Surprise("x"), folder=pathlib.Path("/proc/nowhere")) == 1
    assert one_line(capsys).endswith("x; the traceback could not be written anywhere")


def test_a_second_error_is_added_to_the_first(tmp_path, capsys):
    for text in ("one", "two"):
        crash.report(Surprise(text), folder=tmp_path)
    assert traces(tmp_path).count("Surprise") >= 4
    assert "one" in traces(tmp_path) and "two" in traces(tmp_path)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_report_that_fails_leaves_the_result(monkeypatch, capsys, tmp_path):
    def train(config, workdir, **_):
        whole = {"status": "done", "seed": 0, "steps": 3, "metrics": {}, "best": {}}
        (workdir / "result.json").write_text(json.dumps(whole))
        return {}

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(result_lib, "format_result", lambda _: "")
    monkeypatch.setattr(report, "write_run_report", fail)
    assert main.main(["distill-jax", CONFIG, f"--workdir={tmp_path / 'run'}"]) == 1
    line = one_line(capsys)
    assert "while writing the report" in line and "training is finished" in line


@pytest.mark.parametrize("damaged, whole", [([], 2), ([2], 1), ([1, 2], None)])
def test_only_a_checkpoint_that_is_whole_is_promised(tmp_path, damaged, whole):
    for step in (1, 2):
        folder = tmp_path / "checkpoints" / str(step)
        (folder / "meta").mkdir(parents=True)
        (folder / step_folder.META).write_text(f'{{"step": {step}}}')
        (folder / "data").write_text("x")
        step_folder.seal(folder)
        if step in damaged:
            (folder / "data").write_text("y")
    found = workdir.intact(tmp_path)
    expected = f"the checkpoint of step {whole} is complete" if whole else "no complete checkpoint"
    assert expected in found


@pytest.mark.parametrize(
    "phase, kind, doing",
    [
        ("compile", "", "compiling the step, after step 7 of 9"),
        ("device", "", "training, after step 7 of 9"),
        ("evaluation", "evaluation of held_out", "evaluating held_out, after step 7 of 9"),
        ("checkpoint", "saving", "saving, after step 7 of 9"),
        ("data", "", "reading a batch, after step 7 of 9"),
    ],
)
def test_an_error_in_the_loop_keeps_its_phase_and_step(tmp_path, phase, kind, doing):
    with pytest.raises(Surprise), watch.Watch([tmp_path], total=9) as watched:
        watched.step = 7
        with pytest.raises(NonFiniteError), watched.during("checkpoint", "saving"):
            raise NonFiniteError("one that was handled")
        with watched.during("other", "the log"), watched.during(phase, kind):
            fail()
    assert crash.done_so_far() == doing


def test_an_error_in_a_thread_is_one_line_and_the_code_says_so(monkeypatch, capsys, tmp_path):
    def train(config, workdir, **_):
        thread = threading.Thread(target=fail, name="feeder")
        thread.start()
        thread.join()
        return {}

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(result_lib, "format_result", lambda _: "")
    monkeypatch.setattr(report, "write_run_report", lambda _: "")
    before = threading.excepthook
    assert main.main(["distill-jax", CONFIG, f"--workdir={tmp_path / 'run'}"]) == 1
    line = one_line(capsys)
    assert "unexpected Surprise in thread feeder while" in line and "the run continues" in line
    assert "in fail" in traces(tmp_path / "run")
    assert threading.excepthook is before
    monkeypatch.setattr(loop, "train", lambda *_, **__: {})
    assert main.main(["distill-jax", CONFIG, f"--workdir={tmp_path / 'run'}"]) == 0


@pytest.mark.parametrize("presses", [0, 1, 2])
def test_an_interrupt_of_imports_waits_for_their_end(presses):
    """An extension module that is interrupted raises `ImportError`."""
    passed = 0
    with contextlib.suppress(KeyboardInterrupt), console.deferring_interrupts():
        for _ in range(presses):
            signal.raise_signal(signal.SIGINT)
            passed += 1
        passed = "end"
    assert passed == (1 if presses == 2 else "end")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt), console.deferring_interrupts():
        signal.raise_signal(signal.SIGINT)


def test_a_second_interrupt_is_one_line(monkeypatch, capsys, tmp_path):
    def stop(*_, **__):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop, "train", stop)
    assert main.main(["distill-jax", CONFIG, f"--workdir={tmp_path / 'run'}"]) == 130
    assert one_line(capsys).startswith("interrupted while building the experiment; ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", sorted(main.SURROUNDINGS))
def test_what_the_machine_refuses_is_no_fault_of_the_program(number, monkeypatch, capsys, tmp_path):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr(loop, "train", refuse)
    assert main.main(["distill-jax", CONFIG, f"--workdir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: some/file: ") and "from the beginning" in error
    assert not list((tmp_path / "run").glob("crash*"))


class Broken:
    """A stream on a pipe whose reader is gone."""

    def __init__(self, number: int):
        self.number = number

    def write(self, text: str):
        os.write(self.number, text.encode())

    flush = isatty = lambda self: os.write(self.number, b"x") and None

    def fileno(self) -> int:
        return self.number


def test_a_stream_without_a_reader_swallows_what_is_written():
    reader, writer = os.pipe()
    os.close(reader)
    stream = console.Tolerant(Broken(writer))
    print("x" * 100_000, file=stream, flush=True)
    print("again", file=stream, flush=True)
    assert os.path.samestat(os.fstat(writer), os.stat(os.devnull))
    os.close(writer)


RUN = """
import sys
from distill_jax import main
{body}
sys.argv = ["distill-jax"]
main.run()
"""


def program(body: str, **kwargs) -> subprocess.CompletedProcess:
    code = RUN.format(body=body)
    return subprocess.run([sys.executable, "-c", code], text=True, timeout=120, **kwargs)


PRINT = """
def work(argv):
    print("é\\udcff" * 100_000)
    print("to stderr", file=sys.stderr)
    with open({path!r}, "w") as file:
        file.write("written")
    return 0
main.main = work
"""


@pytest.mark.parametrize(
    "how", ["2>&-", ">&-", ">&- 2>&- <&-", "| true", "2>/dev/full", ">/dev/full"]
)
def test_closed_full_and_broken_consoles_do_not_end_a_run(tmp_path, how):
    code = RUN.format(body=PRINT.format(path=str(tmp_path / "file")))
    (tmp_path / "program.py").write_text(code)
    shell = f"set -o pipefail; {sys.executable} {tmp_path / 'program.py'} {how}"
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    found = subprocess.run(["bash", "-c", shell], env=env, timeout=60, check=False)
    assert found.returncode == 0
    assert (tmp_path / "file").read_text() == "written"  # and nothing that was printed


HANG = """
import pathlib, threading, time
from distill_jax.trainer.io import checkpoint
def work(argv):
    import orbax.checkpoint as ocp
    import jax.numpy as jnp
    saver = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
    args = ocp.args.Composite(x=ocp.args.PyTreeSave({{"a": jnp.ones(3)}}))
    try:
        saver.save(pathlib.Path({folder!r}) / "1", args=args)
    except OSError:
        pass
    assert [t for t in threading.enumerate() if not t.daemon][1:]  # as they wait in Orbax
    threading.Thread(target=time.sleep, args=(300,)).start()  # as one that compiles
    return 2
main.main = work
"""


def test_a_failed_save_ends_the_process_at_once(tmp_path):
    (tmp_path / "file").touch()
    found = program(HANG.format(folder=str(tmp_path / "file")), capture_output=True)
    assert found.returncode == 2, found.stderr  # within the timeout; its threads wait 300 s


def test_a_save_that_cannot_make_its_folder_is_refused_before_threads_start():
    before = threading.enumerate()
    checkpointer = checkpoint.Checkpointer(pathlib.Path("/proc/run/checkpoints"))
    with pytest.raises(UserError, match="cannot be made") as error:
        checkpointer.save(make_state(1), {}, metric=None)
    assert "earlier steps are untouched" in str(error.value)
    checkpointer.close()
    assert threading.enumerate() == before
