"""Shipped configs and launchers are importable from a wheel, an editable install and a checkout."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]

CHECK = """
import pathlib, distill_jax
from distill_jax.configs import common
from distill_jax.configs.ssl import dino
from distill_jax.launch import local, sweep
from distill_jax.run import config_files, flags
assert pathlib.Path(distill_jax.__file__).is_relative_to({root!r}), distill_jax.__file__
assert flags.load("kd_cached").objective.name == "kd"
assert flags.load("distill/kd:smoke").data.name == "synthetic"
assert flags.load(str(config_files.shipped()["distill/kd"])).objective.name == "kd"
assert len(config_files.shipped()) == {count}
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the source tree to build from, without what git ignores."""
    copy = tmp_path_factory.mktemp("source") / "tree"
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", "build", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def check(python, root, folder, **environ):
    folder.mkdir()
    count = len([p for p in (ROOT / "configs").glob("*/*.py")])
    done = subprocess.run(
        [python, "-c", CHECK.format(root=str(root), count=count)],
        cwd=folder,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def pip(*args):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_from_a_checkout(tmp_path):
    check(sys.executable, ROOT, tmp_path / "empty", PYTHONPATH=str(ROOT))


def test_from_a_wheel(tree, tmp_path):
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(tree))
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        for name in ("LICENSE", "DATA_LICENSES.md"):  # beside the data that they are about
            [found] = [entry for entry in file.namelist() if entry.rpartition("/")[2] == name]
            assert file.read(found) == (ROOT / name).read_bytes()
        files = {p for p in (tree / "distill_jax").rglob("*.*") if p.suffix not in (".py", ".pyc")}
        assert {p.relative_to(tree).as_posix() for p in files} <= {*file.namelist()}
        assert tree / "distill_jax/report/page.css" in files
    site = tmp_path / "site"
    pip("install", "--quiet", "--no-deps", "--target", str(site), str(wheel))
    assert not (site / "distill_jax" / "configs" / "__init__.py").exists()
    check(sys.executable, site, tmp_path / "empty", PYTHONPATH=str(site))


@pytest.mark.slow
def test_from_an_editable_install(tree, tmp_path):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = str(venv / "bin" / "python")
    # What the package depends on comes from this environment, the package itself does not.
    here = next(p for p in map(pathlib.Path, sys.path) if (p / "ml_collections").is_dir())
    (site,) = venv.glob("lib/*/site-packages")
    (site / "dependencies.pth").write_text(str(here))
    pip("--python", python, "install", "--quiet", "--no-deps", "--editable", str(tree))
    check(python, tree, tmp_path / "empty")
    assert (venv / "bin" / "distill-jax-launch").exists()


@pytest.mark.parametrize(
    "name, message",
    [
        ("kdd", "did you mean 'kd'?"),
        ("distil/kd", "did you mean 'distill/kd'?"),
        ("twice", "--config=one/twice or --config=two/twice"),
    ],
)
def test_names_that_are_refused(name, message, tmp_path, monkeypatch):
    from distill_jax import configs
    from distill_jax.core.errors import UserError
    from distill_jax.run import config_files

    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "twice.py").write_text("")
    monkeypatch.setattr(configs, "__path__", [*configs.__path__, str(tmp_path)])
    with pytest.raises(UserError, match="--config") as caught:
        config_files.find(name)
    assert message in str(caught.value)
