"""Transforms `card:<role>`: images as the card of imported weights describes them."""

import json
import shutil

import jax
import numpy as np
import pytest

import distill_jax as dj
from distill_jax.core.errors import ConfigError
from distill_jax.core.steps import teacher_view
from distill_jax.run import build, foreign, teacher_cache
from distill_jax.run import config as config_lib
from distill_jax.run.build.experiment import evaluation_batch
from distill_jax.run.preflight import teachers
from distill_jax.run.train import evaluation, loop
from tests.run.test_foreign import config_of, written

CARD = {"input_size": [1, 8, 8], "mean": [0.2], "std": [0.4], "crop_pct": 0.8}


def folder_of(path, *, classes=3, **card):
    path.mkdir()
    config = {"architecture": "vit", "pretrained_cfg": {**CARD, **card}}
    (path / "config.json").write_text(json.dumps(config))
    written(path / "model.safetensors", classes=classes)
    return f"hf:{path}"


def of_card(folder, student=""):
    config = config_of(folder, student)
    config.data.kwargs.image_size = 12
    config.data.teacher_transforms = ("card:teacher",)
    return config


def test_the_teacher_sees_what_its_card_says(tmp_path):
    config = of_card(folder_of(tmp_path / "net"))
    config.evaluators = {"classification": {"role": "teacher"}}
    experiment = build.build(config)
    batch = experiment.shapes.batch
    assert batch["input"].shape[1:] == (12, 12, 1)
    assert batch["teacher_input"].shape[1:] == (8, 8, 1)
    assert foreign.cards(config)["card:teacher"] == {
        "size": 8,
        "crop": 0.8,
        "interpolation": "bicubic",
        "mean": (0.2,),
        "std": (0.4,),
        "channel_order": "grey",
    }
    # evaluation too: the network is called with its own view of the examples
    state, frozen = experiment.init(jax.random.key(0)), build.frozen_networks(experiment, config)
    found, _ = evaluation.predictions(experiment, state, frozen, "test")
    raw = experiment.dataset.test.read(np.arange(8))
    info = {"index": np.arange(8), "epoch": np.zeros(8, np.int32), "mask": np.ones(8, np.float32)}
    seen = teacher_view(evaluation_batch(experiment, {**raw, **info}, 0))
    own, _ = experiment.models["teacher"].apply(*frozen["teacher"], seen, train=False, rngs={})
    np.testing.assert_allclose(found["teacher"]["logits"], own["logits"], atol=1e-5)
    assert not list(teachers.findings(config, ("teacher",), experiment.dataset))
    key = teacher_cache.make_key
    config.cache.dir = str(tmp_path / "cache")
    plan = build.build(config).cache
    assert plan is not None and plan.views == 1 and not plan.by_seed
    stored = key(config, plan, "teacher", experiment.dataset.train, frozen["teacher"])
    assert stored["view"]["cards"]["card:teacher"]["size"] == 8


def test_a_student_keeps_its_card(tmp_path):
    """The card is stored: neither the network nor its export needs the folder of the weights."""
    folder = folder_of(tmp_path / "net", mean=[0.1])
    config = config_of(folder, folder)
    config.data.kwargs.image_size = 12
    config.data.train_transforms = ("horizontal_flip", "card:student")
    config.data.eval_transforms = ("card:student",)
    config.data.transform_kwargs = {"card:student": {"crop": 1.0}}
    config.objective.kwargs.alpha = 0.5
    loop.train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "net")
    network = dj.load(tmp_path / "run")
    images = np.random.default_rng(0).integers(0, 256, (4, 12, 12, 1), np.uint8)
    seen = np.asarray(network.preprocess(images))
    assert seen.shape == (4, 8, 8, 1)
    np.testing.assert_allclose(seen.mean() * 0.4 + 0.1, images.mean() / 255, atol=0.02)
    exported = dj.load(network.export(tmp_path / "out", formats=("safetensors",)))
    np.testing.assert_array_equal(
        exported(images)["probabilities"], network(images)["probabilities"]
    )
    # a run is a teacher with the card that it was trained with
    config = of_card(str(tmp_path / "run#student"))
    assert foreign.cards(config)["card:teacher"]["mean"] == [0.1]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data.teacher_transforms": "card:teecher"}, "did you mean 'teacher'"),
        ({"data.teacher_transforms": "card:student"}, "weights of student have no card"),
        ({"data.eval_transforms": "card:student"}, "data.eval_transforms: .* have no card"),
        ({"data.teacher_view": "independent"}, "data.teacher_transforms: an independent view"),
        ({"data.transform_kwargs.card:teacher.sise": 3}, "does not accept 'sise'"),
        ({"data.transform_kwargs.card:teacher.size": 0}, "card:teacher.size"),
        ({"data.teacher_transforms": "random_crop"}, "data.teacher_transforms: evaluation draws"),
    ],
)
def test_what_has_no_card_is_refused(tmp_path, changes, told):
    config = config_lib.override(of_card(folder_of(tmp_path / "net")), changes)
    with pytest.raises(ConfigError, match=told) as raised:
        config_lib.validate(config)
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()
    assert len(str(raised.value).splitlines()) <= 2
