"""Evaluators that need more than the measured split, and what encoders are compared with."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from distill_jax import report
from distill_jax.contrib import replicas
from distill_jax.core import partition
from distill_jax.core.errors import ConfigError
from distill_jax.data import loader
from distill_jax.data.source import example_ids, example_labels
from distill_jax.evaluators import knn, probe
from distill_jax.run import build
from distill_jax.run import config as config_lib
from distill_jax.run.build import controls
from distill_jax.run.build import experiment as experiment_lib
from distill_jax.run.train import evaluation, loop


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorder:
    """Remembers what it was called with."""

    calls: list = dataclasses.field(default_factory=list)
    most: int | None = None
    controls: tuple[str, ...] = ()

    @property
    def outputs(self):
        return {"student": ("embedding",)}

    @property
    def parts(self):
        return {"train": self.most}

    def __call__(self, outputs, batch, *, parts, split):
        self.calls.append((outputs, batch, parts, split))
        return {"seen": float(len(parts["train"][1]["label"]))}


def config(**changes):
    made = config_lib.base()
    made.objective.name = "supervised"
    made.data.name = "synthetic"
    made.data.kwargs = {"n_train": 90, "n_test": 40, "image_size": 6, "channels": 1}
    made.data.train_transforms = made.data.eval_transforms = ("scale",)
    made.roles.student = config_lib.role("mlp", hidden=(5,))
    made.evaluators = {"knn": {"k": 3}, "representation": {}}
    made.batch_size = 16
    made.total = 4
    made.eval.every = 2
    made.eval.batch_size = 32
    made.eval.metric = "held_out/rankme"
    made.log.tensorboard = False
    return config_lib.override(made, changes)


def built(*evaluators, **changes):
    experiment = build.build(config(**changes))
    named = {f"e{i}": evaluator for i, evaluator in enumerate(evaluators)}
    return dataclasses.replace(experiment, evaluators=named)


def state_of(experiment, seed=0):
    key = jax.device_put(jax.random.key(seed), partition.replicated(experiment.mesh))
    return build.initial_state(experiment, key, experiment.config)


def test_a_part_is_collected_once_in_bounds_and_beside_its_split(monkeypatch):
    """Two evaluators, one pass; the measured split is not collected a second time."""
    first, second = Recorder(most=10), Recorder(most=30)
    experiment = built(first, second)
    collected, collect = [], evaluation.collect

    def counting(experiment, predict, split, **kwargs):
        collected.append(split)
        return collect(experiment, predict, split, **kwargs)

    monkeypatch.setattr(evaluation, "collect", counting)
    state = state_of(experiment)
    metrics, _ = evaluation.evaluate(experiment, state, {}, "test")
    assert collected == ["test", "train"] and metrics == {"test/seen": 30}
    outputs, batch, parts, split = first.calls[0]
    assert split == "test" and set(parts) == {"train"}
    rows = np.linspace(0, len(experiment.dataset.train) - 1, 30).round().astype(int)
    np.testing.assert_array_equal(
        parts["train"][1]["index"], example_ids(experiment.dataset.train)[rows]
    )
    np.testing.assert_array_equal(batch["label"], example_labels(experiment.dataset.test))
    assert second.calls[0][2]["train"] is parts["train"]
    assert outputs["student"]["embedding"].shape == (40, 5)
    evaluation.evaluate(experiment, state, {}, "train")
    assert collected == ["test", "train", "train"]
    outputs, batch, parts, split = first.calls[1]
    assert split == "train" and parts["train"][1] is batch


def test_controls_are_the_input_and_the_network_of_the_seed_before_training():
    recorder = Recorder(controls=("raw", "initial"))
    experiment = built(recorder)
    state = state_of(experiment, seed=3)
    want, example_info = evaluation.predictions(experiment, state, {}, "test")
    metrics = evaluation.measure_controls(experiment, 3)
    assert metrics == {f"test/seen_{c}": len(experiment.dataset.train) for c in recorder.controls}
    raw, initial = (call[0]["student"]["embedding"] for call in recorder.calls)
    np.testing.assert_allclose(initial, want["student"]["embedding"], atol=1e-6)
    images = experiment.dataset.test.read(np.arange(40))["input"]
    np.testing.assert_allclose(raw, images.reshape(40, -1) / 255, atol=1e-6)
    np.testing.assert_array_equal(recorder.calls[0][1]["index"], example_info["index"])
    inside = recorder.calls[0][2]["train"][0]["student"]["embedding"]
    assert inside.shape == (len(experiment.dataset.train), 36)


def untrained_convnet(**changes):
    made = config(**{"data.held_out": 0.0, "eval.metric": "", **changes})
    made.roles.student = config_lib.role("convnet", widths=(3, 4))
    recorder = Recorder(controls=("initial",))
    experiment = dataclasses.replace(build.build(made), evaluators={"e": recorder})

    @jax.jit
    def apply(params, state, images):
        rngs = {"dropout": jax.random.key(0)}
        images = images.astype(np.float32) / 255
        return experiment.models["student"].apply(params, state, images, train=True, rngs=rngs)

    return experiment, recorder, apply


def test_the_network_before_training_has_statistics_of_training_data():
    """Of one batch they are those that it is normalized with in training."""
    experiment, recorder, apply = untrained_convnet(**{"batch_size": 88})
    rows = controls.spread(90, 88)
    images = experiment.dataset.train.read(rows)["input"]
    params, state = build.untrained(experiment, jax.random.key(3))["student"]
    want = apply(params, state, images)[0]["embedding"]
    evaluation.measure_controls(experiment, 3)
    measured = recorder.calls[0][2]["train"][0]["student"]["embedding"]
    np.testing.assert_allclose(measured[rows], want, atol=1e-4)


def test_another_pass_leaves_the_statistics_of_a_network_before_training(monkeypatch):
    batches, eval_batches = [], loader.eval_batches

    def recorded(*args, **kwargs):
        for batch in eval_batches(*args, **kwargs):
            batches.append(batch)
            yield batch

    monkeypatch.setattr(loader, "eval_batches", recorded)
    monkeypatch.setattr(controls, "STATISTICS_BATCHES", 3)
    experiment, _, apply = untrained_convnet()
    params, settled = build.untrained(experiment, jax.random.key(3))["student"]
    assert len(batches) == 3 and all(batch["mask"].all() for batch in batches)
    state = settled
    for batch in batches:
        state = apply(params, state, batch["input"])[1]
    for found, want in zip(jax.tree.leaves(settled), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6)


def test_a_wide_input_is_no_control(monkeypatch):
    monkeypatch.setattr(experiment_lib, "RAW_WIDTH", 35)
    experiment = built(Recorder(controls=("raw", "initial")))
    assert set(evaluation.measure_controls(experiment, 0)) == {"test/seen_initial"}
    build.check_metric(experiment, "test/seen_initial", where="study.metric")
    with pytest.raises(ConfigError, match="seen_raw"):
        build.check_metric(experiment, "test/seen_raw", where="study.metric")
    with pytest.raises(ConfigError, match="seen_initial"):
        build.check_metric(experiment, "held_out/seen_initial", where="eval.metric")


def test_an_empty_part_is_refused():
    with pytest.raises(ConfigError, match="held_out part, which is empty"):
        build.build(config(**{"data.held_out": 0.0, "eval.metric": "", "evaluators.probe": {}}))


def test_a_run_chooses_by_rank_and_reports_its_embeddings(tmp_path):
    """The whole path, without a label in the choice of the state."""
    made = config(**{"evaluators.few_label_probe": {"per_class": (1,), "draws": 2}})
    result = loop.train(made, tmp_path, log_line=lambda line: None)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    ranks = {r["step"]: r["held_out/rankme"] for r in records if "held_out/rankme" in r}
    assert result["best"]["step"] == max(ranks, key=ranks.__getitem__)
    names = ("knn_accuracy", "rankme", "few_label_accuracy_1_per_class")
    for name in (f"test/{n}{c}" for n in names for c in ("", "_raw", "_initial")):
        assert np.isfinite(result["metrics"][name]) and np.isfinite(result["best"][name])
    assert not any("_initial" in name for r in records for name in r if name[:4] == "held")
    stored = dict(np.load(tmp_path / "embeddings.npz"))
    assert stored["embedding"].shape == (40, 5)
    shown, unit = stored["neighbours"], stored["embedding"].astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-30)
    similar = unit @ unit.T - 9 * np.eye(40)
    best = np.sort(similar[shown[:, 0]], axis=1)[:, ::-1][:, : shown.shape[1] - 1]
    np.testing.assert_allclose(stored["cosine"][:, 1:], best, atol=1e-5)
    assert stored["neighbour_images"].shape == (*shown.shape, 6, 6, 1)
    assert len(stored["spectra"]) == len(stored["spectra_of"]) == 4  # two steps, before and after
    text = report.write_run_report(tmp_path).read_text()
    section = re.search(r'<section id="embeddings">.*?</section>', text, re.S)
    assert section is not None
    for wanted in ("component 1", "Eigenvalues", "nearest others"):
        assert wanted in section[0]
    assert section[0].count("<circle") >= 40
    (tmp_path / "embeddings.npz").write_bytes(b"damaged")
    assert "embeddings.npz is damaged" in report.write_run_report(tmp_path).read_text()


def test_replicas_measure_what_single_runs_do(tmp_path):
    made = config(**{"data.resident": "yes", "total": 2})
    members = []
    for seed in (0, 1):
        one = config_lib.override(made, {"seed": seed})
        members.append(replicas.Member("a", seed, one, tmp_path / f"replica{seed}", ""))
    found = replicas.train(members, strategy="vmap", log_line=lambda line: None)
    alone = loop.train(members[1].config, tmp_path / "alone", log_line=lambda line: None)
    for name, value in alone["metrics"].items():
        if name.startswith("test/"):
            assert found[1]["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-3), name
    assert found[0]["metrics"]["test/rankme_initial"] != found[1]["metrics"]["test/rankme_initial"]


def test_evaluators_state_what_they_need():
    assert knn.make(bank=7).parts == {"train": 7}
    assert probe.make(max_examples=9).parts == {"train": 9, "held_out": 9}
