"""Linen and NNX networks by `package.module:Symbol`: their arguments, their start, real runs."""

import json
import os
import signal

import jax
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.run import build, preflight, study
from distill_jax.run import config as config_lib
from distill_jax.run.environment import Preempted
from distill_jax.run.train import loop

from .nets_by_name import PIXELS

K = 3


def named(symbol: str, **kwargs):
    return config_lib.role(f"tests.run.nets_by_name:{symbol}", **kwargs)


def make_config(symbol: str, **kwargs):
    config = config_lib.base()
    config.data.name = "synthetic"
    config.data.kwargs = {"n_train": 64, "n_test": 32, "image_size": 6, "num_classes": K}
    config.data.train_transforms = config.data.eval_transforms = ("normalize",)
    config.data.transform_kwargs = {"normalize": {"mean": (0.5,), "std": (0.25,)}}
    config.objective.name = "supervised"
    config.roles.student = named(symbol, **kwargs)
    config.evaluators = {"classification": {}}
    config.batch_size, config.total, config.log.every_steps = 16, 6, 2
    config.eval.every = 3
    config.log.tensorboard = False
    return config


FORMS = {
    "Net": {},
    "Sized": {"din": PIXELS, "dout": K},
    "Flattened": {},
    "Convolved": {"width": 2},
    "Open": {},
    "Called": {},
    "Counted": {},
    "factory": {},
    "defaulted": {},
    "loose": {"num_classes": K},
    "linen": {},
}


FIRST = dict.fromkeys(("Sized", "Flattened", "Called", "Counted", "linen"), K)


@pytest.mark.parametrize("symbol", FORMS)
def test_a_network_gets_what_its_signature_asks_for(symbol):
    experiment = build.build(make_config(symbol, **FORMS[symbol]), shapes_only=True)
    student = experiment.shapes.roles["student"]
    assert student.outputs["logits"].shape == (16, K)
    kernels = [x.shape for x in jax.tree.leaves(student.params) if x.ndim > 1]
    wanted = {"Convolved": (3, 3, 1, 2)}.get(symbol, (PIXELS, FIRST.get(symbol, 8)))
    assert wanted in kernels
    assert "activations" not in student.state

    def apply(params, model_state, key, x):
        outputs, new = experiment.models["student"].apply(
            params, model_state, x, train=True, rngs={"dropout": key}
        )
        return outputs["logits"], new

    key = jax.eval_shape(lambda: jax.random.key(0))
    logits, new = jax.eval_shape(apply, student.params, student.state, key, *student.inputs)
    assert logits.shape == (16, K)
    assert jax.tree.map(np.shape, new) == jax.tree.map(np.shape, student.state)


def test_weights_come_from_the_seed():
    init = build.build(make_config("Net"), shapes_only=True).models["student"].init
    a, again, b = (init(jax.random.key(seed))[0] for seed in (0, 0, 1))
    for layer in ("body", "head"):
        np.testing.assert_array_equal(a[layer]["kernel"], again[layer]["kernel"])
        assert (a[layer]["kernel"] != b[layer]["kernel"]).any()
    assert not np.array_equal(a["body"]["kernel"][:8, :3], a["head"]["kernel"])


@pytest.mark.parametrize(
    ("symbol", "message"),
    [
        ("built", r"roles.student.model: tests.*:built starts from the same weights for every"),
        ("fixed", r"roles.student.model: tests.*:fixed starts from the same weights for every"),
        ("nothing", r"3 is not an NNX module"),
        ("Sized", r"roles.student.kwargs: Sized needs 'din'"),
        ("Listing", r"returns a list\n  it must return an array"),
    ],
)
def test_what_cannot_be_trained_is_refused(symbol, message):
    with pytest.raises(ConfigError, match=message):
        build.build(make_config(symbol), shapes_only=True)


def test_a_part_that_starts_alike_is_warned_of():
    said = []
    for symbol in ("pretrained", "Net"):
        experiment = build.build(make_config(symbol), shapes_only=True)
        preflight.warn(experiment, said.append, alone=True)
    alike = "roles.student.model: body/kernel start with the same values for every seed"
    assert [line for line in said if "every seed" in line] == [f"warning: {alike}"]


def test_a_start_from_zeros_is_no_fixed_start():
    build.build(make_config("Zeros"), shapes_only=True)


def test_weights_of_a_checkpoint_need_no_seed():
    """As of a frozen network, whose values are read."""
    config = make_config("factory")
    config.objective.name = "kd"
    config.roles.teacher = named("built")
    config.roles.teacher.update(init="runs/absent", frozen=True)
    assert build.build(config, shapes_only=True).frozen == ("teacher",)


def values(folder):
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in metrics]


def test_a_study_of_such_networks_side_by_side(tmp_path):
    """Teachers by class, students by factory from the frozen teacher of their seed."""
    config = make_config("Net")
    config.study.replicas, config.study.seeds, config.study.reference = "yes", (0, 1), "teacher"
    student = {"model": "tests.run.nets_by_name:factory"}
    config.study.arms = {
        "teacher": {},
        "kd": {
            "objective": {"name": "kd"},
            "roles": {"student": student, "teacher": {"init": "arm:teacher", "frozen": True}},
        },
    }
    study.run_study(config, tmp_path, log_line=lambda line: None)
    losses = [values(tmp_path / "teacher" / f"seed{seed}")[0]["train/loss"] for seed in (0, 1)]
    assert losses[0] != losses[1]
    for arm in ("teacher", "kd"):
        found = json.loads((tmp_path / arm / "seed1" / "result.json").read_text())
        assert found["status"] == "done" and found["compute"]["side_by_side"] == 2


@pytest.mark.slow
def test_such_a_run_resumes_bitwise(tmp_path, monkeypatch):
    config = make_config("Net")
    loop.train(config, tmp_path / "whole", log_line=lambda line: None)
    feed = build.Feed.__call__

    def stop(self, step, variant="inner"):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return feed(self, step, variant)

    with monkeypatch.context() as patch:
        patch.setattr(build.Feed, "__call__", stop)
        with pytest.raises(Preempted):
            loop.train(config, tmp_path / "parts", log_line=lambda line: None)
    said = []
    loop.train(config, tmp_path / "parts", log_line=said.append)
    assert "continuing from step 4" in said
    assert values(tmp_path / "whole") == values(tmp_path / "parts")
