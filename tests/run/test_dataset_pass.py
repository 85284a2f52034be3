"""A look at the whole training part before the first step, and virtual steps in a run."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core import partition
from distill_jax.core.api import Objective, Terms
from distill_jax.core.errors import ConfigError
from distill_jax.data.source import example_ids
from distill_jax.losses.classification import cross_entropy
from distill_jax.run import build
from distill_jax.run import config as config_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counting(Objective):
    """Remembers the mean of each image, and a random number."""

    num_examples: int

    roles: ClassVar = ("student",)
    needs_dataset_pass: ClassVar[bool] = True

    def memory(self, key, batch):
        return {"mean": jnp.zeros(self.num_examples), "draw": jnp.zeros(())}

    def dataset_pass(self, nets, batch, memory, step):
        outputs, _ = nets("student", batch["input"])
        return {"mean": batch["input"].mean((1, 2, 3)), "logits": outputs["logits"]}

    def init_memory(self, rows, ids, memory, random):
        assert rows["logits"].shape == (len(ids), 4)
        mean = np.zeros_like(memory["mean"])
        mean[ids] = rows["mean"]
        return {"mean": mean, "draw": random.random()}

    def loss(self, nets, batch, memory, step):
        outputs, state = nets("student", batch["input"], train=True)
        return Terms(
            values={"loss": cross_entropy(outputs["logits"], batch["label"])},
            state={"student": state},
        )


def config(**changes):
    made = config_lib.base()
    made.objective.name = "tests.run.test_dataset_pass:Counting"
    made.data.name = "synthetic"
    made.data.kwargs = {"n_train": 75, "n_test": 8}
    made.data.train_transforms = made.data.eval_transforms = ("scale",)
    made.roles.student = config_lib.role("mlp", hidden=(4,))
    made.evaluators = {"classification": {}}
    made.batch_size = 16
    made.total = 4
    made.eval.batch_size = 32
    return config_lib.override(made, changes)


def test_a_survey_sees_each_training_example_once():
    experiment = build.build(config())
    start = build.initial_state(experiment, jax.random.key(0), experiment.config)
    state = build.with_dataset_pass(experiment, start, {}, 3)
    train = experiment.dataset.train
    images = np.asarray(train.read(np.arange(len(train)))["input"], np.float64) / 255
    want = np.zeros(state.memory["mean"].shape)
    want[example_ids(train)] = images.mean((1, 2, 3))
    np.testing.assert_allclose(state.memory["mean"], want, atol=1e-6)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, start)
    draws = [
        float(build.with_dataset_pass(experiment, start, {}, seed).memory["draw"])
        for seed in (3, 3, 4)
    ]
    assert draws[0] == draws[1] != draws[2]


def average(**changes):
    objective = {"objective.name": "self_training", "roles.teacher.ema_of": "student"}
    return config(**{**objective, **changes})


@pytest.mark.parametrize("kind", ["deep", "wide"])
def test_virtual_steps_in_a_run(kind):
    experiment = build.build(average(**{"lookahead.steps": 2, "lookahead.kind": kind}))
    key = jax.device_put(jax.random.key(0), partition.replicated(experiment.mesh))
    state = build.initial_state(experiment, key, experiment.config)
    before = jax.device_get(state.targets)
    feed = build.Feed(experiment, seed=0, start=0)
    state, metrics = build.compile_step(experiment, feed(0))(state, {}, feed(0), key)
    assert np.isfinite(metrics).all() and int(state.step) == 1
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, jax.device_get(state.targets))
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lookahead.steps": 2, "lookahead.kind": "wide", "batch_size": 40}, "2 batches ahead"),
        ({"lookahead.steps": 2, "lookahead.kind": "wide", "data.resident": "no"}, "batches ahead"),
        ({"lookahead.steps": 1, "weighting.name": "constant"}, "weighting"),
        ({"lookahead.steps": -1}, "out of range"),
        ({"lookahead.restore": "some"}, "unknown value"),
    ],
)
def test_what_cannot_look_ahead_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        build.build(average(**changes))


def test_nothing_to_look_ahead_is_refused():
    with pytest.raises(ConfigError, match="moving average"):
        build.build(config(**{"lookahead.steps": 1}))


def test_steps_of_the_look_ahead_are_no_duration():
    changed = config_lib.override(config_lib.base(), {"lookahead.steps": 3})
    assert (changed.lookahead.kind, changed.lookahead.restore) == ("deep", "all")
