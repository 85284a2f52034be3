"""The public names: fast to import, complete, and documented."""

import inspect
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import distill_jax as dj
from distill_jax.models import pretrained
from distill_jax.run import config as config_lib
from distill_jax.run import flags
from distill_jax.run.resolve import available, resolve
from distill_jax.run.train import loop

ROOT = pathlib.Path(__file__).parents[1]


def test_import_loads_neither_jax_nor_flax():
    code = (
        "import sys, distill_jax as dj; dir(dj)\n"
        "assert not {'jax', 'flax', 'numpy', 'optax', 'absl'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [name for name in dj.__all__ if name != "__version__"])
def test_every_public_name_exists_and_is_documented(name):
    found = getattr(dj, name)
    assert inspect.getdoc(found), name
    assert name in dir(dj)


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'Trianer'"):
        dj.Trianer  # noqa: B018
    with pytest.raises(AttributeError, match=r"losses.jepa, distill_jax.losses.logits"):
        dj.losses.standardize  # noqa: B018


def test_every_objective_is_reached_by_its_class():
    for name in available("objectives"):
        make = resolve("objectives", name, where="objective")
        if inspect.isclass(make):
            assert getattr(dj.objectives, make.__name__) is make
        assert getattr(dj.objectives, name).make is make


def test_every_weighting_is_reached_by_its_class():
    for name in available("weighting"):
        make = resolve("weighting", name, where="weighting")
        assert getattr(dj.weighting, make.__name__) is make


def test_objectives_need_no_length_of_an_epoch():
    """In a loop of one's own, durations are numbers of steps."""
    for name in available("objectives"):
        make = resolve("objectives", name, where="objective")
        parameter = inspect.signature(make).parameters.get("steps_per_epoch")
        assert parameter is None or parameter.default in (None, 1.0), name
    assert dj.objectives.DKD(warmup=20).warmup == 20
    with pytest.raises(ValueError, match="warmup: '3 epochs' needs steps_per_epoch"):
        dj.objectives.DKD(warmup="3 epochs")


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path, monkeypatch, capsys):
    """Each is at most 40 lines and runs from an empty folder."""
    source = path.read_text()
    lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 40, len(lines)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    if path.stem.startswith("serve"):
        config = flags.load("distill/supervised:smoke")
        config.roles.student = config_lib.role("mlp", hidden=(4,))
        config.log.tensorboard, config.total = False, 6
        loop.train(config, tmp_path / "runs" / "teacher", log_line=lambda line: None)
    if path.stem == "serve_onnx":
        pytest.importorskip("onnxruntime")
        Image.new("RGB", (5, 7)).save("a.png")
        monkeypatch.setattr(sys, "argv", [str(path), "runs/teacher/export", "a.png"])
        run = tmp_path / "runs" / "teacher"
        dj.load(run).export(run / "export", formats=("onnx",), examples=4)
    if path.stem == "distill_hf_classifier":
        sizes = {"vocabulary": 32, "width": 8, "depth": 1, "heads": 2, "max_length": 16}
        arguments = {"layout": "bert", **sizes, "num_classes": 3, "head": "none"}
        model = dj.models.transformer.make(**arguments)
        params, _ = model.init(jax.random.key(0), np.zeros((1, 4), np.int32))
        (tmp_path / "runs").mkdir()
        pretrained.save_hugging_face(tmp_path / "runs" / "bert", params, arguments)
    exec(compile(source, str(path), "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out
