"""What evaluation computes on each device, and which end of a metric a study calls better."""

import jax
import numpy as np
import pytest

from distill_jax.core import partition
from distill_jax.data import loader
from distill_jax.run import build, flags, masked, study
from distill_jax.run import config as config_lib
from distill_jax.run.train import evaluation, loop


def make_config(**changes):
    config = config_lib.base()
    config.data.name = "synthetic"
    config.data.kwargs = {"n_train": 64, "n_test": 32, "image_size": 6, "channels": 1}
    config.data.train_transforms = config.data.eval_transforms = ("scale",)
    config.objective.name = "supervised"
    config.roles.student = config_lib.role("mlp", hidden=(32,))
    config.evaluators = {"classification": {}}
    config.batch_size = config.eval.batch_size = 32
    config.total = 2
    return config_lib.override(config, changes)


def test_devices_divide_what_is_predicted():
    whole = build.build(make_config())
    batch = next(loader.eval_batches(whole.dataset.test, batch_size=32))
    flops, said = [], []
    for n in (1, 4):
        mesh = partition.make_mesh(devices=jax.devices()[:n])
        experiment = whole.on_mesh(mesh)
        state = build.initial_state(experiment, jax.random.key(0), experiment.config)
        compiled = experiment.predict.lower(state, {}, batch).compile()
        flops.append(compiled.cost_analysis()["flops"])
        said.append(np.asarray(experiment.predict(state, {}, batch)["student"]["logits"]))
    assert flops[1] < 0.3 * flops[0]
    np.testing.assert_allclose(*said, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("compared", "changes", "mode"),
    [
        ("test/kl", {}, "min"),
        ("test/uniformity_initial", {}, "min"),
        ("test/knn_accuracy", {"eval.metric": "held_out/nll", "eval.mode": "min"}, "max"),
        ("test/mine", {"eval.metric": "held_out/mine", "eval.mode": "min"}, "min"),
        ("test/mine", {"eval.metric": "held_out/nll", "eval.mode": "min"}, "max"),
    ],
)
def test_a_study_knows_which_end_is_better(compared, changes, mode):
    assert study._mode(make_config(**{"study.metric": compared, **changes})) == mode


def test_a_batch_larger_than_the_data_is_of_the_data():
    config = make_config()
    config.eval.batch_size = 500_000_000
    experiment = build.build(config)
    parts = (experiment.dataset.train, experiment.dataset.held_out, experiment.dataset.test)
    largest = max(map(len, parts))
    assert largest <= experiment.eval_batch_size < 2 * largest + 8


def test_what_ends_a_run_is_no_late_compilation(tmp_path, monkeypatch):
    """Pictures, the test split, controls, and the best state where that is an earlier one."""
    monkeypatch.setattr(masked, "store", lambda *_, **__: jax.jit(lambda x: x + 1)(1.0))
    steps = iter([3.0, 2.0, 1.0])
    measure = evaluation.measure

    def worse(experiment, outputs, example_info, split, parts=None):
        found = measure(experiment, outputs, example_info, split, parts)
        return found | ({"held_out/accuracy": next(steps)} if split == "held_out" else {})

    monkeypatch.setattr(evaluation, "measure", worse)
    said = []
    config = make_config(**{"total": 3, "eval.every": 1, "log.tensorboard": False})
    result = loop.train(config, tmp_path, log_line=said.append)
    assert result["best"]["step"] == 1
    assert not [line for line in said if "compiled again" in line]
    assert result["compute"]["compilations_after_start"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mae", "ijepa"])
def test_methods_with_pictures_compile_nothing_late(name, tmp_path):
    said = []
    result = loop.train(flags.load(f"configs/ssl/{name}.py:smoke"), tmp_path, log_line=said.append)
    assert (tmp_path / "masks.npz").exists()
    assert not [line for line in said if "compiled again" in line]
    assert result["compute"]["compilations_after_start"] == 0
