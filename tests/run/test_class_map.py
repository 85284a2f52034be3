"""Files that map the classes of a teacher to those of the data."""

import json

import jax
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.run import build, class_map, foreign, paths
from distill_jax.run import config as config_lib
from distill_jax.run.build import networks
from distill_jax.run.train import inputs, loop
from tests.run.test_foreign import config_of, written

CLASSES = ("prototype 0", "prototype 1", "prototype 2")
NAMES = ("ant", "bee", "cat", "cat", "3", "elk", "fox")


@pytest.fixture
def teacher(tmp_path):
    folder = tmp_path / "net"
    folder.mkdir()
    written(folder / "model.safetensors", classes=7)
    names = {str(i): name for i, name in enumerate(NAMES)}
    (folder / "config.json").write_text(json.dumps({"id2label": names}))
    return f"hf:{folder}"


def config_with(tmp_path, teacher, text, name="map.json"):
    (tmp_path / name).write_text(text.replace("P", "prototype "))
    config = config_of(teacher)
    config.roles.teacher.classes = (str(tmp_path / name),)
    return config


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("map.json", '{"P1": ["ant", 2, "3"], "P0": 6, "P2": ["elk", "bee"]}'),
        ("map.csv", "class,teacher\nP0,fox\nP1,ant\nP2,elk\nP1,2\n\nP1,3\nP2,bee\n"),
    ],
)
def test_a_file_names_the_classes(tmp_path, teacher, name, text):
    config = config_with(tmp_path, teacher, text, name)
    config_lib.validate(config)
    assert class_map.groups(config, "teacher", CLASSES) == ((6,), (0, 2, 4), (5, 1))
    experiment = build.build(config)
    frozen = build.frozen_networks(experiment, config)["teacher"]
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    found, _ = experiment.models["teacher"].apply(*frozen, x, train=False, rngs={})
    listed = config_of(teacher)
    listed.roles.teacher.classes = (6, (0, 2, 4), (5, 1))
    wanted, _ = build.build(listed).models["teacher"].apply(*frozen, x, train=False, rngs={})
    np.testing.assert_array_equal(found["logits"], wanted["logits"])
    assert jax.tree.leaves(frozen)
    # stored answers depend on the classes, and the file is an input of the run
    assert networks.asked(config, "teacher", CLASSES)[1]["classes"] == (
        (6,),
        (0, 2, 4),
        (5, 1),
    )
    before = inputs.read_inputs(experiment, config)["networks"]["teacher.classes"]
    (tmp_path / name).write_text(text.replace("bee", "fox"))
    assert before != inputs.read_inputs(experiment, config)["networks"]["teacher.classes"]


def test_a_run_names_the_classes_of_its_network(tmp_path, teacher):
    path = tmp_path / "first.safetensors"
    written(path, classes=3)
    config = config_of(teacher, str(path))
    config.objective.name = "supervised"
    del config.roles.teacher
    loop.train(config, tmp_path / "run")
    config = config_of(str(tmp_path / "run#student"))
    assert foreign.class_names(config, "teacher") == CLASSES


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("map.json", '{"P0": 1, "P1": 2}', "map.json: no entry for 'prototype 2'"),
        ("map.json", '{"P0": 1, "P1": 2, "P3": 0}', "the data have no class 'prototype 3'"),
        ("map.json", '{"P0": 1, "P1": 2, "P2": "eel"}', "'eel' is no class.*\n.*'elk'"),
        ("map.json", '{"P0": 1, "P1": 2, "P2": "cat"}', "2 classes .* called 'cat'\n.*index"),
        ("map.json", '{"P0": 1, "P1": 2, "P2": []}', "no class"),
        ("map.json", '{"P0": 1, "P1": 2, "P2": -1}', "no class"),
        ("map.json", '{"P0": 1, "P1": 2, "P2": 2}', "class 2 is named twice"),
        ("map.json", '{"P0": 1, "P1": 2, "P2": 7}', "names class 7, and the network has 7"),
        ("map.json", '{"P0": 1, "P1": 2, "P2": {}}', "map.json"),
        ("map.json", "[1, 2, 3]", "not a JSON object"),
        ("map.csv", "0,1\n1,2\n2,3\n", "does not begin with the line class,teacher"),
        ("map.csv", "class,teacher\n0,1,2\n", "'0,1,2' has 3 columns"),
        ("map.txt", "0", "is no .json and no .csv file"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, teacher, name, text, told):
    with pytest.raises(ConfigError, match=told) as raised:
        build.build(config_with(tmp_path, teacher, text, name))
    assert raised.value.where == "roles.teacher.classes"


def test_an_absent_file_is_refused_and_paths_are_those_of_the_current_folder(
    tmp_path, teacher, monkeypatch
):
    config = config_with(tmp_path, teacher, "{}")
    config.roles.teacher.classes = ("absent.json",)
    with pytest.raises(ConfigError, match=r"absent\.json: does not exist"):
        build.build(config)
    monkeypatch.chdir(tmp_path)
    assert paths.of_config(config).roles.teacher.classes == (str(tmp_path / "absent.json"),)
