"""A teacher that is an ONNX file: stored, read by evaluators, known by its checksum."""

import json

import jax
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError, DataUnavailable
from distill_jax.run import build, paths, study
from distill_jax.run import config as config_lib
from distill_jax.run.train import loop
from tests.run.test_teacher_cache import make_config

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

WEIGHTS = np.random.default_rng(0).normal(size=(256, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    from onnx import TensorProto, helper, numpy_helper

    path = tmp_path_factory.mktemp("onnx") / "teacher.onnx"
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 16, 16, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 4])],
        [numpy_helper.from_array(WEIGHTS, "w")],
    )
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path


def onnx_config(folder, teacher, **changes):
    config = make_config(folder)
    del config.roles["teacher"]
    config.cache.teacher = str(teacher)
    config.evaluators = {"agreement": {}}
    config.eval.metric = "held_out/agreement"
    config.log.tensorboard = False
    return config_lib.override(config, changes)


def test_a_run_learns_from_it_and_is_compared_with_it(tmp_path, teacher):
    config = onnx_config(tmp_path / "stored", teacher)
    loop.train(config, tmp_path / "run", log_line=lambda line: None)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    stored = json.loads((tmp_path / "stored" / "teacher" / "key.json").read_text())["key"]
    assert len(stored["teacher"]["sha256"]) == 64
    with np.load(tmp_path / "run" / "predictions.npz") as found:
        student, logits, index = (found[k] for k in ("logits_student", "logits_teacher", "index"))
    experiment = build.build(config)
    batch = {**experiment.dataset.test.read(index), "index": index, "epoch": index * 0}
    batch["mask"] = np.ones(len(index), np.float32)
    transform = experiment.transform(train=False)
    seen = transform(jax.random.key(0), batch, jax.numpy.int32(0))["input"]
    wanted = np.asarray(seen).reshape(len(index), -1) @ WEIGHTS
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)
    agreement = (student.argmax(1) == wanted.argmax(1)).mean()
    assert result["metrics"]["test/agreement"] == pytest.approx(agreement)


def test_arms_that_ask_the_same_share_the_answers(tmp_path, teacher):
    make = study._OneExperiment(None)
    first = make(onnx_config(tmp_path, teacher))
    first.caches.asked["test"] = "answers"
    second = make(onnx_config(tmp_path, teacher, **{"optim.lr": 0.5}))
    assert second is not first and second.caches.asked == {"test": "answers"}
    other = make(onnx_config(tmp_path, teacher, **{"cache.teacher_kwargs.values": "logits"}))
    assert not other.caches.asked


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"cache.teacher_kwargs.output": "z"}, ConfigError, "cache.teacher: no output 'z'"),
        ({"cache.teacher_kwargs.outputt": "y"}, ConfigError, "does not accept 'outputt'"),
        ({"data.kwargs.image_size": 8}, ConfigError, r"cache.teacher: input 'x' is \[b, 16, 16"),
        ({"data.kwargs.num_classes": 3}, ConfigError, "4 classes, the data 3\n.*teacher_kwargs"),
        ({"cache.teacher": "absent.onnx"}, DataUnavailable, "absent.onnx: cannot be read"),
        ({"cache.teacher": "package:magica"}, DataUnavailable, "did you mean 'magika'"),
        ({"cache.teacher": "teacher"}, ConfigError, "names no function and no ONNX file"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_stored(
    tmp_path, teacher, changes, error, message
):
    with pytest.raises(error, match=message):
        build.build(onnx_config(tmp_path, teacher, **changes))
    assert not (tmp_path / "teacher").exists()


def test_other_classes_are_mapped_explicitly(tmp_path, teacher):
    changes = {"data.kwargs.num_classes": 3, "cache.teacher_kwargs.classes": ((0, 3), 2, 1)}
    experiment = build.build(onnx_config(tmp_path, teacher, **changes))
    assert experiment.shapes.roles["teacher"].outputs["logits"].shape[1] == 3


def test_the_path_of_a_file_is_made_absolute_and_a_package_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, wanted in (
        ("a/teacher.onnx", str(tmp_path / "a/teacher.onnx")),
        ("package:magika", "package:magika"),
        ("module:function", "module:function"),
    ):
        config = onnx_config(tmp_path, given)
        assert paths.of_config(config).cache.teacher == wanted


def test_shapes_alone_need_no_file(tmp_path):
    experiment = build.build(onnx_config(tmp_path, "absent.onnx"), shapes_only=True)
    assert experiment.shapes.roles["teacher"].outputs["logits"].shape[1] == 4
