"""Roles that start from the weights of another library."""

import json
import pathlib
import typing

import jax
import numpy as np
import pytest

import distill_jax as dj
from distill_jax import weights
from distill_jax.core.api import Dataset
from distill_jax.core.errors import ConfigError
from distill_jax.models import vit
from distill_jax.run import arguments, build, foreign, paths
from distill_jax.run import config as config_lib
from distill_jax.run.build import networks, start
from distill_jax.run.preflight import teachers
from distill_jax.run.train import loop
from distill_jax.weights import families, mapping

ARGUMENTS = {"width": 64, "depth": 1, "heads": 1, "patch_size": 4, "gelu": "exact", "mlp_ratio": 1}


def written(path, *, classes, seed=0, size=8):
    """A file as timm writes it, of a vision transformer for grey images."""
    x = jax.ShapeDtypeStruct((1, size, size, 1), np.float32)
    shapes = jax.eval_shape(vit.make(**ARGUMENTS, num_classes=classes).init, jax.random.key(0), x)
    rng = np.random.default_rng(seed)
    draw = lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 8  # noqa: E731
    params, state = jax.tree.map(draw, shapes)
    sizes = ARGUMENTS | {"num_classes": classes}
    tensors = mapping.invert_map(params, state, families.family("vit/timm"), sizes=sizes)
    weights.write_safetensors(path, tensors)
    return params


def config_of(teacher, student=""):
    config = config_lib.base()
    config.data.name = "synthetic"
    config.data.kwargs = {"n_train": 32, "n_test": 8, "image_size": 8, "num_classes": 3}
    config.data.kwargs["channels"] = 1
    config.data.train_transforms = config.data.eval_transforms = ("normalize",)
    config.objective.name = "kd"
    config.roles.student = config_lib.role("" if student else "mlp")
    config.roles.student.init = student or None
    config.roles.teacher = config_lib.role()
    config.roles.teacher.init = teacher
    config.roles.teacher.frozen = True
    config.evaluators = {"classification": {}}
    config.batch_size, config.total, config.log.tensorboard = 8, 2, False
    return config


def test_the_file_tells_the_network(tmp_path):
    path = str(tmp_path / "teacher.safetensors")
    written(path, classes=7)
    config = config_of(path, path)
    name, kwargs = networks.role_spec(config, "teacher")
    assert name == "vit" and kwargs["num_classes"] == 7 and kwargs["width"] == 64
    assert "num_classes" not in networks.role_spec(config, "student")[1]
    config.roles.student.kwargs = {"drop_path": 0.1}
    assert networks.role_spec(config, "student")[1]["drop_path"] == 0.1


@pytest.mark.parametrize(
    ("init", "is_foreign"),
    [
        ("package:efficientnet_lite0", True),
        ("hf:folder", True),
        ("a/b.safetensors", True),
        ("net.pth", True),
        ("runs/teacher", False),
        ("runs/teacher#student/last", False),
        ("arm:teacher", False),
        (None, False),
    ],
)
def test_what_is_of_another_library(init, is_foreign):
    assert paths.is_foreign(init) == is_foreign


def test_paths_become_absolute():
    config = config_of("hf:folder", "here.npz")
    config = paths.of_config(config)
    assert config.roles.teacher.init == f"hf:{pathlib.Path.cwd() / 'folder'}"
    assert config.roles.student.init == str(pathlib.Path.cwd() / "here.npz")
    config.roles.teacher.init = "package:efficientnet_lite0"
    assert paths.of_config(config).roles.teacher.init == "package:efficientnet_lite0"


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("package:efficientnet", r"roles\.teacher\.init: no package of weights.*\n.*lite0"),
        ("hf:/nowhere", r"roles\.teacher\.init: .*nowhere.*does not exist"),
        ("there.safetensors", r"roles\.teacher\.init: there.safetensors: does not exist"),
    ],
)
def test_weights_that_are_absent_are_named(init, message):
    with pytest.raises(ConfigError, match=message):
        networks.role_spec(config_of(init), "teacher")


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    path = str(tmp_path / "teacher.safetensors")
    written(path, classes=7)
    with pytest.raises(ConfigError, match=r"teacher has 7 classes and the student 3"):
        build.build(config_of(path))


def test_a_teacher_of_other_classes_is_asked_about_groups_of_them(tmp_path):
    """The softmax is the sum of the probabilities of a group, as a share of all groups."""
    path = str(tmp_path / "teacher.safetensors")
    theirs = written(path, classes=7)
    config = config_of(path)
    config.roles.teacher.classes = (6, (0, 2, 3), (5, 1))
    config_lib.validate(config)
    experiment = build.build(config)
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
    plain, _ = vit.make(**ARGUMENTS, num_classes=7).apply(theirs, {}, x, train=False)
    found, _ = experiment.models["teacher"].apply(theirs, {}, x, train=False)
    p = np.asarray(jax.nn.softmax(plain["logits"]), np.float64)
    summed = np.stack([p[:, 6], p[:, [0, 2, 3]].sum(1), p[:, [5, 1]].sum(1)], axis=1)
    wanted = summed / summed.sum(1, keepdims=True)
    np.testing.assert_allclose(jax.nn.softmax(found["logits"]), wanted, rtol=1e-5)
    asked = networks.asked(config, "teacher")
    config.roles.teacher.classes = (6, (0, 2, 3), 5)
    assert networks.asked(config, "teacher") != asked  # of which stored answers depend


@pytest.mark.parametrize(
    ("role", "classes", "message"),
    [
        ("teacher", (0, 1), r"roles\.teacher\.classes: names 2 classes, the data have 3"),
        ("teacher", (0, 1, 7), r"roles\.teacher\.classes: names class 7, .* 7 classes\n.*0 to 6"),
        ("teacher", (0, 1, (2, 1)), r"roles\.teacher\.classes: class 1 is named twice"),
        ("teacher", (0, 1, ()), r"roles\.teacher\.classes: .*no class"),
        ("student", (0, 1, 2), r"roles\.student\.classes: is for a frozen network"),
    ],
)
def test_groups_of_classes_that_do_not_fit_are_refused(tmp_path, role, classes, message):
    path = str(tmp_path / "teacher.safetensors")
    written(path, classes=7)
    config = config_of(path)
    config.roles[role].classes = classes
    with pytest.raises(ConfigError, match=message), arguments.located(config):
        config_lib.validate(config)
        build.build(config)


def test_values_that_a_teacher_did_not_see_are_a_warning(tmp_path):
    written(tmp_path / "model.safetensors", classes=3)
    card = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 8, 8]}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": card}))
    config, nothing = config_of(f"hf:{tmp_path}"), typing.cast(Dataset, None)
    found = list(teachers.findings(config, ("teacher",), nothing))
    assert [f.kind for f in found] == ["warning"]
    assert found[0].hint == "data.teacher_transforms=card:teacher"
    config.data.transform_kwargs = {"normalize": {"mean": 0.5, "std": 0.25}}
    assert not list(teachers.findings(config, ("teacher",), nothing))
    config.roles.teacher.init = str(tmp_path / "model.safetensors")  # nobody says
    assert not list(teachers.findings(config, ("teacher",), nothing))


@pytest.mark.slow
def test_a_student_starts_from_a_file_and_learns_from_another(tmp_path):
    theirs = written(tmp_path / "teacher.safetensors", classes=3)
    mine = written(tmp_path / "student.safetensors", classes=5, seed=1)
    config = config_of(str(tmp_path / "teacher.safetensors"), str(tmp_path / "student.safetensors"))
    experiment = build.build(config)
    frozen = start.frozen_networks(experiment, config)["teacher"][0]
    jax.tree.map(np.testing.assert_array_equal, frozen, theirs)
    first = start.initial_state(experiment, jax.random.key(0), config).params["student"]
    for layer in ("Attention_0", "Dense_0"):
        jax.tree.map(np.testing.assert_array_equal, first["Block_0"][layer], mine["Block_0"][layer])
    assert first["Dense_0"]["kernel"].shape == (64, 3)  # of the classes of the data
    loop.train(config, tmp_path / "run", log_line=lambda line: None)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["inputs"]["networks"]["teacher"] == foreign.checksum(
        config.roles.teacher.init, where=""
    )
    (tmp_path / "student.safetensors").unlink()
    found = dj.load(tmp_path / "run", step="last")(np.zeros((2, 8, 8, 1), np.uint8))
    assert found["logits"].shape == (2, 3)
    config = config_of(str(tmp_path / "run"))  # that student, whose network only the file named
    name, kwargs = networks.role_spec(config, "teacher")
    assert name == "vit" and kwargs["width"] == 64
    start.frozen_networks(build.build(config), config)
    config.roles.teacher.model = "mlp"
    with pytest.raises(ConfigError, match="holds a network vit, not mlp") as caught:
        start.frozen_networks(build.build(config), config)
    assert "roles.teacher.model=vit" in caught.value.hint


@pytest.mark.slow
def test_a_student_keeps_frozen_parts_and_learns_by_layers(tmp_path):
    """Through a whole run: the frozen parts of the last state are the bits of the file."""
    mine = written(tmp_path / "student.safetensors", classes=3, seed=1)
    config = config_of(str(tmp_path / "student.safetensors"), str(tmp_path / "student.safetensors"))
    config.roles.student.freeze = ("patches", "Block_0/Attention_*", "cls")
    config.optim.lr_by_layer, config.optim.lr = (("student/Dense_0", 10.0),), 0.01
    config.optim.weight_decay = 0.1
    loop.train(config, tmp_path / "run", log_line=lambda line: None)
    found = dj.load(tmp_path / "run", step="last")
    after = found.params
    for part in ("patches", "cls"):
        jax.tree.map(np.testing.assert_array_equal, after[part], mine[part])
    block, theirs = after["Block_0"], mine["Block_0"]
    jax.tree.map(np.testing.assert_array_equal, block["Attention_0"], theirs["Attention_0"])
    assert np.any(block["Dense_0"]["kernel"] != theirs["Dense_0"]["kernel"])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "roles.student.freeze",
            ("Dense_9",),
            r"roles\.student\.freeze: .*no parameter\n.*Dense_1",
        ),
        ("optim.lr_by_layer", (("Dense_9", 2.0),), r"optim\.lr_by_layer: .*matches no parameter"),
        ("optim.lr_by_layer", (("Dense_0", -2.0),), r"optim\.lr_by_layer: "),
        ("optim.layer_decay", 0.5, r"optim\.layer_decay: no network has numbered blocks"),
        ("optim.layer_decay", 0.0, r"optim\.layer_decay: "),
        ("roles.teacher.freeze", ("cls",), r"roles\.teacher\.freeze: a frozen role"),
    ],
)
def test_frozen_parts_and_rates_that_fit_nothing_are_refused(tmp_path, path, value, message):
    written(tmp_path / "teacher.safetensors", classes=3)
    config = config_of(str(tmp_path / "teacher.safetensors"))
    config = config_lib.override(config, {path: value})
    with pytest.raises(ConfigError, match=message):
        config_lib.validate(config)
        with arguments.located(config):
            assert build.build(config).abstract_state


def test_a_network_without_its_head_leaves_that_of_the_file(tmp_path):
    path = str(tmp_path / "teacher.safetensors")
    theirs = written(path, classes=7)
    model = vit.make(**ARGUMENTS, num_classes=0)
    x = jax.ShapeDtypeStruct((1, 8, 8, 1), np.float32)
    like = jax.eval_shape(model.init, jax.random.key(0), x)
    params, _ = foreign.read(path, None, like, frozen=True, where="roles.teacher.init")
    assert "Dense_0" not in params
    np.testing.assert_array_equal(params["cls"], theirs["cls"])
    with pytest.raises(ConfigError, match="holds weights of vit"):
        foreign.read(path, "swin", like, frozen=True, where="roles.teacher.init")
