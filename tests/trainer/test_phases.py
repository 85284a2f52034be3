"""Phases of a trainer: each is a step of its own, and together they are one run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distill_jax as dj
from distill_jax.core import bilevel
from distill_jax.core.errors import ConfigError
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.models import mlp, ratio_mlp
from distill_jax.objectives.kd import KD
from distill_jax.objectives.supervised import Supervised
from distill_jax.weighting import meta_weight_net

K, B = 4, 16
RANDOM = np.random.default_rng(0)
BATCH = {
    "input": RANDOM.normal(size=(B, 6)).astype(np.float32),
    "label": RANDOM.integers(0, K, B).astype(np.int32),
}
MLP = mlp.make(num_classes=K, hidden=(8,))
KEY = jax.random.key(3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phased(KD):
    """Distillation, then whatever the test wants."""

    later: tuple = ((2, Supervised()),)

    def phases(self):
        return ((0, self), *self.later)


@dataclasses.dataclass(frozen=True)
class Parts(KD):
    """Objectives that are all others than the method."""

    parts: tuple = ()
    roles = ("student", "teacher")

    def phases(self):
        return self.parts


def make(objective=None, **kwargs):
    arguments = {"student": MLP, "frozen": {"teacher": MLP}, "optimizer": optax.adam(1e-2)}
    return dj.Trainer(objective or Phased(), **{**arguments, **kwargs})


def run(trainer, state, n):
    found = []
    for _ in range(n):
        state, metrics = trainer.step(state, BATCH)
        found.append(jax.device_get(metrics))
    return state, found


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, *jax.device_get((a, b)))))


def copied(state):
    return jax.tree.map(lambda x: jax.device_put(np.asarray(x), x.sharding), state)


@pytest.fixture(scope="module")
def trained():
    trainer = make()
    states, metrics = [trainer.init(KEY, BATCH)], []
    kept = [copied(states[0].train)]
    for _ in range(4):
        state, found = trainer.step(states[-1], BATCH)
        states.append(state)
        kept.append(copied(state.train))
        metrics.append(jax.device_get(found))
    return trainer, states[-1], kept, metrics


def test_phases_are_the_runs_of_their_objectives(trained):
    _, last, kept, metrics = trained
    taught, alone = make(KD()), make(Supervised(), frozen={})
    state, first = run(taught, taught.init(KEY, BATCH), 2)
    assert equal(state.train, kept[2])
    state, second = run(alone, state.replace(frozen={}), 2)
    assert equal(state.train, last.train)
    assert [*first, *second] == metrics
    assert "distillation" in metrics[1] and "distillation" not in metrics[2]


def test_each_phase_is_compiled_once_and_takes_its_own_networks(trained):
    trainer, last, kept, _ = trained
    assert [step._cache_size() for step in trainer._jitted.values()] == [1, 1]
    assert last.frozen.keys() == {"teacher"}
    step = jax.jit(trainer.pure_step(phase=1))
    assert equal(step(kept[2], {}, BATCH, KEY)[0], kept[3])
    with pytest.raises(KeyError):
        jax.eval_shape(trainer.pure_step(phase=0), kept[1], {}, BATCH, KEY)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_any_state_goes_on_in_its_phase(trained, step):
    trainer, last, kept, _ = trained
    state = last.replace(train=copied(kept[step]))
    state, _ = run(trainer, state, 4 - step)
    assert equal(state.train, kept[4])


def test_starts_are_durations():
    lengths = dj.trainer.options.Options(total_steps=10, steps_per_epoch=4.0)
    later = (("20 %", Supervised()), ("1 epoch", KD()), (9, Supervised()))
    trainer = make(Phased(later=later), options=lengths)
    assert [phase.start for phase in trainer.phases] == [0, 2, 4, 9]
    soon = make(Phased(later=(("1 %", Supervised()),)), options=lengths)
    assert [phase.start for phase in soon.phases] == [0, 1]
    with pytest.raises(ConfigError, match="total_steps"):
        make(Phased(later=later))


@dataclasses.dataclass(frozen=True)
class Counting(Supervised):
    """Has a memory of its own, which a dataset pass may fill."""

    needs_dataset_pass = False

    def memory(self, key, batch):
        return {"n": jnp.zeros(())}


@dataclasses.dataclass(frozen=True)
class Passing(Supervised):
    needs_dataset_pass = True


@dataclasses.dataclass(frozen=True)
class Coupled(Supervised):
    couples_batch = True


@pytest.mark.parametrize(
    ("later", "message"),
    [
        (((2, Supervised()), (2, KD())), r"begin at the steps \[0, 2, 2\]"),
        (((3, Supervised()), (1, KD())), r"\[0, 3, 1\]"),
        (((-1, Supervised()),), "not positive"),
        ((("soon", Supervised()),), "not a duration"),
        (((2, dj.objectives.CRD(num_examples=8)),), "projector"),
        (((2, Passing()),), "needs a dataset pass"),
        (((2, Counting()),), "another memory"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_phases_that_do_not_fit(later, message):
    with pytest.raises(ConfigError, match=message):
        make(Phased(later=later)).shapes(BATCH)


def test_networks_and_options_that_do_not_fit_the_phases():
    with pytest.raises(ConfigError, match=r"begin at the steps \[1\]"):
        make(Parts(parts=((1, KD()),)))
    with pytest.raises(ConfigError, match=r"begin at the steps \[\]"):
        make(Parts())
    learns = {"networks": {"teacher": MLP}, "frozen": {}}
    with pytest.raises(ConfigError, match="from step 2 on does not call teacher, which learns"):
        make(**learns).shapes(BATCH)
    alone = Parts(parts=((0, Supervised()), (2, Supervised(label_smoothing=0.1))))
    with pytest.raises(ConfigError, match="no phase of Parts calls the network 'teacher'"):
        make(alone).shapes(BATCH)
    options = dj.trainer.options.Options(accum_steps=2)
    with pytest.raises(ConfigError, match="couples the examples"):
        make(Phased(later=((2, Coupled()),)), options=options)


def weighted(objective):
    return WeightedObjective(
        objective=objective,
        weighting=meta_weight_net.make(),
        loss_terms=("cross_entropy",),
        num_classes=K,
    )


def two_levels(objective, **kwargs):
    arguments = {
        "networks": {"weighting": ratio_mlp.make(hidden=(4,))},
        "outer_optimizer": optax.sgd(0.1),
        "bilevel": bilevel.Bilevel(),
        **kwargs,
    }
    roles = weighted(objective).weighting.roles
    arguments["networks"] = {roles[0]: arguments["networks"]["weighting"]}
    return make(weighted(objective), **arguments)


@pytest.mark.slow
def test_a_weighting_learns_in_every_phase():
    held_out = jax.tree.map(lambda x: x[:8], BATCH)

    def go(trainer, state, n):
        for _ in range(n):
            state, _ = trainer.step(state, BATCH, held_out=held_out)
        return state

    trainer = two_levels(Phased())
    both = go(trainer, trainer.init(KEY, BATCH), 4)
    taught, alone = two_levels(KD()), two_levels(Supervised(), frozen={})
    state = go(alone, go(taught, taught.init(KEY, BATCH), 2).replace(frozen={}), 2)
    assert equal(both.train, state.train)
    with pytest.raises(ConfigError, match="may be of two phases"):
        two_levels(
            Phased(), bilevel=bilevel.Bilevel(method="truncated", horizon=2, every=2, warmup=1)
        )
