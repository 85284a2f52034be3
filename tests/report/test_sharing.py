"""Files that are handed on name no path, host or user of the machine that made them."""

import json
import pathlib
import socket
import sys

import numpy as np
import pytest

from distill_jax import report
from distill_jax.core.errors import NonFiniteError
from distill_jax.report.sharing import scrubbed
from distill_jax.run import build, watch
from distill_jax.run import config as config_lib
from distill_jax.run.train import evaluation, loop


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/data/bob/secret/x.npz", "x.npz"),
        ("/data/bob/my secret/x.npz", "x.npz"),
        ("/w/study/kd/seed0", "."),
        ("/w/study/kd/seed0/result.json", "./result.json"),
        ("/w/study/teacher/seed0#student", "teacher/seed0#student"),
        ("/w/other/teacher/seed0#student/head", "teacher/seed0#student/head"),
        ("/w/study/kd/seed0: loss is nan at step 3", ".: loss is nan at step 3"),
        ("cannot read '/data/bob/x.npz' (5)", "cannot read 'x.npz' (5)"),
        (
            "/opt/bob/main.py --config=/w/c.py --config.a=b/c",
            "main.py --config=c.py --config.a=b/c",
        ),
        (str(pathlib.Path.home()), "~"),
        (str(pathlib.Path.cwd() / "runs/teacher"), "runs/teacher"),
        # What looks like a path and is none.
        ("held_out/accuracy", "held_out/accuracy"),
        ("https://example.org/a/b.npz", "https://example.org/a/b.npz"),
        ("/(kernel|embedding)$", "/(kernel|embedding)$"),
        ("/Dense_0/bias$", "/Dense_0/bias$"),
        ("student/Dense_0/kernel", "student/Dense_0/kernel"),
        ("3 and/or 4 steps/s, 5 / 6", "3 and/or 4 steps/s, 5 / 6"),
        ("../data/x", "../data/x"),
    ],
)
def test_paths_are_shown_relative_or_by_name(text, shown):
    folder = pathlib.Path("/w/study/kd/seed0")
    assert scrubbed(text, folder) == shown
    assert scrubbed({"a": [text, 1.5, None]}, folder) == {"a": [shown, 1.5, None]}


PRIVATE = ("config.json", "checkpoints", "heartbeat.json", "stall.txt")
"""Files that a run needs to go on, or that say where it runs."""


def handed_on(workdir):
    files = [path for path in workdir.rglob("*") if path.is_file()]
    return [p for p in files if not {*p.relative_to(workdir).parts, p.name} & {*PRIVATE}]


def test_a_run_names_neither_its_place_nor_its_host(tmp_path, monkeypatch):
    """With data and a teacher by absolute path, after a stall, with a command line of paths."""
    marker, host = "SecretPlace", "host-7f3a"
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    place = tmp_path / marker / "deep er"
    place.mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", [str(place / "main.py"), f"--workdir={place / 'kd'}"])
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (48, 4, 4, 1), np.uint8)
    labels = np.arange(48) % 3
    path = place / "own.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images[:24], y_test=labels[:24])
    config = config_lib.base()
    config.data.name, config.data.kwargs = "npz_file", {"path": str(path)}
    config.data.train_transforms = config.data.eval_transforms = ("normalize",)
    config.data.transform_kwargs = {"normalize": {"mean": (0.5,), "std": (0.25,)}}
    config.objective.name = "supervised"
    config.roles.student = config_lib.role("mlp", hidden=(4,))
    config.evaluators = {"classification": {}}
    config.batch_size, config.total, config.log.every_steps = 16, 2, 1
    config.log.tensorboard = True
    loop.train(config, place / "teacher", log_line=lambda line: None)
    config.objective.name = "kd"
    config.roles.teacher = config_lib.role("mlp", hidden=(4,))
    config.roles.teacher.update(init=str(place / "teacher"), frozen=True)
    workdir, feed = place / "kd", build.Feed.__call__

    def stalled(self, step, variant="inner"):
        if step == 1:
            current = watch._current
            assert current is not None
            current._patience, current._told = 1e-9, None
            current.check()
        return feed(self, step, variant)

    with monkeypatch.context() as patch:
        patch.setattr(build.Feed, "__call__", stalled)
        loop.train(config, workdir, log_line=lambda line: None)
    evaluation.evaluate_run(config, workdir)
    report.write_run_report(workdir)
    files = {path.name: path for path in handed_on(workdir)}
    assert {"report.html", "result.json", "env.json", "eval.json", "alarms.jsonl"} <= set(files)
    for path in files.values():
        assert marker not in path.name and host not in path.name
        content = path.read_bytes()
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                content = b"".join(arrays[name].tobytes() for name in arrays.files)
        assert marker.encode() not in content and host.encode() not in content, path.name
    assert host in (workdir / "stall.txt").read_text()
    text = files["report.html"].read_text()
    assert "alarm (stall)" in text and "own.npz" in text and "main.py --workdir=." in text
    origin = json.loads(files["result.json"].read_text())["provenance"]["train"]["origin"]
    assert origin == "own.npz"


def test_a_study_that_fails_does_not_name_its_place(tmp_path):
    folder = tmp_path / "SecretPlace" / "study"
    error = NonFiniteError("loss is nan", where=str(folder / "kd" / "seed0"))
    found = scrubbed({"error": str(error), "run": "kd/seed0"}, folder)
    assert found == {"error": "./kd/seed0: loss is nan", "run": "kd/seed0"}
