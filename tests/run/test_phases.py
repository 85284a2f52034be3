"""Runs of a method of two phases: their steps, files, description and checks."""

import contextlib
import json
import signal

import jax
import numpy as np
import pytest

from distill_jax.contrib import replicas
from distill_jax.core.errors import ConfigError
from distill_jax.run import build, describe, preflight
from distill_jax.run import config as config_lib
from distill_jax.run.environment import Preempted
from distill_jax.run.train import loop
from distill_jax.trainer.io.network import read_network

TOTAL, ALONE = 6, 3


def make_config(name="tests.run.phased:Phased", teacher="", **kwargs):
    config = config_lib.base()
    config.data.name = "synthetic"
    config.data.kwargs = {"n_train": 64, "n_test": 32, "image_size": 6, "num_classes": 3}
    config.data.train_transforms = config.data.eval_transforms = ("normalize",)
    config.data.transform_kwargs = {"normalize": {"mean": (0.5,), "std": (0.25,)}}
    config.objective.name, config.objective.kwargs = name, kwargs
    config.roles.student = config_lib.role("mlp", hidden=(8,))
    if teacher:
        config.roles.teacher = config_lib.role("mlp", hidden=(12,))
        config.roles.teacher.update(init=teacher, frozen=True)
    config.evaluators = {"classification": {}}
    config.batch_size, config.total, config.log.every_steps = 16, TOTAL, 2
    config.eval.every, config.checkpoint.every = 4, 2
    config.log.tensorboard = False
    return config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    config = make_config("supervised")
    config.roles.student = config_lib.role("mlp", hidden=(12,))
    loop.train(config, folder, log_line=lambda line: None)
    return str(folder)


@pytest.fixture(scope="module")
def trained(teacher, tmp_path_factory):
    config, folder = make_config(teacher=teacher), tmp_path_factory.mktemp("run")
    experiment, said = build.build(config), []
    result = loop.train(config, folder, make_experiment=lambda _: experiment, log_line=said.append)
    return config, experiment, folder, result, said


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in lines]


def test_a_phase_is_one_compilation_without_the_others_networks(trained):
    _, experiment, _, result, said = trained
    assert [phase.start for phase in experiment.phases] == [0, ALONE]
    assert [experiment.variant(step) for step in range(5)] == ["inner"] * 3 + ["inner/2"] * 2
    compiled = experiment.caches.steps
    assert compiled.keys() == {"inner", "inner/2"} and result["status"] == "done"
    frozen = [step.args_info[0][1] for step in compiled.values()]
    assert [set(networks) for networks in frozen] == [{"teacher"}, set()]
    flops = [step.cost_analysis()["flops"] for step in compiled.values()]
    assert flops[1] < 0.8 * flops[0]
    assert experiment.flops_per_step == pytest.approx(np.mean(flops) * experiment.devices)
    warned = [line for line in said if line.startswith("warning")]
    assert all(line.startswith("warning: data.held_out") for line in warned)


def test_terms_are_logged_in_their_phase(trained):
    _, _, folder, _, _ = trained
    found = {row["step"]: row for row in rows(folder) if "train/loss" in row}
    assert [step for step, row in found.items() if "train/distillation" in row] == [2, 4]
    assert [step for step, row in found.items() if "train/cross_entropy" in row] == [2, 4, 6]


def test_a_run_that_stops_in_and_between_phases_is_the_same(trained, tmp_path):
    config, experiment, whole, _, _ = trained

    def stop(line):
        if line.startswith("step "):  # the first step of this start is done
            signal.raise_signal(signal.SIGTERM)

    for stops in range(TOTAL):
        try:
            loop.train(config, tmp_path, make_experiment=lambda _: experiment, log_line=stop)
        except Preempted:
            continue
        assert stops == TOTAL - 1
    assert rows(tmp_path) == rows(whole)
    first, second = (read_network(folder)[0] for folder in (whole, tmp_path))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, first, second)))


def test_a_description_names_the_phases(teacher):
    text = describe.describe(make_config(teacher=teacher, alone=ALONE))
    assert "Phased from step 0, Supervised from step 3" in text
    assert "== step from step 0 on, 50.0% of all" in text
    assert "== step from step 3 on, 50.0% of all" in text


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alone": TOTAL}, "begins at step 6 of 6, so never"),
        ({"alone": 0}, r"begin at the steps \[0, 0\]"),
        ({"alone": "3 moons"}, "unknown unit 'moons'"),
        ({"alone": "120 %"}, "more than 100 %"),
    ],
)
def test_starts_that_do_not_fit(teacher, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        experiment = build.build(make_config(teacher=teacher, **kwargs), shapes_only=True)
        preflight.warn(experiment, lambda line: None, alone=True)


@pytest.mark.slow
def test_a_weighting_learns_in_both_phases(teacher, tmp_path):
    config = make_config(teacher=teacher, alone=ALONE)
    config.roles.weighting = config_lib.role("ratio_mlp", hidden=(4,))
    config.weighting.name, config.weighting.loss_terms = "meta_weight_net", ("cross_entropy",)
    config.bilevel.every, config.bilevel.outer_batch, config.data.held_out = 2, 0.5, 0.5
    experiment = build.build(config)
    due = ["outer", "inner", "outer", "inner/2", "outer/2", "inner/2"]
    assert [experiment.variant(step) for step in range(TOTAL)] == due
    shares = {name: experiment.share(name) for name in experiment.variants}
    assert shares == pytest.approx({n: due.count(n) / TOTAL for n in set(due)})

    def stop(line):
        if line.startswith("step "):
            signal.raise_signal(signal.SIGTERM)

    def train(folder, log_line=lambda line: None):
        return loop.train(config, folder, make_experiment=lambda _: experiment, log_line=log_line)

    train(tmp_path / "whole")
    for _ in range(TOTAL):
        with contextlib.suppress(Preempted):
            train(tmp_path / "parts", stop)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    networks = [
        [read_network(tmp_path / name, role=role)[0] for role in ("student", "weighting")]
        for name in ("whole", "parts")
    ]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, *networks)))


def test_such_runs_do_not_go_side_by_side(trained):
    assert replicas.refusal(trained[1]) == "a method of several phases"
