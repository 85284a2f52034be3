"""Runs side by side leave the folders that they would leave alone."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.contrib import replicas
from distill_jax.core import replicas as replicas_lib
from distill_jax.core.api import Objective, Terms
from distill_jax.core.errors import NonFiniteError
from distill_jax.run import build, study
from distill_jax.run import config as config_lib
from distill_jax.run.environment import Preempted
from distill_jax.run.train import loop
from distill_jax.trainer.io import checkpoint
from distill_jax.trainer.io.network import read_network

LR, KD = (("slow", 0.01), ("fast", 0.05)), (("cool", 2.0), ("warm", 5.0))


def make_config(**overrides):
    """A teacher a seed, and students that differ in the rate, the temperature or the ratio."""
    config = config_lib.base()
    config.data.name = "synthetic"
    config.data.kwargs = {"n_train": 160, "n_test": 48, "image_size": 6, "channels": 1}
    config.data.train_transforms = ("horizontal_flip", "normalize")
    config.data.eval_transforms = ("normalize",)
    config.data.transform_kwargs = {"normalize": {"mean": (0.5,), "std": (0.25,)}}
    config.objective.name = "supervised"
    config.roles.student = config_lib.role("mlp", hidden=(8,))
    config.evaluators = {"classification": {}}
    config.batch_size, config.total, config.log.every_steps = 16, 12, 4
    config.optim.name, config.optim.warmup = "momentum", 2
    config.eval.every = 4
    config.log.tensorboard = False
    config.study.replicas = "yes"
    config.study.seeds = (0, 1)
    config.study.arms = {
        "teacher": {"roles": {"student": {"kwargs": {"hidden": (16,)}}}},
        **{name: {"optim": {"lr": rate}} for name, rate in LR},
        **{name: distilled(temperature, 0.5) for name, temperature in KD},
    }
    config.study.reference = "slow"
    return config_lib.override(config, overrides)


def distilled(temperature, alpha):
    return {
        "objective": {"name": "kd", "kwargs": {"temperature": temperature, "alpha": alpha}},
        "roles": {"teacher": {"init": "arm:teacher", "frozen": True}},
    }


def folders(workdir):
    return sorted(path.parent for path in workdir.glob("*/*/config.json"))


def rows(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def result(folder):
    found = json.loads((folder / "result.json").read_text())
    return {k: v for k, v in found.items() if k != "compute"}


def assert_close(a, b, tolerance):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_close(a[name], b[name], tolerance)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_close(x, y, tolerance)
    elif isinstance(a, float):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    else:
        assert a == b


def parameters(folder):
    """All that the newest checkpoint holds of the student, as the ordinary reader gives it."""
    config = config_lib.from_json((folder / "config.json").read_text())
    experiment = build.build(config)
    state = experiment.abstract_state
    newest = folder / "checkpoints" / str(max(checkpointed(folder)))
    like = (state.params["student"], state.model_state["student"])
    return read_network(newest, like=like, where="test")


def checkpointed(folder):
    return checkpoint.Checkpointer(folder / "checkpoints").steps()


def count_compilations(monkeypatch):
    """Counts the compiled steps; those of runs by themselves are `Experiment.compile_step`."""
    counts = {"alone": 0, "replicas": 0}
    alone, together = build.compile_step, replicas.Replicas.compile

    def compile_step(experiment, fed, variant="inner"):
        counts["alone"] += variant not in experiment.caches.steps
        return alone(experiment, fed, variant)

    def compile_replicas(self, step):
        together(self, step)
        counts["replicas"] += len(self.update)

    monkeypatch.setattr(build, "compile_step", compile_step)
    monkeypatch.setattr(replicas.Replicas, "compile", compile_replicas)
    return counts


def test_replicas_equal_runs_alone(tmp_path, monkeypatch):
    with jax.enable_x64(True):
        counts, said = count_compilations(monkeypatch), []
        config = make_config(**{"study.seeds": (0, 1, 2)})  # six replicas on four devices: two pad
        study.run_study(config, tmp_path / "replicas", log_line=said.append)
        # Five arms times three seeds: the teachers, both rates, both temperatures.
        assert counts == {"alone": 0, "replicas": 3}
        assert not [line for line in said if "one run after the other" in line]
        for arm, seed in (("teacher", 2), ("fast", 1)):
            one, other = (
                study.run_folder(tmp_path / name, arm, seed) for name in ("replicas", "alone")
            )
            single = config_lib.from_json((one / "config.json").read_text())
            loop.train(single, other, arm=arm, log_line=said.append)
            assert_close(result(one), result(other), 1e-6)
            assert_close(rows(one), rows(other), 1e-6)
            with np.load(one / "predictions.npz") as a, np.load(other / "predictions.npz") as b:
                assert set(a) == set(b)
                for name in a:
                    np.testing.assert_allclose(a[name], b[name], rtol=1e-6, atol=1e-6)
            assert result(one)["best"]["step"] in checkpointed(one)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
                parameters(one),
                parameters(other),
            )
        seeds = [
            parameters(folder) for folder in folders(tmp_path / "replicas") if "warm" in str(folder)
        ]
    kernels = [params["Dense_0"]["kernel"] for params, _ in seeds]
    assert len(kernels) == 3 and not np.allclose(kernels[0], kernels[1])
    again = []
    study.run_study(config, tmp_path / "replicas", log_line=again.append)
    assert counts == {"alone": 2, "replicas": 3}
    assert not [line for line in again if "failed" in line]


def test_runs_with_faults_of_their_own_seed_share_neither_data_nor_a_program(tmp_path):
    noise = {"data.corrupt": {"label_noise": 0.5, "teacher_damage": 0.5, "seed": "run"}}

    def labels_and_shifts(config, seed):
        made = study._OneExperiment(None)
        experiment = [made(config_lib.override(config, {"seed": s})) for s in (1 - seed, seed)][1]
        rows = experiment.dataset.train.read(np.arange(len(experiment.dataset.train)))
        return np.stack([rows["label"], rows["teacher_shift"]])

    config = make_config(**noise)
    alone = study.arm_config(config, "slow", 0, tmp_path)
    one, again, other = (labels_and_shifts(alone, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any(axis=1).all()

    groups = study._groups(config, study.ordered_arms(config), tmp_path)
    assert all(len({member.seed for member in group}) == 1 for group in groups)
    assert {len(group) for group in groups} == {1, 2}  # rates, temperatures: still side by side
    shared = study._groups(make_config(), study.ordered_arms(config), tmp_path)
    assert sorted(len(group) for group in shared) == [2, 4, 4]


def test_ways_agree(tmp_path):
    def double(w, x, key):
        noise = jax.random.normal(key, x.shape)
        return {"y": w[None] * x + noise, "m": x.sum()}

    mesh = replicas_lib.make_replica_mesh(6)
    assert mesh.shape["replica"] == 4 and mesh.size == 8
    mesh = replicas_lib.make_replica_mesh(2, jax.devices()[:2])
    w, keys = jnp.arange(12.0).reshape(4, 3), jax.random.split(jax.random.key(0), 4)
    x = jnp.ones((5, 3))
    found = [
        jax.jit(
            replicas_lib.over_replicas(
                double, mesh=mesh, shared=(False, True, False), strategy=strategy
            )
        )(w, x, keys)
        for strategy in ("vmap", "unroll", "loop")
    ]
    for i in range(4):
        alone = double(w[i], x, keys[i])
        for mapped in found:
            np.testing.assert_allclose(mapped["y"][i], alone["y"], rtol=1e-6)
            np.testing.assert_allclose(mapped["m"][i], alone["m"], rtol=1e-6)


def members(tmp_path, config, arms=("slow",)):
    return [
        replicas.Member(
            arm,
            seed,
            study.arm_config(config, arm, seed, tmp_path),
            study.run_folder(tmp_path, arm, seed),
            "",
        )
        for arm in arms
        for seed in config.study.seeds
    ]


@pytest.mark.slow
def test_a_convolutional_network_goes_side_by_side(tmp_path):
    change = {"roles.student.model": "convnet", "roles.student.kwargs": {"widths": (2, 2)}}
    config = make_config(**change, **{"total": 3})
    with jax.enable_x64(True):
        replicas.train(
            members(tmp_path / "replicas", config), strategy="loop", log_line=lambda line: None
        )
        single = members(tmp_path / "alone", config)[1]
        loop.train(single.config, single.workdir, arm="slow", log_line=lambda line: None)
        assert_close(
            result(tmp_path / "replicas/slow/seed1"), result(tmp_path / "alone/slow/seed1"), 1e-6
        )


def test_a_stopped_group_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    config = make_config()
    replicas.train(members(tmp_path / "whole", config), log_line=lambda line: None)
    feed = replicas.Replicas.feed

    def stop_at(self, step, variant="inner"):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return feed(self, step, variant)

    monkeypatch.setattr(replicas.Replicas, "feed", stop_at)
    with pytest.raises(Preempted):
        replicas.train(members(tmp_path / "parts", config), log_line=lambda line: None)
    monkeypatch.setattr(replicas.Replicas, "feed", feed)
    said = []
    replicas.train(members(tmp_path / "parts", config), log_line=said.append)
    assert any("continuing from step 7" in line for line in said)
    for one, other in zip(folders(tmp_path / "whole"), folders(tmp_path / "parts"), strict=True):
        jax.tree.map(np.testing.assert_array_equal, parameters(one), parameters(other))
        assert result(one) == result(other)
        kept = [row for row in rows(other) if row["step"] != 7]
        assert [measured(row) for row in rows(one)] == [measured(row) for row in kept]


def measured(row):
    """A line without training means, which an interruption cuts in two."""
    return {name: value for name, value in row.items() if not name.startswith("train/")}


@pytest.mark.slow
def test_replicas_that_died_apart_go_on_from_their_last_common_step(tmp_path):
    config = make_config(**{"checkpoint.every": 4})
    group = members(tmp_path, config)
    replicas.train(group, log_line=lambda line: None)
    expected = [parameters(member.workdir) for member in group]
    for member in group:
        (member.workdir / "result.json").unlink()
    damaged = next((group[0].workdir / "checkpoints" / "12").glob("role.student/**/d/*"))
    damaged.write_bytes(b"damaged")
    said = []
    replicas.train(group, log_line=said.append)
    assert any("damaged" in line for line in said)
    assert any("continuing from step 8" in line for line in said)
    for member, before in zip(group, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, parameters(member.workdir), before)


@pytest.mark.slow
def test_a_replica_that_diverges_leaves_the_others_alone(tmp_path):
    config = make_config()
    config.study.arms.fast.optim.lr = 1e30
    said = []
    study.run_study(config, tmp_path, log_line=said.append)
    contents = json.loads((tmp_path / "study.json").read_text())
    for seed in ("0", "1"):
        assert contents["arms"]["fast"]["seeds"][seed]["status"] == "failed"
        assert contents["arms"]["slow"]["seeds"][seed]["status"] == "done"
        assert contents["arms"]["warm"]["seeds"][seed]["status"] == "done"
    assert sum("failed" in line for line in said) == 2
    single = members(tmp_path / "alone", config, ["fast"])[0]
    with pytest.raises(NonFiniteError) as alone:
        loop.train(single.config, single.workdir, log_line=lambda line: None)
    error = json.loads((tmp_path / "fast/seed0/result.json").read_text())["error"]
    step = str(alone.value).partition("at step ")[2].partition(";")[0]
    assert step and f"at step {step};" in error


def test_what_cannot_be_traced_runs_arm_by_arm(tmp_path):
    """Whether the label term is computed at all depends on whether its weight is zero."""
    config = make_config()
    kwargs = {"name": "tests.run.test_replicas:Switched", "kwargs": {"weight": 1.0}}
    other = {"name": "tests.run.test_replicas:Switched", "kwargs": {"weight": 0.5}}
    config.study.arms = {"slow": {"objective": kwargs}, "half": {"objective": other}}
    both = members(tmp_path, config, ["slow", "half"])
    assert replicas.kind(both[0].config) == replicas.kind(both[-1].config)
    with pytest.raises(replicas.NO_REPLICAS):
        replicas.train(both, log_line=lambda line: None)
    said = []
    study.run_study(config, tmp_path, log_line=said.append)
    assert not [line for line in said if "one run after the other" in line]
    assert len(list(tmp_path.glob("*/*/result.json"))) == 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Switched(Objective):
    weight: float = 1.0
    roles = ("student",)

    def loss(self, nets, batch, memory, step):
        outputs, state = nets("student", batch["input"], train=True)
        value = (outputs["logits"] ** 2).sum(-1)
        coef = {"a": self.weight} if self.weight > 0.7 else {}
        return Terms(values={"a": value}, coef=coef, state={"student": state})


def test_reasons_are_said(tmp_path):
    config = make_config(**{"data.resident": "no", "total": 3})
    config.study.arms = {"slow": {}}
    said = []
    study.run_study(config, tmp_path, log_line=said.append)
    assert "slow: one run after the other (data that are streamed)" in said
    [warning] = [line for line in said if "warning:" in line]
    assert warning.startswith("slow seed 0: warning: eval.every: due after 4 steps of 3")
    assert json.loads((tmp_path / "slow/seed0/result.json").read_text())["status"] == "done"


def test_a_study_passes_on_what_is_wrong_with_its_runs_once_an_arm(tmp_path):
    said, told = [], set()
    found = members(tmp_path, make_config(), ["slow", "fast"])
    together, alone = study._warnings(found, said.append, told), study._warnings
    for line in ("warning: a", "step 1 after 2 s", "damaged checkpoint set aside: b", "warning: a"):
        together(line)
    alone(found[:1], said.append, told)("warning: a")
    alone(found[:1], said.append, told)("warning: c")
    assert said == [
        "slow, fast seeds 0, 1: warning: a",
        "slow, fast seeds 0, 1: damaged checkpoint set aside: b",
        "slow seed 0: warning: c",
    ]
