"""Hyperparameters against the length of a run, its data and its host."""

import dataclasses
import functools
import re

import numpy as np
import pytest

from distill_jax.core import state
from distill_jax.core.errors import ConfigError
from distill_jax.run import build, flags, hyperparameters, resolve
from distill_jax.run import config as config_lib

DURATION = re.compile(r"(^|_)(epochs|steps|warmup|ramp|frozen|hold|delay|until|after)(_|$)")
FACTS = {"total_steps", "steps_per_epoch"}


@functools.cache
def experiment(spec, **overrides):
    changes = {path.replace("__", "."): value for path, value in overrides.items()}
    config = config_lib.override(flags.load(spec), changes)
    return build.build(config, shapes_only=True)


def dataclasses_of(package):
    for name in resolve.available(package):
        make = resolve.resolve(package, name, where="name")
        if dataclasses.is_dataclass(make):
            yield pytest.param(make, id=f"{package}.{name}")


@pytest.mark.parametrize("make", [*dataclasses_of("objectives"), *dataclasses_of("weighers")])
def test_every_duration_of_a_method_is_declared(make):
    names = {field.name for field in dataclasses.fields(make)}
    durations = {name for name in names if DURATION.search(name)} - FACTS
    assert durations == set(make.schedules)
    assert set(make.schedules.values()) <= {"ramp", "hold"}


DKD = {
    "objective__name": "dkd",
    "objective__kwargs": "{}",
    "total__steps": 20,
}


@pytest.mark.parametrize(
    ("spec", "overrides", "where"),
    [
        ("configs/ssl/dino.py:smoke", {"objective__kwargs__frozen_epochs": 100.0}, "frozen_epochs"),
        ("configs/ssl/dino.py:smoke", {"objective__kwargs__heads_epochs": 1.0}, "heads_epochs"),
        (
            "configs/ssl/ibot.py:smoke",
            {"objective__kwargs__temperature_epochs": 30.0},
            "temperature_epochs",
        ),
        ("configs/distill/kd.py:smoke", DKD, "warmup_epochs"),  # 20 by default
    ],
)
def test_a_schedule_that_is_longer_than_training_is_refused(spec, overrides, where):
    [finding] = hyperparameters.findings(experiment(spec, **overrides))
    assert finding.kind == "mistake" and finding.where == f"objective.kwargs.{where}"


def test_a_schedule_of_just_the_length_of_training():
    """A ramp may end with training, and what is held back must begin before that."""
    base = experiment("configs/ssl/dino.py:smoke")
    whole = base.total_steps / base.steps_per_epoch

    def found(**kwargs):
        objective = dataclasses.replace(base.objective, frozen_epochs=0.0, **kwargs)
        return list(hyperparameters.of_schedules(dataclasses.replace(base, objective=objective)))

    assert not found(temperature_epochs=whole)
    assert found(temperature_epochs=whole * 1.01)
    assert found(heads_epochs=whole)
    assert not found(heads_epochs=whole * 0.99)


def test_the_last_step_of_the_longest_ramp_has_the_whole_weight():
    found = experiment("configs/distill/kd.py:smoke", **DKD, objective__kwargs__warmup_epochs=1.0)
    longest = found.total_steps / found.steps_per_epoch
    objective = dataclasses.replace(found.objective, warmup_epochs=longest)
    found = dataclasses.replace(found, objective=objective)
    assert not list(hyperparameters.findings(found))
    nets, batch = state.ShapeNets(found.models), state.zeros(found.shapes.batch)
    coef = [objective.loss(nets, batch, {}, step).coef["nckd"] for step in (0, 9, 19)]
    np.testing.assert_allclose(coef, [8 / 20, 8 / 2, 8], rtol=1e-5)


@pytest.mark.parametrize(
    ("epochs", "share"),
    [(0.5, None), (1.0, None), (1.5, "88%"), (2.0, "100%"), (20.0, "100%")],
)
def test_a_queue_of_more_than_an_epoch_is_a_doubt(epochs, share):
    base = experiment("configs/ssl/moco.py:smoke")
    n = len(base.dataset.train)
    objective = dataclasses.replace(base.objective, queue=round(epochs * n))
    found = list(hyperparameters.of_queues(dataclasses.replace(base, objective=objective)))
    assert len(found) == (share is not None)
    for finding in found:
        assert finding.kind == "doubt" and share in finding.what
        assert f"at most {n // 2} keys" in finding.what


def test_keys_of_several_views_count_by_example():
    base = experiment("configs/ssl/mugs.py:smoke")
    n = len(base.dataset.train)
    objective = dataclasses.replace(base.objective, queue=2 * n)
    assert not list(hyperparameters.of_queues(dataclasses.replace(base, objective=objective)))
    objective = dataclasses.replace(base.objective, queue=3 * n)
    [finding] = hyperparameters.of_queues(dataclasses.replace(base, objective=objective))
    assert f"at most {n} keys" in finding.what


def test_the_share_of_examples_that_meet_themselves():
    """Against a count over shuffled epochs."""
    random, n = np.random.default_rng(0), 2000
    order = np.concatenate([random.permutation(n) for _ in range(2)])
    last = {example: i for i, example in enumerate(order[:n])}
    distance = np.asarray([n + i - last[example] for i, example in enumerate(order[n:])])
    for epochs, expected in ((0.5, 1 / 8), (1.0, 1 / 2), (1.5, 7 / 8)):
        assert abs((distance <= epochs * n).mean() - expected) < 0.03


def test_a_refusal_comes_before_training():
    with pytest.raises(ConfigError, match=r"objective\.kwargs\.frozen_epochs: it lasts"):
        experiment("configs/ssl/dino.py:smoke", objective__kwargs__frozen_epochs=9.0).say_doubts(
            print, alone=True
        )
