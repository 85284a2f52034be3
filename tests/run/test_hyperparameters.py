"""Hyperparameters against the length of a run, its data and its host."""

import dataclasses
import functools
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax.core import optim, state
from distill_jax.core.errors import ConfigError
from distill_jax.run import build, flags, preflight, resolve
from distill_jax.run import config as config_lib
from distill_jax.run.preflight import hyperparameters

DURATION = re.compile(
    r"(^|_)(epochs|steps|warmup|ramp|teaching|freeze|frozen|only|hold|delay|until|after)(_|$)"
)
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


@pytest.mark.parametrize("make", [*dataclasses_of("objectives"), *dataclasses_of("weighting")])
def test_every_duration_of_a_method_is_declared(make):
    names = {field.name for field in dataclasses.fields(make)}
    durations = {name for name in names if DURATION.search(name)} - FACTS
    assert durations == set(make.schedules)
    assert set(make.schedules.values()) <= {"ramp", "hold"}


DKD = {
    "objective__name": "dkd",
    "objective__kwargs": "{}",
    "total": 20,
}


@pytest.mark.parametrize(
    ("spec", "overrides", "where"),
    [
        (
            "configs/ssl/dino.py:smoke",
            {"objective__kwargs__freeze_prototypes": "9 epochs"},
            "freeze_prototypes",
        ),
        ("configs/ssl/dino.py:smoke", {"objective__kwargs__heads_only": 12}, "heads_only"),
        (
            "configs/ssl/ibot.py:smoke",
            {"objective__kwargs__temperature_warmup": "30 epochs"},
            "temperature_warmup",
        ),
        ("configs/distill/kd.py:smoke", DKD, "warmup"),  # 20 epochs by default
    ],
)
def test_a_schedule_that_is_longer_than_training_is_refused(spec, overrides, where):
    [finding] = hyperparameters.findings(experiment(spec, **overrides))
    assert finding.kind == "error" and finding.where == f"objective.kwargs.{where}"


def test_a_schedule_of_just_the_length_of_training():
    """A ramp may end with training, and what is held back must begin before that."""
    base = experiment("configs/ssl/dino.py:smoke")
    whole = base.total_steps

    def found(**kwargs):
        objective = dataclasses.replace(base.objective, freeze_prototypes=0, **kwargs)
        return list(hyperparameters.of_schedules(base.with_trainer(objective=objective)))

    assert not found(temperature_warmup=whole)
    assert found(temperature_warmup=whole * 1.01)
    assert found(heads_only=whole)
    assert not found(heads_only=whole * 0.99)


def test_the_last_step_of_the_longest_ramp_has_the_whole_weight():
    found = experiment("configs/distill/kd.py:smoke", **DKD, objective__kwargs__warmup="1 epoch")
    longest = found.total_steps / found.steps_per_epoch
    objective = dataclasses.replace(found.objective, warmup=f"{longest} epochs")
    found = found.with_trainer(objective=objective)
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
    found = list(hyperparameters.of_queues(base.with_trainer(objective=objective)))
    assert len(found) == (share is not None)
    for finding in found:
        assert finding.kind == "warning" and share in finding.what
        assert f"at most {n // 2} keys" in finding.what


def test_keys_of_several_views_count_by_example():
    base = experiment("configs/ssl/mugs.py:smoke")
    n = len(base.dataset.train)
    objective = dataclasses.replace(base.objective, queue=2 * n)
    assert not list(hyperparameters.of_queues(base.with_trainer(objective=objective)))
    objective = dataclasses.replace(base.objective, queue=3 * n)
    [finding] = hyperparameters.of_queues(base.with_trainer(objective=objective))
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
    with pytest.raises(ConfigError, match=r"objective\.kwargs\.freeze_prototypes: it lasts"):
        late = experiment(
            "configs/ssl/dino.py:smoke", objective__kwargs__freeze_prototypes="9 epochs"
        )
        preflight.warn(late, print, alone=True)


# Memory.


def wide(width):
    kwargs = {"roles__student__model": "mlp", "roles__student__kwargs__hidden": (width,)}
    return experiment("configs/distill/supervised.py:smoke", **kwargs)


def test_what_cannot_fit_is_refused_on_shapes():
    found = wide(10**9)
    with pytest.raises(ConfigError, match=r"roles\.student\.kwargs: 9[\d,.e+]+ GiB of .* needs"):
        preflight.warn(found, print, alone=False)
    said = []
    preflight.warn(wide(10**9 + 1), said.append, alone=True, planned=True)
    assert any("roles.student.kwargs" in line for line in said)


def test_the_bytes_of_a_run(monkeypatch):
    """Parameters, momentum and counter, and a batch of float images with labels and bookkeeping."""
    found = wide(50)
    parameters = 256 * 50 + 50 + 50 * 4 + 4
    batch = 32 * (256 + 1 + 1 + 1 + 1)  # pixels, label, mask, index, epoch
    optimizer = sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(found.abstract_state.opt_state)
    )
    assert 4 * parameters <= optimizer <= 4 * parameters + 16
    least = 4 * parameters + optimizer + 4 * batch
    monkeypatch.setattr(hyperparameters, "memory_limit", lambda: least)
    assert not list(hyperparameters.of_memory(found))
    monkeypatch.setattr(hyperparameters, "memory_limit", lambda: least - 1)
    [finding] = hyperparameters.of_memory(found)
    assert finding.kind == "memory"


# Geometry.


def test_a_grid_of_the_same_number_of_tokens_is_refused():
    spec, path = "configs/ssl/mae.py:smoke", "roles__decoder__kwargs__grid"
    assert not list(hyperparameters.of_geometry(experiment(spec)))
    [finding] = hyperparameters.of_geometry(experiment(spec, **{path: (2, 8)}))
    assert finding.where == "roles.decoder.kwargs.grid" and finding.hint == "(4, 4)"


def stub(shape, outputs=None, objective=None, **kwargs) -> Any:
    """What `of_geometry` reads of an experiment on inputs `shape`."""
    config = config_lib.base()
    config.roles.student = config_lib.role("vit", **kwargs)
    inputs = (jax.ShapeDtypeStruct((2, *shape), np.float32), jax.ShapeDtypeStruct((2, 3), np.int32))
    seen = state.RoleShapes(inputs, {}, {}, outputs or {})
    shapes = types.SimpleNamespace(roles={"student": seen}, batch={"input": inputs[0], "hidden": 0})
    return types.SimpleNamespace(config=config, shapes=shapes, objective=objective)


def test_masks_of_a_clip_are_of_the_patches_of_the_network():
    """Patches of 4 x 4 in one frame and of 2 x 2 in four are as many."""
    fake = stub((8, 16, 16, 1), patch_size=4, tubelet=1)
    for patch, tubelet, wrong in ((4, 1, []), (2, 4, ["patch_size", "tubelet"])):
        masks = {"patch_size": patch, "tubelet": tubelet}
        fake.config.data.transform_kwargs = {"tube_masks": masks}
        found = list(hyperparameters.of_geometry(fake))
        assert [f.where.rpartition(".")[2] for f in found] == wrong


@pytest.mark.parametrize(("shape", "refused"), [((16, 36, 1), True), ((24, 24, 1), False)])
def test_tokens_are_a_square_map_on_square_images_alone(shape, refused):
    outputs = {"stage1": jax.ShapeDtypeStruct((2, 36, 8), np.float32)}
    objective = types.SimpleNamespace(student_stages=("stage1",))
    fake = stub(shape, outputs, objective)
    found = [f.where for f in hyperparameters.of_geometry(fake)]
    assert found == ["objective.kwargs.student_stages"] * refused


# Optimizers whose update has no derivative.


def by_comparison():
    update = lambda g: jnp.where(g > 0, -0.1, 0.1)  # noqa: E731
    return optax.stateless(lambda grads, params: jax.tree.map(update, grads))


@pytest.mark.parametrize(
    ("name", "make", "works"),
    [
        *((name, None, True) for name in optim.OPTIMIZERS),
        ("sign", lambda learning_rate: optax.sign_sgd(learning_rate), False),
        ("lion", lambda learning_rate: optax.lion(learning_rate), False),
        ("compares", lambda learning_rate: by_comparison(), False),
    ],
)
def test_the_weigher_learns_through_the_optimizer(name, make, works, monkeypatch):
    base = experiment("configs/bilevel/tgeo_kd.py:smoke")
    if make is not None:
        kind = optim.OPTIMIZERS["sgd"]._replace(make=make)
        monkeypatch.setattr(optim, "OPTIMIZERS", {**optim.OPTIMIZERS, name: kind})
    arguments = build.schedule_args(base.config, base.steps_per_epoch, base.total_steps)
    kwargs = {} if name in ("sgd", "momentum", "nesterov") else {"weight_decay": 0.0}
    arguments |= {"name": name, "kwargs": {}, **kwargs}
    inner, _ = optim.make_optimizer(total_steps=base.total_steps, **arguments)
    found = base.with_trainer(optimizer=inner)
    assert (not list(hyperparameters.of_optimizer(found))) == works
