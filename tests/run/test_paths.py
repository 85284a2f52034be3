"""Paths: relative to the current folder, absolute once the command line is read."""

import os
import pathlib

import pytest

from distill_jax.core.errors import UserError
from distill_jax.run import config as config_lib
from distill_jax.run import flags, paths
from distill_jax.trainer.io.paths import NetworkRef, absolute

CONFIG = """
from distill_jax.run.config import base, role

def get_config():
    config = base()
    config.objective.name = "kd"
    config.roles.student = role("mlp", hidden=(4,))
    config.roles.teacher = role("mlp", hidden=(8,))
    config.roles.teacher.frozen = True
    config.roles.teacher.init = "runs/teacher"
    config.cache.dir = "answers/{seed}"
    config.data.name = "npz_file"
    config.data.kwargs.path = "data.npz"
    config.data.kwargs.layout = "path/like"
    config.total = 2
    config.study.arms = {
        "alone": {"data": {"kwargs": {"path": "~/other.npz"}}},
        "kd": {"roles": {"teacher": {"init": "arm:alone#student"}}},
        "far": {"roles": {"teacher": {"init": "../teacher#target/head"}}},
    }
    config.study.title = "runs/teacher"
    return config
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "c.py").write_text(CONFIG)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return folder


def test_every_path_of_a_command_line_becomes_absolute(here, tmp_path):
    found = flags.parse(["", "--config=c.py", "--workdir=../runs/./kd"])
    flat = config_lib.flatten(found.config)
    assert found.workdir == tmp_path / "runs" / "kd"
    assert flat["roles.teacher.init"] == f"{here}/runs/teacher"
    assert flat["cache.dir"] == f"{here}/answers/{{seed}}"
    assert flat["data.kwargs.path"] == f"{here}/data.npz"
    arms = found.config.study.arms
    assert arms.alone.data.kwargs.path == f"{tmp_path}/home/other.npz"
    assert arms.kd.roles.teacher.init == "arm:alone#student"
    assert arms.far.roles.teacher.init == f"{tmp_path}/teacher#target/head"
    # What is no path stays.
    assert flat["data.kwargs.layout"] == "path/like"
    assert flat["study.title"] == "runs/teacher" and flat["data.name"] == "npz_file"
    assert flat["roles.student.init"] is None


@pytest.mark.parametrize("where", ["here", "there"])
def test_another_current_folder_finds_the_same_files(here, tmp_path, monkeypatch, where):
    """What a run stores is read the same from anywhere, and the same files are the same config."""
    first = flags.parse(["", "--config=c.py", "--workdir=run"])
    first.workdir.mkdir()
    (first.workdir / "config.json").write_text(config_lib.to_json(first.config))
    folder = tmp_path / where
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    stored = flags.parse(["", "--mode=eval", "--workdir=../here/run"])
    assert not config_lib.differences(first.config, stored.config)
    given = {"roles.teacher.init": "runs/teacher", "data.kwargs.path": "data.npz"}
    given["cache.dir"] = "answers/{seed}"
    line = [f"--config.{key}=../here/{text}" for key, text in given.items()]
    again = flags.parse(["", "--config=../here/c.py", "--workdir=../here/run", *line])
    assert not config_lib.differences(first.config, again.config, ignore=["study.arms.far"])


@pytest.mark.parametrize(
    ("text", "path", "role", "part"),
    [
        ("runs/teacher", "runs/teacher", "student", ""),
        ("runs/teacher#target", "runs/teacher", "target", ""),
        ("runs/teacher#student/Dense_1", "runs/teacher", "student", "Dense_1"),
        ("runs/teacher#student/block/conv", "runs/teacher", "student", "block/conv"),
        ("runs/teacher#student/*", "runs/teacher", "student", "*"),
        ("runs/teacher#", "runs/teacher", "student", ""),
        ("runs/#3/teacher#target", "runs/#3/teacher", "target", ""),
        ("real#3/teacher", "real#3/teacher", "student", ""),
        ("real#3/teacher#target/head", "real#3/teacher", "target", "head"),
        ("./runs//a/../teacher", "runs/teacher", "student", ""),
        ("~/t#student", "../home/t", "student", ""),
    ],
)
def test_origins(here, text, path, role, part):
    (here / "real#3" / "teacher").mkdir(parents=True)
    wanted = pathlib.Path(os.path.normpath(here / path))
    assert NetworkRef.parse(text, where="x") == (wanted, role, part)


def test_dots_behind_a_symbolic_link_keep_their_meaning(here, tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (here / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    found = absolute("link/../x", where="x")
    assert os.path.realpath(found) == str(tmp_path / "elsewhere" / "x")


@pytest.mark.parametrize("value", ["", "gs://bucket/data.npz", "arm:alone@0#student"])
def test_what_is_no_path_here_stays(here, value):
    config = config_lib.base()
    config.cache.dir = config.data.kwargs.path = value
    for key in ("data_dir", "train_file", "root", "image_folder"):
        config.data.kwargs[key] = value
    assert not config_lib.differences(config, paths.of_config(config))


def test_arguments_of_data_that_hold_paths(here):
    config = config_lib.base()
    wanted = {"path": "a", "root": "a", "data_dir": "a", "files": ("a", "b"), "of": {"path": "a"}}
    config.data.kwargs = {**wanted, "profile": "a", "split": "a", "n_files": 3, "name": "a/b"}
    found = paths.of_config(config).data.kwargs
    assert {found[k] for k in ("path", "root", "data_dir")} == {f"{here}/a"} == {found.of.path}
    assert found.files == (f"{here}/a", f"{here}/b")
    assert (found.profile, found.split, found.n_files, found.name) == ("a", "a", 3, "a/b")


@pytest.mark.parametrize("text", ["~nobody_of_that_name/x", "a\0b"])
def test_what_can_be_no_path(here, text):
    with pytest.raises(UserError, match=r"cache\.dir: .* is no path"):
        flags.parse(["", "--config=c.py", "--workdir=run", f"--config.cache.dir={text}"])
    with pytest.raises(UserError, match="--workdir: "):
        flags.parse(["", "--config=c.py", f"--workdir={text}"])


@pytest.mark.parametrize("name", ["a[1]", "[ab]/run", "a\\b", "\udcff"])
def test_folders_whose_checkpoints_orbax_cannot_read(here, name):
    with pytest.raises(UserError, match=r"^--workdir: .*(in its path|UTF-8)"):
        flags.parse(["", "--config=c.py", f"--workdir={name}"])
    with pytest.raises(UserError, match=r"^roles\.teacher\.init: "):
        NetworkRef.parse(name, where="roles.teacher.init")


@pytest.mark.parametrize("name", ["a[", "a]", "a%41", "a{1,2}", "a?", "a*", "größe", "a b", "a:b"])
def test_odd_names_that_orbax_takes(here, name):
    assert NetworkRef.parse(name, where="x").path == here / name


def test_a_current_folder_that_is_gone(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(UserError, match="is no path"):
        absolute("x", where="--workdir")
    with pytest.raises(UserError, match="current folder: it is gone"):
        paths.make_importable()
    monkeypatch.chdir(tmp_path)
