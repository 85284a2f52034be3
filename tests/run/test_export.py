"""A trained network leaves as files of other programs and comes back the same."""

import dataclasses
import json
import subprocess
import sys
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distill_jax as dj
from distill_jax import main
from distill_jax.core.errors import UserError
from distill_jax.run import build
from distill_jax.run import config as config_lib
from distill_jax.run.train import loop

onnxruntime = pytest.importorskip("onnxruntime")

SERVE = """
import sys, json, numpy as np
folder = sys.argv[1]
x = dict(np.load(folder + "/x.npz"))
import jax, onnxruntime
from jax import export
with open(folder + "/model.stablehlo", "rb") as f:
    stablehlo = export.deserialize(bytearray(f.read())).call
onnx = onnxruntime.InferenceSession(folder + "/model.onnx")
found = {}
for n in (1, 7, 64):
    batch = {k: v[:n] for k, v in x.items()}
    found[f"stablehlo{n}"] = stablehlo(batch)["probabilities"]
    found[f"onnx{n}"] = onnx.run(["probabilities"], batch)[0]
assert "distill_jax" not in sys.modules
np.savez(folder + "/y.npz", **found)
"""
"""Serves both files in a process without this package."""


def train(config, folder):
    config.log.tensorboard = False
    config.objective.name = "supervised"
    config.evaluators = {"classification": {}}
    config.batch_size, config.total = 16, 4
    loop.train(config, folder, log_line=lambda line: None)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    config = config_lib.base()
    config.data.name = "synthetic"
    config.data.kwargs = {"n_train": 96, "n_test": 70, "image_size": 8, "num_classes": 3}
    config.data.train_transforms = config.data.eval_transforms = ("normalize",)
    config.roles.student = config_lib.role("convnet", widths=(4, 8))
    return train(config, tmp_path_factory.mktemp("images") / "run")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A run on a file of the user, whose path is nobody's business."""
    folder, rng = tmp_path_factory.mktemp("table"), np.random.default_rng(0)
    for name, n in (("train", 96), ("test", 70)):
        rows = [f"{x},{'abc'[int(9 * x) % 3]},{x > 0}" for x in rng.normal(size=n)]
        (folder / f"{name}.csv").write_text("\n".join(["x,c,y", *rows]))
    config = config_lib.base()
    config.data.name = "table_file"
    config.data.kwargs = {"path": str(folder / "train.csv"), "label": "y", "licence": "MIT"}
    config.data.kwargs["test_path"] = str(folder / "test.csv")
    config.roles.student = config_lib.role("tabular_mlp", hidden=(4,))
    return train(config, folder / "run")


def replaced(network, model):
    """A network with another model in place of its own."""
    params, state = model.init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    return dataclasses.replace(network, model=model, params=params, state=state)


def raw(folder, n):
    """The first test examples, as inputs by name."""
    x = build.load_dataset(dj.load(folder).config).test.read(np.arange(n))["input"]
    return dict(x) if isinstance(x, dict) else {"input": x}


@pytest.mark.parametrize("run", ["images", "table"])
def test_out_and_back(run, request, tmp_path, capsys):
    """By the command; the files are served without this package, and read back by it."""
    folder = request.getfixturevalue(run)
    formats = "stablehlo,onnx,onnx_int8,safetensors"
    command = ["x", "--mode=export", f"--workdir={folder}", f"--formats={formats}"]
    assert main.main(command) == 0
    assert "top-1 agreement" in capsys.readouterr().out
    out = folder / "export"
    for name in ("stablehlo", "onnx", "int8.onnx", "safetensors"):
        card = json.loads((out / f"model.{name}.card.json").read_text())
        assert card["bytes"] == (out / f"model.{name}").stat().st_size
        assert card["about"]["data"]["test"]["licence"]
        if name in ("stablehlo", "onnx"):
            assert card["parity"]["examples"] == 70 and card["parity"]["top1_agreement"] == 1.0
            assert card["parity"]["max_error"]["probabilities"] < 1e-5
            assert card["latency_ms"]["file"] > 0
    for path in out.iterdir():
        if not path.name.startswith("."):
            assert str(folder.parent).encode() not in path.read_bytes(), path.name
    predict = dj.load(folder)
    x = raw(folder, 64)
    np.savez(tmp_path / "x.npz", **x)
    for name in ("model.stablehlo", "model.onnx"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    line = [sys.executable, "-c", SERVE, str(tmp_path)]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    x = x if run == "table" else x["input"]
    wanted = predict(x)["probabilities"]
    for name, found in np.load(tmp_path / "y.npz").items():
        np.testing.assert_allclose(found, wanted[: len(found)], atol=1e-5, err_msg=name)
    back = dj.load(out)
    jax.tree.map(np.testing.assert_array_equal, back.params, predict.params)
    jax.tree.map(np.testing.assert_array_equal, back.state, predict.state)
    np.testing.assert_array_equal(back(x)["logits"], predict(x)["logits"])
    assert back.classes == predict.classes and back.step == predict.step


def test_what_is_asked_for(images, tmp_path):
    """Other outputs, prepared inputs, and weights in a file of their own."""
    network = dj.load(images)
    out = network.export(
        tmp_path / "out",
        formats=("stablehlo", "onnx"),
        outputs=("embedding", "logits"),
        preprocessing=False,
        weights="apart",
        examples=8,
    )
    x = raw(images, 7)["input"]
    wanted = network(x)
    prepared = {"input": np.asarray(network.preprocess(x))}
    session = onnxruntime.InferenceSession(out / "model.onnx")
    names = [o.name for o in session.get_outputs()]
    exported = jax.export.deserialize(bytearray((out / "model.stablehlo").read_bytes()))
    tensors = dict(dj.weights.read(out / "model.safetensors"))
    by_onnx = dict(zip(names, session.run(names, prepared), strict=True))
    by_stablehlo: Any = exported.call(tensors, prepared)
    for found in (by_onnx, by_stablehlo):
        assert set(found) == {"embedding", "logits"}
        for name, value in found.items():
            np.testing.assert_allclose(value, wanted[name], rtol=1e-4, atol=1e-5)


def test_files_of_others_stay(images, tmp_path):
    (tmp_path / "model.onnx").write_text("mine")
    with pytest.raises(UserError, match="was not written by this program"):
        dj.load(images).export(tmp_path, formats=("onnx",))
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"formats": ("onxn",)}, "did you mean 'onnx'?"),
        ({"outputs": ("logit",)}, "did you mean 'logits'?"),
        ({"weights": "out"}, "'inside' or 'apart'"),
        ({"formats": ()}, "no format is named"),
    ],
)
def test_what_cannot_be_exported(images, tmp_path, arguments, message):
    with pytest.raises(UserError) as caught:
        dj.load(images).export(tmp_path / "out", **arguments)
    assert message in str(caught.value) and not (tmp_path / "out").exists()


def test_a_primitive_without_an_operator(images, tmp_path):
    """Named with its place, before any file is written."""

    class Sorted(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return {"logits": jnp.sort(nn.Dense(3)(x.reshape(x.shape[0], -1)), axis=-1)}

    network = replaced(dj.load(images), dj.from_linen(Sorted()))
    with pytest.raises(UserError) as caught:
        network.export(tmp_path / "out")
    assert "no ONNX operator for sort in Sorted (test_export.py:" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_network_for_one_size_of_batch(images, tmp_path):
    class Lengthy(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return {"logits": nn.Dense(3)(x.reshape(len(x), -1))}

    network = replaced(dj.load(images), dj.from_linen(Lengthy()))
    for name in ("onnx", "stablehlo"):
        with pytest.raises(UserError, match=r"x.shape\[0\] in place of len\(x\)") as caught:
            network.export(tmp_path / "out", formats=(name,))
        assert "test_export.py:" in str(caught.value) and not (tmp_path / "out").exists()


def test_a_missing_package_is_named(images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "litert_converter.converter_api_ext", None)
    with pytest.raises(UserError, match=r'pip install "distill_jax\[tflite\]"'):
        dj.load(images).export(tmp_path / "out", formats=("tflite",))
    assert not (tmp_path / "out").exists()


def test_a_damaged_export_is_refused(images, tmp_path):
    out = dj.load(images).export(tmp_path / "out", formats=("safetensors",), examples=0)
    path = out / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="its SHA-256 is"):
        dj.load(out)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["signature"]["networks"]["student"].update(model="os:system"), "os"),
        (lambda c: c["signature"].update(classes=3), "'signature.classes' is 3"),
        (lambda c: c.update(format="other"), "is of 'other'"),
        (lambda c: c.pop("sha256"), "has no 'sha256'"),
        (lambda c: c.update(role="teacher"), "no network 'teacher' was trained"),
    ],
)
def test_a_config_of_strangers_chooses_no_code(images, tmp_path, change, message):
    out = dj.load(images).export(tmp_path / "out", formats=("safetensors",), examples=0)
    config = json.loads((out / "config.json").read_text())
    change(config)
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        dj.load(out)
    assert message in str(caught.value)


def test_low_agreement_is_a_warning(images, tmp_path, monkeypatch):
    from distill_jax.export import card

    monkeypatch.setattr(card, "AGREEMENT", 1.01)
    with pytest.warns(UserWarning, match="agrees with the network on"):
        dj.load(images).export(tmp_path / "out", formats=("onnx",), examples=8)
    page = (tmp_path / "out" / "README.md").read_text()
    assert "Warning: model.onnx agrees" in page
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(card, "AGREEMENT", 0.5)
        dj.load(images).export(tmp_path / "out", formats=("onnx",), examples=8)
    assert "Warning" not in (tmp_path / "out" / "README.md").read_text()
