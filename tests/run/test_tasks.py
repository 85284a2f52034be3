"""Runs on data of several labels and of real values, and on classes of which some are unknown."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from distill_jax import main
from distill_jax.core.errors import ConfigError
from distill_jax.data.source import example_labels
from distill_jax.report.of_run import write_run_report
from distill_jax.run import build, export, load
from distill_jax.run import config as config_lib
from distill_jax.run.preflight import findings
from distill_jax.run.train import evaluation
from distill_jax.run.train.loop import train

N, D = 60, 3


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, r = tmp_path_factory.mktemp("tasks"), np.random.RandomState(0)
    x = {part: r.randn(N, D).astype(np.float32) for part in ("train", "test")}
    w = r.randn(D, 2).astype(np.float32)
    tasks = {
        "classification": lambda x: (x @ w).argmax(1),
        "multilabel": lambda x: (x @ w > 0).astype(np.uint8),
        "regression": lambda x: 5 * (x @ w) + 3,
        "unknown": lambda x: np.where(np.arange(N) % 3 == 0, -1, (x @ w).argmax(1)),
    }
    for name, label in tasks.items():
        arrays = {f"x_{part}": x[part] for part in x} | {f"y_{part}": label(x[part]) for part in x}
        np.savez(folder / f"{name}.npz", **arrays)
    return folder


def make_config(files, task, **changes):
    config = config_lib.base()
    config.data.name = "npz_file"
    config.data.kwargs = {"path": str(files / f"{task}.npz"), "task": task}
    if task == "unknown":
        config.data.kwargs = {"path": str(files / f"{task}.npz"), "ignore_label": -1}
    config.data.held_out = 0.2
    config.batch_size, config.total = 16, 6
    config.objective.name = "kd"
    config.roles.student = config_lib.role("mlp", hidden=(4,))
    config.roles.teacher = config_lib.role("mlp", hidden=(8,))
    config.roles.teacher.frozen, config.roles.teacher.init = True, "unread"
    config.evaluators = {"classification" if task == "unknown" else task: {}}
    return config_lib.override(config, changes)


def test_a_method_takes_task_and_scale_from_the_data(files):
    for task in ("classification", "multilabel", "regression"):
        experiment = build.build(make_config(files, task))
        objective = experiment.objective
        assert objective.task == task
        assert experiment.shapes.roles["student"].outputs["logits"].shape[-1] == 2
        if task == "regression":
            std = example_labels(experiment.dataset.train).std(0)
            np.testing.assert_allclose(objective.label_scale, std, rtol=1e-5)
        assert not [f for f in findings(experiment) if f.kind == "error"]


def test_balanced_weights_are_counted_on_the_training_part(files):
    for task in ("classification", "multilabel", "unknown"):
        config = make_config(files, task)
        config.objective.kwargs.class_weights = "balanced"
        experiment = build.build(config)
        labels = example_labels(experiment.dataset.train)
        if task == "unknown":
            labelled = experiment.dataset.train.read(np.arange(len(labels)))["labelled"]
            labels = labels[labelled > 0]
        counts = np.bincount(labels, minlength=2) if labels.ndim == 1 else labels.sum(0)
        assert experiment.objective.label_counts == (*counts, len(labels))


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        (
            "multilabel",
            {"objective.name": "dkd"},
            "(?s)dkd is for.*kd and supervised",
        ),
        ("regression", {"evaluators.calibration": {}}, "(?s)'calibration' is for.*use regression"),
        ("classification", {"evaluators.multilabel": {}}, "use classification in its place"),
        ("multilabel", {"data.train_transforms": ("mixup",)}, "mixup mixes classes"),
        ("unknown", {"data.train_transforms": ("mixup",)}, "(?s)some are unknown.*ignore_label"),
        ("multilabel", {"data.corrupt.label_noise": 0.1}, "corrupt.label_noise: label_noise is of"),
        ("regression", {"roles.student.kwargs.num_classes": 3}, "2 classes and the student 3"),
        ("regression", {"objective.kwargs.focal_gamma": 1.0}, "a regression has no focal_gamma"),
        ("multilabel", {"cache.dir": "stored", "cache.top_k": 1}, "cache.top_k"),
        (
            "regression",
            {
                "weighting.name": "trilateral",
                "weighting.loss_terms": ("squared_error", "distillation"),
                "bilevel.outer_batch": 0.5,
                "data.outer": 0.0,
            },
            "class means",
        ),
    ],
)
def test_what_is_of_another_task_is_refused_by_name(files, task, changes, message):
    config = make_config(files, task)
    if "weighting.name" in changes:
        config.roles.weighting = config_lib.role("ratio_mlp", hidden=(4,))
    with config.unlocked():
        for path, value in changes.items():
            if path.startswith("evaluators."):
                config.evaluators[path.partition(".")[2]] = value
            elif ".kwargs." in path:
                group, _, key = path.rpartition(".")
                target = config
                for part in group.split("."):
                    target = target[part]
                target[key] = value
            else:
                config = config_lib.override(config, {path: value})
    with pytest.raises(ConfigError, match=message):
        build.build(config)


def test_examples_of_unknown_class_count_in_no_metric(files):
    """What is measured is what is measured on the others; predictions of the others are kept."""
    config = make_config(files, "unknown")
    config.objective.name = "supervised"
    del config.roles["teacher"]
    experiment = build.build(config)
    state = build.initial_state(experiment, jax.random.key(0), config)
    metrics, found = evaluation.evaluate(experiment, state, {}, "test")
    known = np.arange(N) % 3 > 0
    np.testing.assert_array_equal(found["index"], np.flatnonzero(known))
    labels = np.load(files / "unknown.npz")["y_test"][known]
    right = found["outputs"]["student"]["logits"].argmax(1) == labels
    np.testing.assert_allclose(metrics["test/accuracy"], right.mean(), rtol=1e-6)
    experiment = dataclasses.replace(experiment, evaluators={"every": Every()})
    metrics, found = evaluation.evaluate(experiment, state, {}, "test")
    assert metrics == {"test/n": N} and ((found["labelled"] > 0) == known).all()


class Every:
    """Takes examples without a known class."""

    unlabelled = True

    @property
    def outputs(self):
        return {"student": ("logits",)}

    def __call__(self, outputs, batch):
        return {"n": len(outputs["student"]["logits"])}


def run(spec, folder, *flags):
    argv = [f"--config=configs/distill/{spec},smoke", f"--workdir={folder}", *flags]
    assert main.main(["distill-jax", *argv]) == 0
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("task", [pytest.param("multilabel", marks=pytest.mark.slow), "regression"])
def test_a_run_ends_with_a_report(tmp_path, task):
    result = run(f"{task}.py:teacher", tmp_path)
    name = "macro_auc" if task == "multilabel" else "rmse"
    assert result["task"] == task
    assert np.isfinite(result["metrics"][f"test/{name}"])
    page = write_run_report(tmp_path).read_text()
    assert name in page
    assert "Confusion" not in page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "names"),
    [
        ("multilabel.py:teacher", ("bilevel", "bilevel,losses")),
        ("regression.py:teacher", ("bilevel",)),
    ],
)
def test_a_ratio_is_learned_of_every_task(config, names, tmp_path):
    run(config, tmp_path / "teacher")
    for name in names:
        spec = config.replace("teacher", name)
        init = f"--config.roles.teacher.init={tmp_path / 'teacher'}"
        assert run(spec, tmp_path / name, init)["status"] == "done"


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_outputs_of_a_loaded_network_are_of_its_task(files, tmp_path, task, stored, monkeypatch):
    config = make_config(files, task)
    config.objective.name = "supervised"
    del config.roles["teacher"]
    names = {"classification": "accuracy", "multilabel": "micro_f1", "regression": "r2"}
    config.eval.metric = f"held_out/{names[task]}"
    train(config, tmp_path / "run", log_line=lambda line: None)
    if not stored:  # as by an earlier version
        of_step = load.read_meta

        def without_task(folder):
            meta = of_step(folder)
            meta["signature"].pop("task", None)
            return meta

        monkeypatch.setattr(load, "read_meta", without_task)
    network = load.load(tmp_path / "run")
    x = np.load(files / f"{task}.npz")["x_test"]
    found = network({"numeric": x} if "numeric" in network.input else x)
    logits = found["logits"]
    exported = {
        "classification": {"probabilities": np.asarray(jax.nn.softmax(logits))},
        "multilabel": {"probabilities": 1 / (1 + np.exp(-logits))},
        "regression": {"logits": logits},
    }[task]
    assert ("probabilities" in found) == ("probabilities" in exported)
    program = export.make_program(network)
    inputs = next(iter(program.inputs))
    got = program.function(program.weights, {inputs: x})
    assert set(got) == set(exported)
    for name, want in exported.items():
        np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-6)
