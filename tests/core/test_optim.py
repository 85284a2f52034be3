"""Update formulas against NumPy transcriptions, schedules at their boundaries, decay rules."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax.core import optim
from distill_jax.core.errors import ConfigError
from distill_jax.run import config as config_lib
from distill_jax.run.config import schema

RULES = (("kernel$", True), (".", False))
LR, DECAY = 0.1, 0.05


def make(name, **changes):
    settings = {
        "name": name,
        "total_steps": 10,
        "lr": LR,
        "schedule": "constant",
        "schedule_kwargs": {},
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "decay_mask": RULES,
        "clip_norm": None,
        "kwargs": {},
    }
    return optim.make_optimizer(**(settings | changes))


def params():
    random = np.random.default_rng(0)
    leaf = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    return {"student": {"kernel": leaf(3, 2), "bias": leaf(2)}, "fusion": {"kernel": leaf(2, 2)}}


def gradients(step):
    random = np.random.default_rng(step + 1)
    return jax.tree.map(lambda p: random.normal(size=p.shape).astype(np.float32), params())


def decays(path):
    return path[-1].key == "kernel"


# Each transcription: (step from 0, parameter, gradient, memory, decayed) -> new parameter, in
# float64. They follow the papers, not optax.


def sgd(t, p, g, memory, decayed):
    return p - LR * (g + DECAY * decayed * p)


def momentum(t, p, g, memory, decayed):
    memory["m"] = 0.9 * memory.get("m", 0) + g + DECAY * decayed * p
    return p - LR * memory["m"]


def nesterov(t, p, g, memory, decayed):
    g = g + DECAY * decayed * p
    memory["m"] = 0.9 * memory.get("m", 0) + g
    return p - LR * (g + 0.9 * memory["m"])


def adam_direction(t, g, memory, eps):
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
    memory["v"] = 0.999 * memory.get("v", 0) + 0.001 * g**2
    m, v = memory["m"] / (1 - 0.9 ** (t + 1)), memory["v"] / (1 - 0.999 ** (t + 1))
    return m / (np.sqrt(v) + eps)


def adam(t, p, g, memory, decayed):
    return p - LR * adam_direction(t, g, memory, 1e-8)


def adamw(t, p, g, memory, decayed):
    return p - LR * (adam_direction(t, g, memory, 1e-8) + DECAY * decayed * p)


def lars(t, p, g, memory, decayed):
    if decayed:
        g = g + DECAY * p
        g = g * 0.001 * np.linalg.norm(p) / np.linalg.norm(g)
    memory["m"] = 0.9 * memory.get("m", 0) + LR * g
    return p - memory["m"]


def lamb(t, p, g, memory, decayed):
    r = adam_direction(t, g, memory, 1e-6) + DECAY * decayed * p
    return p - LR * np.linalg.norm(p) / np.linalg.norm(r) * r


@pytest.mark.parametrize("rule", [sgd, momentum, nesterov, adam, adamw, lars, lamb])
def test_updates_equal_the_paper(rule):
    weight_decay = 0.0 if rule is adam else DECAY
    tx, _ = make(rule.__name__, weight_decay=weight_decay)
    found, state = params(), tx.init(params())
    expected = jax.tree.map(lambda p: p.astype(np.float64), params())
    memory = jax.tree.map(lambda p: {}, params())

    @jax.jit
    def advance(grads, state, found):
        updates, state = tx.update(grads, state, found)
        return state, optax.apply_updates(found, updates)

    for t in range(3):
        state, found = advance(gradients(t), state, found)
        expected = jax.tree_util.tree_map_with_path(
            lambda path, p, g, m, t=t: rule(t, p, g.astype(np.float64), m, decays(path)),
            expected,
            gradients(t),
            memory,
        )
        # 1 - b2^t of Adam in float32 is off by 6e-8 / (1 - b2), the update by 0.1 * 3e-5.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 2e-5, 1e-5), found, expected)


def test_every_optimizer_has_a_transcription():
    assert set(optim.OPTIMIZERS) == {"sgd", "momentum", "nesterov", "adam", "adamw", "lars", "lamb"}


def test_clipping_comes_before_weight_decay():
    tx, _ = make("sgd", clip_norm=0.5, weight_decay=DECAY)
    p, g = params(), gradients(0)
    norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(g)))
    assert norm > 0.5
    updates, _ = tx.update(g, tx.init(p), p)
    expected = -LR * (g["student"]["kernel"] * 0.5 / norm + DECAY * p["student"]["kernel"])
    np.testing.assert_allclose(updates["student"]["kernel"], expected, rtol=1e-5)


def test_keyword_arguments_reach_the_optimizer():
    tx, _ = make("momentum", kwargs={"momentum": 0.5})
    p, state = params(), make("momentum")[0].init(params())
    for t in range(2):
        updates, state = tx.update(gradients(t), state, p)
    expected = -LR * (0.5 * gradients(0)["student"]["bias"] + gradients(1)["student"]["bias"])
    np.testing.assert_allclose(updates["student"]["bias"], expected, rtol=1e-5)


def test_the_optimizer_follows_its_schedule():
    tx, schedule = make("sgd", schedule="linear", warmup_steps=2)
    state, p = tx.init(params()), params()
    for step in range(5):
        updates, state = tx.update(gradients(step), state, p)
        expected = -np.asarray(schedule(step)) * gradients(step)["student"]["bias"]
        np.testing.assert_allclose(updates["student"]["bias"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "kwargs", "values"),
    [
        ("constant", {}, {20: 1, 60: 1, 99: 1}),
        ("cosine", {}, {20: 1, 60: 0.5, 100: 0, 120: 0}),
        ("cosine", {"final": 0.2}, {20: 1, 60: 0.6, 100: 0.2}),
        ("linear", {}, {20: 1, 40: 0.75, 60: 0.5, 100: 0}),
        ("linear", {"final": 0.5}, {20: 1, 60: 0.75, 100: 0.5}),
        ("step", {"milestones": (0.5, 75)}, {49: 1, 50: 0.1, 74: 0.1, 75: 0.01, 100: 0.01}),
        ("step", {"milestones": (30,), "factor": 0.5}, {29: 1, 30: 0.5}),
        ("rsqrt", {"timescale": 20}, {20: 1, 40: 0.5**0.5, 80: 0.5}),
    ],
)
def test_schedule_values(name, kwargs, values):
    schedule = optim.make_schedule(name, lr=0.4, total_steps=100, warmup_steps=20, kwargs=kwargs)
    values = {0: 0, 10: 0.5} | values
    found = {step: float(schedule(step)) for step in values}
    expected = {step: pytest.approx(0.4 * factor, abs=1e-6) for step, factor in values.items()}
    assert found == expected
    assert float(jax.jit(schedule)(jnp.int32(10))) == pytest.approx(0.2)


def test_without_warmup_training_starts_at_the_peak():
    assert float(optim.make_schedule("cosine", lr=0.4, total_steps=10)(0)) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("adamx", {}, ["name", "adamx", "adamw"]),
        ("sgd", {"schedule": "cosin"}, ["schedule", "cosine"]),
        ("sgd", {"kwargs": {"momentun": 1}}, ["kwargs.momentun", "did you mean 'momentum'"]),
        ("adamw", {"kwargs": {"weight_decay": 1}}, ["kwargs.weight_decay", "b1"]),
        (
            "sgd",
            {"schedule": "cosine", "schedule_kwargs": {"finl": 0}},
            ["schedule_kwargs.finl", "did you mean 'final'"],
        ),
        ("sgd", {"schedule": "step"}, ["needs 'milestones'", "schedule_kwargs"]),
        (
            "sgd",
            {"schedule": "step", "schedule_kwargs": {"milestones": (50,)}},
            ["milestone 50", "1 to 9"],
        ),
        ("sgd", {"warmup_steps": 10}, ["warmup_steps: ", "10 steps"]),
        ("adam", {"weight_decay": 0.1}, ["weight_decay", "adamw"]),
        ("sgd", {"kwargs": {"momentum": "high"}}, ["kwargs.momentum", "'high'", "below 1"]),
        ("sgd", {"kwargs": {"nesterov": 1}}, ["kwargs.nesterov: 1 is no switch"]),
        ("sgd", {"kwargs": {"accumulator_dtype": "int8"}}, ["kwargs.accumulator_dtype"]),
        ("adam", {"kwargs": {"mu_dtype": "flout32"}}, ["kwargs.mu_dtype", "bfloat16"]),
        ("adam", {"kwargs": {"b1": None}}, ["kwargs.b1: b1 is None"]),
        ("adam", {"kwargs": {"eps": 0.0}}, ["kwargs.eps: eps is 0.0", "above 0"]),
    ],
)
def test_mistakes_are_named(name, changes, expected):
    with pytest.raises(ConfigError) as error:
        make(name, **changes)
    for text in expected:
        assert text in str(error.value)


def test_the_first_rule_that_matches_decides():
    rules = (("^fusion/", False), ("kernel$", True), (".", False))
    assert optim.decayed(params(), rules) == {
        "student": {"kernel": True, "bias": False},
        "fusion": {"kernel": False},
    }


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ((("kernel$", True),), ["student/bias", "1 of 3", "'.', False"]),
        ((("kernal$", True), (".", False)), ["'kernal$' matches no parameter", "kernel"]),
        ((), ["no rule matches", "3 of 3"]),
    ],
)
@pytest.mark.parametrize("name", ["momentum", "adamw", "lars", "lamb"])
def test_rules_cover_every_parameter_and_every_rule_is_used(name, rules, expected):
    tx, _ = make(name, weight_decay=0.1, decay_mask=rules)
    with pytest.raises(ConfigError, match=r"^decay_mask: ") as error:
        jax.eval_shape(tx.init, params())
    for text in expected:
        assert text in str(error.value)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lamb"])
def test_rules_are_not_read_without_weight_decay(name):
    make(name, decay_mask=())[0].init(params())


def test_default_rules_of_the_config_spare_biases_and_norms():
    tree = {
        "student": {
            "conv": {"kernel": 0},
            "norm": {"scale": 0, "bias": 0},
            "embed": {"embedding": 0},
        }
    }
    assert optim.decayed(tree, config_lib.base().optim.decay_mask) == {
        "student": {
            "conv": {"kernel": True},
            "norm": {"scale": False, "bias": False},
            "embed": {"embedding": True},
        }
    }


def test_names_of_the_config_comments_exist():
    source = schema.__file__
    with open(source, encoding="utf-8") as file:
        text = file.read()
    assert " | ".join(optim.OPTIMIZERS) in text
    assert " | ".join(optim.SCHEDULES) in text


NUMBERS = {
    (name, key)
    for name, kind in optim.OPTIMIZERS.items()
    for key in inspect.signature(kind.make).parameters
    if key not in (*optim._MANAGED, *optim._SWITCHES, *optim._DTYPES)
}


@pytest.mark.parametrize(("name", "key"), sorted(NUMBERS))
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "small", (0.9,), True])
def test_every_number_of_an_optimizer_has_a_range(name, key, value):
    with pytest.raises(ConfigError, match=rf"^kwargs\.{key}: {key} is"):
        make(name, kwargs={key: value})
    if key in ("b1", "b2", "momentum"):
        with pytest.raises(ConfigError, match="below 1"):
            make(name, kwargs={key: 2.0})


def test_the_keywords_of_optimizers_are_all_known():
    """A new keyword of optax needs a range, or to be named among switches and types."""
    assert {key for _, key in NUMBERS} <= set(optim._RANGES)
