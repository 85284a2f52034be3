"""Metrics on disk survive a restart without duplicates; the console shows life."""

import io
import json
import pathlib
import subprocess
import sys

import pytest

from distill_jax.run import writers


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_is_on_disk_after_every_line(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = writers.JsonlWriter(path)
    writer.write(1, {"train/loss": 0.5})
    assert rows(path) == [{"step": 1, "train/loss": 0.5}]
    writer.write(2, {"train/loss": float("nan"), "epoch": 3, "note": "x"})
    assert rows(path)[1] == {"step": 2, "train/loss": None, "epoch": 3, "note": "x"}
    writer.close()


def test_a_resumed_run_repeats_no_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = writers.JsonlWriter(path)
    for step in (1, 2, 3, 4):
        writer.write(step, {"loss": step})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    writer = writers.JsonlWriter(path, resume_step=2)
    assert [row["step"] for row in rows(path)] == [1, 2]
    writer.write(3, {"loss": 30})
    writer.close()
    assert [(row["step"], row["loss"]) for row in rows(path)] == [(1, 1), (2, 2), (3, 30)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_without_its_end_is_not_continued(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    writer = writers.JsonlWriter(path, resume_step=2)
    writer.write(3, {})
    writer.close()
    assert [row["step"] for row in rows(path)] == [1, 3]


def test_an_intact_file_is_not_rewritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    before = path.stat().st_ino
    writers.JsonlWriter(path, resume_step=1).close()
    assert path.stat().st_ino == before


def test_a_failed_replacement_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(writers.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        writers.JsonlWriter(path, resume_step=1)
    assert [row["step"] for row in rows(path)] == [1, 2]


def test_multi_writer_feeds_all_and_closes_all():
    events = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def write(self, step, metrics):
            events.append((self.name, step, dict(metrics)))

        def close(self):
            events.append((self.name, "closed"))

    writer = writers.MultiWriter([Fake("a"), Fake("b")])
    writer.write(3, {"loss": 1.0})
    writer.close()
    assert events[:2] == [("a", 3, {"loss": 1.0}), ("b", 3, {"loss": 1.0})]
    assert sorted(events[2:]) == [("a", "closed"), ("b", "closed")]


def test_only_the_main_process_writes(tmp_path):
    writer = writers.make_writer(tmp_path / "run", is_main=False)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_events_are_written_without_tensorflow(tmp_path):
    script = """
import sys
from distill_jax.run import writers
assert "tensorboardX" not in sys.modules
writer = writers.make_writer(sys.argv[1], tensorboard=True)
writer.write(1, {"train/loss": 0.5, "note": "x"})
writer.close()
assert "tensorboardX" in sys.modules
assert not [m for m in sys.modules if m.split(".")[0] in ("tensorflow", "jax")]
"""
    root = pathlib.Path(writers.__file__).parents[2]
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=root)
    events = list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert len(events) == 1
    assert b"train/loss" in events[0].read_bytes()
    assert rows(tmp_path / "metrics.jsonl")[0]["train/loss"] == 0.5


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_progress_prints_a_line_now_and_then_into_a_log_file():
    out, clock = io.StringIO(), Clock()
    progress = writers.Progress(
        1000, initial=100, description="kd", every_seconds=30, file=out, clock=clock
    )
    for step in range(101, 401):  # eight steps a second
        clock.now += 0.125
        progress.update(step, loss=0.25 if step == 150 else None)
    assert out.getvalue().splitlines() == [
        "kd: step 340 of 1000 (34.0%) | 8 steps/s | 0:30 passed, 1:22 left | loss 0.25"
    ]
    progress.close()
    progress.close()
    assert out.getvalue().splitlines()[1:] == [
        "kd: step 400 of 1000 (40.0%) | 8 steps/s | 0:38 passed, 1:15 left | loss 0.25"
    ]
    assert "\r" not in out.getvalue()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_draws_a_bar_on_a_terminal():
    out = Terminal()
    progress = writers.Progress(10, initial=4, description="kd", file=out)
    progress.update(10, loss=0.125)
    progress.close()
    assert "\r" in out.getvalue()
    assert "10/10" in out.getvalue() and "loss 0.125" in out.getvalue()


def test_progress_of_other_processes_is_silent():
    for out in (io.StringIO(), Terminal()):
        progress = writers.Progress(10, file=out, is_main=False, every_seconds=0)
        progress.update(5, loss=1.0)
        progress.close()
        assert out.getvalue() == ""
