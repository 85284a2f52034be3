"""Virtual steps: against a hand-written loop, and what they leave a trace in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax.core import lookahead, rng, state, steps
from distill_jax.core.errors import ConfigError
from distill_jax.objectives import self_training
from tests import harness
from tests.reference import log_softmax

DECAY = 0.7
KEY = jax.random.key(3)

pytestmark = pytest.mark.xdist_group("lookahead")  # steps are compiled once for all


@pytest.fixture(scope="module")
def made():
    """A mean teacher with batch statistics, Adam and a schedule, two steps after its start."""
    objective = self_training.make(threshold=0.0)
    model = harness.tiny_model(batch_norm=True)
    models = {"student": model, "teacher": model}
    tx = optax.adam(optax.linear_schedule(0.1, 0.0, 10))
    shapes = state.infer_shapes(objective, models, harness.make_batch())
    init = state.make_init(
        objective, models, tx, shapes, trainable=("student",), ema={"teacher": "student"}
    )
    ema = {"teacher": ("student", DECAY)}
    step = jax.jit(steps.make_train_step(objective, models, tx, ema=ema))
    current = jax.jit(init)(jax.random.key(0))
    for seed in (5, 6):
        current, _ = step(current, {}, harness.make_batch(seed=seed), KEY)
    return step, current


@functools.cache
def wrapped(step, **kwargs):
    return jax.jit(lookahead.make_lookahead_step(step, ema=("teacher",), **kwargs))


def close(a, b):
    assert harness.max_relative(a, b) < 1e-5


def own(k):
    return jax.random.fold_in(rng.stream(KEY, "lookahead"), k)


def count(opt_state):
    return int(opt_state[0].count), int(opt_state[1].count)


def test_deep_steps_advance_the_average_and_leave_no_trace(made):
    step, start = made
    batch = harness.make_batch()
    ahead = start
    for k in range(3):
        opt_state = (ahead.opt_state[0], start.opt_state[1])
        ahead, _ = step(ahead.replace(step=start.step, opt_state=opt_state), {}, batch, own(k))
    moved = {**start.model_state, "teacher": ahead.model_state["teacher"]}
    want, metrics = step(start.replace(targets=ahead.targets, model_state=moved), {}, batch, KEY)
    got, other = wrapped(step, steps=3)(start, {}, batch, KEY)
    close(want, got)
    close(metrics, other)
    plain, _ = step(start, {}, batch, KEY)
    assert harness.max_relative(plain.targets, got.targets) > 1e-3
    assert int(got.step) == int(start.step) + 1


def test_wide_steps_average_students_of_different_batches(made):
    step, start = made
    batches = [harness.make_batch(seed=s) for s in range(3)]
    branches = [step(start, {}, b, own(k))[0] for k, b in enumerate(batches)]
    branches = jax.device_get(branches)
    soup = jax.tree.map(lambda *p: sum(p) / 3, *(b.params["student"] for b in branches))
    targets = {
        "teacher": jax.tree.map(
            lambda t, s: np.float32(DECAY * np.asarray(t) + (1 - DECAY) * s),
            start.targets["teacher"],
            soup,
        )
    }
    statistics = jax.tree.map(lambda *x: sum(x) / 3, *(b.model_state["teacher"] for b in branches))
    moved = {**start.model_state, "teacher": statistics}
    want, _ = step(start.replace(targets=targets, model_state=moved), {}, batches[0], KEY)
    stacked = jax.tree.map(lambda *x: np.stack(x), *batches)
    got, _ = wrapped(step, steps=3, kind="wide")(start, {}, stacked, KEY)
    close(want, got)


def test_one_virtual_step_is_the_same_in_depth_and_in_width(made):
    step, start = made
    batch = harness.make_batch()
    deep, _ = wrapped(step, steps=1)(start, {}, batch, KEY)
    one = jax.tree.map(lambda x: np.asarray(x)[None], batch)
    wide, _ = wrapped(step, steps=1, kind="wide")(start, {}, one, KEY)
    close(deep, wide)


@pytest.mark.parametrize("kind", lookahead.KINDS)
@pytest.mark.parametrize("restore", lookahead.RESTORE)
def test_what_is_not_restored_keeps_the_trace(made, kind, restore):
    step, start = made
    batch = harness.make_batch()
    fed = jax.tree.map(lambda x: np.stack([x, x]), batch) if kind == "wide" else batch
    ahead = functools.partial(wrapped, step, steps=2, kind=kind, unroll=True)
    got, _ = ahead(restore=restore)(start, {}, fed, KEY)
    adam, schedule = count(start.opt_state)
    virtual = 2 if restore == "params" else 0
    assert count(got.opt_state) == (adam + virtual + 1, schedule + 1)
    clean, _ = ahead(restore="all")(start, {}, fed, KEY)
    moved = harness.max_relative(clean.model_state["student"], got.model_state["student"])
    assert (moved > 1e-4) == (restore != "all")


def test_scanned_steps_equal_unrolled_ones(made):
    step, start = made
    found = [
        wrapped(step, steps=2, kind="deep", restore="all", unroll=unroll)(
            start, {}, harness.make_batch(), KEY
        )[0]
        for unroll in (True, False)
    ]
    close(*found)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"steps": 0}, "steps"),
        ({"kind": "long"}, "long"),
        ({"restore": "none"}, "none"),
        ({"ema": ()}, "moving average"),
    ],
)
def test_arguments_are_checked(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        lookahead.make_lookahead_step(lambda *_: _, **{"steps": 1, "ema": ("teacher",), **kwargs})


def test_pseudo_labels_are_for_confident_answers_on_examples_without_a_label():
    sure = np.array([[9.0, 0, 0], [0.1, 0, 0], [9.0, 0, 0], [0.1, 0, 0]])
    student = np.random.default_rng(0).normal(size=(4, 3))
    batch = {
        "input": jnp.zeros((4, 1)),
        "label": jnp.array([1, 1, 2, 2]),
        "labelled": jnp.array([0.0, 0.0, 2.0, 2.0]),
    }

    def nets(role, *inputs, train=False, stop_gradient_params=False):
        return {"logits": jnp.asarray(student if role == "student" else sure)}, {}

    terms = self_training.make(weight=0.5).loss(nets, batch, {}, jnp.int32(0))
    log_p = log_softmax(student)
    np.testing.assert_allclose(terms.values["pseudo_labels"], [-log_p[0, 0], 0, 0, 0], rtol=1e-5)
    want = [0, 0, -2 * log_p[2, 2], -2 * log_p[3, 2]]
    np.testing.assert_allclose(terms.values["cross_entropy"], want, rtol=1e-5)
    assert terms.coef == {"pseudo_labels": 0.5}
