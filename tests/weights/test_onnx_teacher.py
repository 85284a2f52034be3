"""An ONNX file as a function from inputs to logits: equal to its graph, and refused by name."""

import hashlib
import pathlib
import sys
from typing import Any

import numpy as np
import pytest

from distill_jax.core.errors import ArgumentError, DataUnavailable
from distill_jax.weights import onnx_teacher, packages
from distill_jax.weights.common import WeightsError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

WEIGHTS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def write_graph(
    path, *, softmax=False, batch: Any = "b", dtype: Any = np.float32, shape=(6,), second=False
):
    """Writes `x @ WEIGHTS`, of flattened inputs, perhaps with a softmax behind it."""
    from onnx import TensorProto, helper, numpy_helper

    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [
        helper.make_node("Cast", ["x"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["cast"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
    ]
    names = ["logits", "probabilities"] if second else ["probabilities" if softmax else "logits"]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [batch, 4]) for n in names]
    inputs = [helper.make_tensor_value_info("x", kind, [batch, *shape])]
    graph = helper.make_graph(
        nodes, "graph", inputs, outputs, [numpy_helper.from_array(WEIGHTS, "w")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    return str(path)


def draw(n=7):
    return np.random.default_rng(1).normal(size=(n, 6)).astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("batch", ["b", 3])
@pytest.mark.parametrize("ends_in_softmax", [False, True])
def test_it_gives_the_logits_of_the_graph(tmp_path, batch, ends_in_softmax):
    path = write_graph(tmp_path / "a.onnx", softmax=ends_in_softmax, batch=batch)
    teacher = onnx_teacher.open_onnx(path, batch=2, threads=1)
    logits = teacher(draw())["logits"]
    assert logits.dtype == np.float32 and logits.shape == (7, 4)
    wanted = draw() @ WEIGHTS
    if ends_in_softmax:
        np.testing.assert_allclose(softmax(logits), softmax(wanted), atol=1e-6)
        np.testing.assert_allclose(np.exp(logits).sum(1), 1, atol=1e-5)
        far = teacher(100 * draw())["logits"]
        assert far.min() == pytest.approx(np.log(onnx_teacher.FLOOR), rel=1e-5)
    else:
        np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-5)


def test_inputs_and_outputs_are_named_and_images_turned(tmp_path):
    path = write_graph(tmp_path / "a.onnx", second=True, shape=(3, 1, 2))
    with pytest.raises(ArgumentError, match="2 outputs, and none is named"):
        onnx_teacher.open_onnx(path)
    teacher = onnx_teacher.open_onnx(path, output="logits", input="x", channels_first=True)
    images = np.random.default_rng(2).normal(size=(5, 1, 2, 3)).astype(np.float32)
    wanted = images.transpose(0, 3, 1, 2).reshape(5, 6) @ WEIGHTS
    np.testing.assert_allclose(teacher(images)["logits"], wanted, rtol=1e-5, atol=1e-5)


def test_integers_are_widened_and_nothing_else_is(tmp_path):
    path = write_graph(tmp_path / "a.onnx", dtype=np.int64)
    x = np.arange(12, dtype=np.int32).reshape(2, 6)
    np.testing.assert_allclose(
        onnx_teacher.open_onnx(path)(x)["logits"], x @ WEIGHTS.astype(np.float64), rtol=1e-5
    )
    for wrong in (x.astype(np.float32), x.astype(np.uint64)):
        with pytest.raises(ArgumentError, match=r"is tensor\(int64\), the data"):
            onnx_teacher.open_onnx(path)(wrong)


def test_classes_are_mapped_and_their_probabilities_added(tmp_path):
    path = write_graph(tmp_path / "a.onnx", softmax=True)
    teacher = onnx_teacher.open_onnx(path, classes=(2, (0, 3)))
    p = softmax(draw() @ WEIGHTS)
    wanted = np.stack([p[:, 2], p[:, 0] + p[:, 3]], axis=1)
    np.testing.assert_allclose(np.exp(teacher(draw())["logits"]), wanted, atol=1e-6)
    assert teacher.key["classes"] == ((2,), (0, 3))
    assert teacher.key["sha256"] == hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
    with pytest.raises(ArgumentError, match="class 4 of 4"):
        onnx_teacher.open_onnx(path, classes=(0, 4))(draw())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"output": "logit"}, "did you mean 'logits'"),
        ({"input": "y"}, "no input 'y'"),
        ({"values": "odds"}, "values is 'odds'"),
        ({"classes": (0, (0, 1))}, "class 0 of the teacher twice"),
        ({"classes": ("cat",)}, "classes are"),
        ({"batch": 0}, "batch 0"),
    ],
)
def test_arguments_that_are_none_are_refused(tmp_path, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        onnx_teacher.open_onnx(write_graph(tmp_path / "a.onnx"), **arguments)


def test_values_that_are_not_what_was_said_are_refused(tmp_path):
    path = write_graph(tmp_path / "a.onnx")
    with pytest.raises(ArgumentError, match="is not probabilities"):
        onnx_teacher.open_onnx(path, values="probabilities")(draw())
    with pytest.raises(ArgumentError, match=r"is \[b, 6\], the data \[b, 5\]"):
        onnx_teacher.open_onnx(path)(draw()[:, :5])
    with pytest.raises(ArgumentError, match="a table of several"):
        onnx_teacher.open_onnx(path)({"numeric": draw()})


def test_files_that_are_no_graphs_are_refused(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no graph at all")
    with pytest.raises(WeightsError, match="ONNX Runtime cannot read it"):
        onnx_teacher.open_onnx(str(tmp_path / "bad.onnx"))
    with pytest.raises(DataUnavailable, match="cannot be read"):
        onnx_teacher.open_onnx(str(tmp_path / "absent.onnx"))
    with pytest.raises(WeightsError, match="no ONNX file"):
        onnx_teacher.read_bytes(str(tmp_path / "weights.pth"))


def test_weights_outside_the_file_are_refused(tmp_path, monkeypatch):
    path = write_graph(tmp_path / "a.onnx")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    monkeypatch.chdir(tmp_path)
    assert (tmp_path / "w.bin").exists()
    with pytest.raises(WeightsError, match="with its weights inside"):
        onnx_teacher.open_onnx(path)


def test_a_package_is_located_pinned_and_not_imported(tmp_path, monkeypatch):
    folder = tmp_path / "fake_onnx_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    path = write_graph(folder / "model.onnx")
    sha256 = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
    fake = packages.Package("fake==1", "fake_onnx_package", "model.onnx", sha256, "MIT", "here")
    monkeypatch.setattr(packages, "PACKAGES", {"fake": fake})
    monkeypatch.syspath_prepend(str(tmp_path))
    assert onnx_teacher.open_onnx("package:fake")(draw())["logits"].shape == (7, 4)
    assert "fake_onnx_package" not in sys.modules
    monkeypatch.setattr(packages, "PACKAGES", {"fake": fake._replace(sha256="0" * 64)})
    with pytest.raises(WeightsError, match="pinned is 000"):
        onnx_teacher.open_onnx("package:fake")
    with pytest.raises(DataUnavailable, match="no package of weights"):
        onnx_teacher.open_onnx("package:fakee")
