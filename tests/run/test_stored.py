"""Damaged and hostile files: named, never read as something else, and never in the way for good."""

import functools
import json
import os
import pathlib
from typing import Any

import numpy as np
import pytest

from distill_jax.core.errors import CheckpointError, ConfigError, UserError
from distill_jax.report import folders
from distill_jax.run import alarms, workdir, writers
from distill_jax.run.train.result import format_result
from distill_jax.run.workdir import results
from distill_jax.trainer.io import files, paths, step_folder, teacher_cache

DAMAGE = {
    "missing": (None, "does not exist"),
    "a folder": ("folder", "is a folder"),
    "a pipe": ("pipe", "is not a regular file"),
    "empty": (b"", "is empty"),
    "not utf-8": (b'{"status": "\xff\xfe"}', "is not UTF-8: byte 0xff at position 12"),
    "cut off": (b'{"status": "do', "is not JSON"),
    "a list": (b"[]", "holds a list"),
    "null": (b"null", "holds null"),
    "a number": (b"3", "holds 3"),
    "nested too deeply": (b'{"a":' + b"[" * 100_000, "nested too deeply"),
    "a number of a million digits": (b'{"a": ' + b"9" * 10**6 + b"}", "is not JSON"),
}


def put(path: pathlib.Path, content: bytes | str | None) -> pathlib.Path:
    if content == "folder":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_object_is_named_with_what_is_wrong(tmp_path, kind):
    content, message = DAMAGE[kind]
    path = put(tmp_path / "x.json", content)
    with pytest.raises(files.DamagedFile) as error:
        files.read_json(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("value", ["null", "true", '"3"', "[3]", "{}"])
def test_a_value_of_another_type_is_damage(tmp_path, value):
    path = tmp_path / "x.json"
    path.write_text(f'{{"step": {value}}}')
    with pytest.raises(files.DamagedFile, match="'step' is"):
        files.read_json(path, shape={"step": int})
    path.write_text('{"step": 3}')
    assert files.read_json(path, shape={"step": int}) == {"step": 3}


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_reader_of_an_object_refuses_or_reports_damage(tmp_path, kind):
    content, message = DAMAGE[kind]
    step = tmp_path / "1"
    (step / "meta").mkdir(parents=True)
    (step / "meta" / "metadata").write_text("{}")
    put(step / "digest.json", content)
    with pytest.raises(CheckpointError):
        step_folder.verify(step)
    with pytest.raises(CheckpointError):
        step_folder.read_meta(step)
    notes: list[str] = []
    assert folders.read_json(put(tmp_path / "env.json", content), notes) == {}
    assert len(notes) == 1 and notes[0].startswith("env.json ")
    put(tmp_path / "result.json", content)
    said: list[str] = []
    assert workdir.read_result(tmp_path, log_line=said.append) is None
    assert len(said) == (kind != "missing") and all(message in line for line in said)


@pytest.mark.parametrize("lost", ["best", "metrics", "steps", "seed"])
def test_a_result_without_its_parts_is_made_again_with_a_warning(tmp_path, lost):
    whole = {"status": "done", "seed": 0, "steps": 3, "metrics": {}, "best": {}}
    (tmp_path / "result.json").write_text(json.dumps(whole))
    assert workdir.read_result(tmp_path) == whole
    (tmp_path / "result.json").write_text(json.dumps({**whole, lost: [1]}))
    said: list[str] = []
    assert workdir.read_result(tmp_path, log_line=said.append) is None
    assert f"{lost!r} is a list" in said[0] and "rebuilt" in said[0]


LINES = (
    b'{"step": 1, "train/loss": 1.0}\n'
    b'{"step": 2, "train/loss": "\xff"}\n'
    b'{"step": null}\n[]\n\n'
    b'{"step": 3, "train/loss": 3.0}\n'
    b'{"step": 9, "train/loss": 9.0}\n'
    b'{"step": 4, "tra'
)


FINISHED = {
    "status": "done",
    "seed": 0,
    "steps": 6,
    "classes": ["0", "1"],
    "metrics": {"test/nll": 0.5},
    "best": {"step": 3, "test/nll": 0.25},
    "chosen_by": "test/nll",
    "provenance": {"train": {"name": "toy", "origin": "", "n": 3, "sha256": "", "licence": ""}},
    "parameters": {"student": 610},
    "alarms": [{"step": 2, "rule": "spike", "metric": "train/loss", "message": "is high"}],
    "skipped": 1,
    "selection_lost": [{"step": 1, "metric": 0.99}],
    "compute": {
        "seconds": 0.1,
        "flops_per_step": 1e3,
        "flops_per_second": 1e9,
        "seconds_per_step": None,
        "floor_flops_per_step": 1e3,
        "floor_over_actual": 1.25,
        "shares": {"device": 1.0},
    },
}
ODD = (None, True, -1, 10**400, float("inf"), "x", [], [None], [1], {}, {"a": 1}, {"a": "x"})


def places(node, before=()):
    """Yields the path of every part of a JSON value."""
    yield before
    inner = node if isinstance(node, dict | list) else ()
    for key, value in inner.items() if isinstance(inner, dict) else enumerate(inner):
        yield from places(value, (*before, key))


def replaced(node, path, value):
    if not path:
        return value
    node = dict(node) if isinstance(node, dict) else list(node)
    node[path[0]] = replaced(node[path[0]], path[1:], value)
    return node


def test_a_whole_result_is_read(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(FINISHED))
    assert workdir.read_result(tmp_path, log_line=pytest.fail) == FINISHED
    notes: list[str] = []
    folders.read_json(tmp_path / "result.json", notes)
    assert notes == []


@pytest.mark.parametrize("path", list(places(FINISHED)), ids=str)
def test_a_result_with_any_part_of_another_type_is_read_or_made_again(tmp_path, path, monkeypatch):
    """What `read_result` returns can be printed, whatever a file holds in one place."""
    for odd in ODD:
        content = json.dumps(replaced(FINISHED, path, odd)).encode()
        read = functools.partial(files.parse_json, content)
        monkeypatch.setattr(results, "read_json", read)
        said: list[str] = []
        result = workdir.read_result(tmp_path, log_line=said.append)
        assert result is not None or said or path in ((), ("status",))
        if result is not None:
            assert format_result(result)


@pytest.mark.parametrize(
    ("value", "wanted", "what"),
    [
        ({"a": 1}, {"a": int}, ""),
        ({"a": True}, {"a": int}, "'a' is True"),
        ({"a": True}, {"a": bool}, ""),
        ({}, {"a": int}, "has no 'a'"),
        ({}, {"a?": int}, ""),
        ({"a": "x"}, {"a?": int}, "'a' is a string"),
        ({"a": 10**400}, {"a": files.NUMBER}, "'a' is 1000"),
        ({"a": {"b": None}}, {"a": files.NUMBERS}, "'a.b' is null"),
        ({"a": [1, 2.5, []]}, {"a": [files.NUMBER]}, "'a[2]' is a list"),
        ({"a": [{"b": 1}, {}]}, {"a": [{"b": int}]}, "has no 'a[1].b'"),
        ({"a": 3}, {"a": [int]}, "'a' is 3"),
        ({"a": 1, "b": "x"}, {"b": str, "*": int}, ""),
        ({"free": "x"}, {"a?": int}, ""),
    ],
)
def test_a_value_is_of_a_shape_or_the_first_difference_is_named(value, wanted, what):
    found = files.mismatch(value, wanted)
    assert found.startswith(what) and bool(found) == bool(what)


def test_damaged_lines_are_set_aside_and_a_run_goes_on(tmp_path):
    path, said = tmp_path / "metrics.jsonl", []
    path.write_bytes(LINES)
    writer = writers.JsonlWriter(path, resume_step=3, log_line=said.append)
    writer.write(4, {"train/loss": 4.0})
    writer.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["train/loss"]) for row in rows] == [(1, 1.0), (3, 3.0), (4, 4.0)]
    aside = (tmp_path / "metrics.jsonl.damaged").read_bytes()
    assert aside == b"".join(LINES.splitlines(keepends=True)[1:5])
    assert len(said) == 1 and "4 lines of metrics.jsonl" in said[0]


def test_damaged_alarms_are_set_aside_and_the_others_count(tmp_path):
    row = {"step": 1, "rule": "spike", "metric": "train/loss", "message": "rose"}
    (tmp_path / "metrics.jsonl").write_bytes(LINES)
    data = json.dumps(row).encode() + b'\n{"step": \xff}\n{"step": 1, "rule": "x"}\n'
    (tmp_path / "alarms.jsonl").write_bytes(data)
    said: list[str] = []
    found = alarms.Alarms(tmp_path, (), resume_step=3, log_line=said.append).raised
    assert [alarm._asdict() for alarm in found] == [row]
    assert len(said) == 1 and "1 line of alarms.jsonl" in said[0]
    assert folders.read_alarms(tmp_path) == ["alarm (spike) at step 1: train/loss rose"]


def test_the_report_counts_damaged_lines(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(LINES)
    run = folders.Run.read(tmp_path, label="x")
    assert [row["step"] for row in run.records] == [1, 3, 9]
    assert "damaged lines of metrics.jsonl, left out: 5" in run.notes


FIELDS = {"logits": np.zeros((4, 3), np.float32)}


def chunk(folder, **changes):
    store = teacher_cache.Store(folder, FIELDS, n=8, chunk=4)
    path = store.path(0, 0)
    path.mkdir(parents=True)
    for name, content in changes.items():
        file = path / f"{name}.npy"
        file.write_bytes(content) if isinstance(content, bytes) else np.save(file, content)
    step_folder.seal(path)
    return store


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        np.zeros((4, 2), np.float32),
        np.zeros((3, 3), np.float32),
        np.zeros((4, 3), np.float64),
    ],
)
def test_a_chunk_of_a_teacher_cache_that_does_not_fit_is_refused(tmp_path, content):
    with pytest.raises(CheckpointError, match="delete this folder") as error:
        chunk(tmp_path, logits=content).read(0, np.arange(4))
    assert str(tmp_path / "00000-00000") in str(error.value)
    whole = chunk(tmp_path / "whole", logits=np.ones((4, 3), np.float32))
    np.testing.assert_array_equal(whole.read(0, np.arange(4))["logits"], np.ones((4, 3)))


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_teacher_cache_is_refused(tmp_path, kind):
    content, message = DAMAGE[kind]
    put(tmp_path / "key.json", content)
    if kind == "missing":
        assert teacher_cache.open_store(tmp_path, {"seed": 1}, FIELDS, 8).chunk > 1
        return
    with pytest.raises(UserError, match=r"key\.json") as error:
        teacher_cache.open_store(tmp_path, {"seed": 1}, FIELDS, 8)
    assert message in str(error.value) and "delete this folder" in str(error.value)


@pytest.mark.parametrize(
    "place, message",
    [
        ("file", "is a file"),
        ("file/below", "is a file"),
        ("dangling", "leads nowhere"),
        ("dangling/below", "leads nowhere"),
        ("loop", "leads nowhere"),
        ("n" * 300, "too long"),
        (f"new/{'n' * 300}", "too long"),
        ("/proc/run", "cannot be made"),
        ("/dev/null", "is a file"),
    ],
)
def test_a_folder_that_cannot_be_made_is_refused_at_the_door(tmp_path, place, message):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as error:
        paths.check_folder(tmp_path / place, where="--workdir")
    assert str(error.value).startswith("--workdir: ")
    paths.check_folder(tmp_path / "new" / "folder", where="--workdir")
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_where_a_file_belongs_and_the_reverse_are_refused(tmp_path):
    (tmp_path / "result.json").mkdir()
    (tmp_path / "checkpoints").touch()
    paths.check_places(tmp_path, files=["metrics.jsonl"], folders=["tensorboard"])
    with pytest.raises(UserError, match=r"result\.json: is a folder, where a file is written"):
        paths.check_places(tmp_path, files=["result.json"])
    with pytest.raises(UserError, match="checkpoints: is a file, where a folder is written"):
        paths.check_places(tmp_path, folders=["checkpoints"])


def test_a_config_that_is_damaged_is_refused_with_where_else_it_is(tmp_path):
    from distill_jax.run import config as config_lib

    (tmp_path / "config.json").write_bytes(b'{"seed": \xff}')
    (tmp_path / "result.json").write_text('{"status": "done"}')
    with pytest.raises(UserError, match="is not UTF-8") as error:
        workdir.check_config(config_lib.base(), tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)
    with pytest.raises(ConfigError, match="nested too deeply"):
        config_lib.from_json('{"a":' * 100_000)


def test_tensorboard_that_cannot_be_written_is_said_once_and_delays_nothing(tmp_path):
    (tmp_path / "tensorboard").touch()
    said: list[str] = []
    writer = writers.make_writer(tmp_path, tensorboard=True, log_line=said.append)
    for step in (1, 2, 3):
        writer.write(step, {"train/loss": 1.0})
    writer.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert len(said) == 1 and "no TensorBoard events" in said[0] and str(tmp_path) in said[0]


def test_tensorboard_on_a_disk_that_fills_is_said_once_and_blocks_nothing(tmp_path):
    said: list[str] = []
    writer = writers.make_writer(tmp_path, tensorboard=True, log_line=said.append)
    writer.write(0, {"train/loss": 1.0})
    board: Any = writer._writers[1]

    def full(event):
        raise OSError(28, "No space left on device")

    board._file.write_event = full
    for step in range(1, 40):  # more than a queue holds
        writer.write(step, {"train/loss": 1.0})
    writer.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 40
    assert len(said) == 1 and "No space left" in said[0]
