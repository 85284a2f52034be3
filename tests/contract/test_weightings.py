"""What every weighting must satisfy, with fixed weights, learned ones and controls."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax.core import bilevel, partition, state, steps, weighted_objective
from distill_jax.core.errors import ConfigError
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.models import ratio_mlp
from distill_jax.objectives.kd import KD
from distill_jax.run.resolve import bind
from tests import harness
from tests.reference import softmax

WEIGHERS = harness.modules("weighting")
LOSS_TERMS = ("cross_entropy", "distillation")
OUTPUTS = {"meta_weight_net": 2}
LEARNED = ("trilateral", "meta_weight_net", "reweight")


def setup(name, *, control="none", options=None, outer=None, tx=None, batch=None, models=None):
    """Distillation on tiny networks under a weighting, as the step that training would use."""
    make = importlib.import_module(f"distill_jax.weighting.{name}").make
    weighting = bind(make, {}, where="weighting.kwargs", provided={"total_steps": 10})()
    weighted = WeightedObjective(
        objective=KD(temperature=2.0),
        weighting=weighting,
        loss_terms=LOSS_TERMS,
        num_classes=harness.K,
        control=control,
    )
    net = harness.tiny_model(batch_norm=True)
    networks = {"student": net, "teacher": net}
    for role in weighting.roles:
        networks[role] = ratio_mlp.make(outputs=OUTPUTS.get(name, 1), hidden=(6,), zero_init=False)
    networks |= models or {}
    shapes = state.infer_shapes(
        weighted, networks, harness.make_batch() if batch is None else batch
    )
    tx = optax.sgd(0.1, momentum=0.9) if tx is None else tx
    by_step = weighting.by_gradient or (weighting.roles and control != "joint")
    outer = bool(by_step and control != "frozen") if outer is None else outer
    if by_step:
        tx = bilevel.Optimizers(tx, optax.adamw(1e-2), tuple(weighting.roles))
        step = bilevel.make_bilevel_step(
            weighted, networks, tx, options or bilevel.Bilevel(), outer=outer
        )
    else:
        step = steps.make_train_step(weighted, networks, tx)
    trainable = ("student", *weighting.roles)
    init = state.make_init(weighted, networks, tx, shapes, trainable=trainable, ema={})
    frozen = {"teacher": net.init(jax.random.key(7), harness.make_batch()["input"])}
    return harness.Setup(weighted, networks, shapes, init, step, frozen), outer


def fed(outer, batch=None):
    batch = harness.make_batch() if batch is None else batch
    return {"train": batch, "held_out": harness.make_batch(8, seed=5)} if outer else batch


PLAIN = [(name, "none") for name in WEIGHERS]
COUPLED = [("trilateral", "shuffled"), ("trilateral", "batch_mean")]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(way, marks=pytest.mark.xdist_group("-".join(way)))
        for way in [*PLAIN, ("trilateral", "joint")]
    ],
    ids="-".join,
)
def weighting(request):
    return request.param


@functools.lru_cache(maxsize=1)
def case(name, control="none") -> harness.Case:
    net = harness.tiny_model()  # batch statistics would see padding
    made, outer = setup(name, control=control, models={"student": net, "teacher": net})
    return harness.follow(made, fed(outer), n_steps=4)


@pytest.mark.slow
def test_jit_equals_eager(weighting):
    made, batch, _, states, metrics = case(*weighting)
    eager = made.step(harness.fresh(states[0]), made.frozen, batch, jax.random.key(3))
    assert harness.max_relative(eager, (states[1], metrics[0])) < 1e-4


def test_one_compilation(weighting):
    _, _, step, states, _ = case(*weighting)
    assert step._cache_size() == 1
    assert jax.tree.map(jax.typeof, states[0]) == jax.tree.map(jax.typeof, states[4])


def test_padding_changes_nothing(weighting):
    name, control = weighting
    made, batch, _, states, metrics = case(name, control)
    padded = harness.padded(batch.get("train", batch), 8)
    made, outer = setup(name, control=control, batch=padded, models=case(*weighting).made.models)
    got, other = jax.jit(made.step)(states[0], made.frozen, fed(outer, padded), jax.random.key(3))
    assert harness.max_relative(states[1].params, got.params) < 1e-5
    np.testing.assert_allclose(metrics[0]["loss"], other["loss"], rtol=1e-5)


def test_resume_is_bitwise(weighting, tmp_path):
    made, batch, step, states, _ = case(*weighting)
    state = harness.saved_and_restored(states[2], tmp_path)
    for _ in range(2):
        state, _ = step(harness.fresh(state), made.frozen, batch, jax.random.key(3))
    same = jax.tree.map(np.array_equal, *jax.device_get((state, states[4])))
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    "name, control",
    [
        pytest.param(*way, marks=() if way == ("trilateral", "none") else pytest.mark.slow)
        for way in PLAIN + COUPLED
    ],
)
def test_one_device_equals_eight(name, control):
    with jax.enable_x64(True):
        made, outer = setup(name, control=control)
        one, history = harness.run(made, fed(outer), n_steps=2)
        eight, other = harness.run(made, fed(outer), n_steps=2, mesh=partition.make_mesh())
        sharded, _ = harness.run(
            made, fed(outer), n_steps=2, mesh=partition.make_mesh(data=2, fsdp=4)
        )
    assert harness.max_relative(one.params, eight.params) < 1e-6
    assert harness.max_relative(one.params, sharded.params) < 1e-6
    for name in history[-1]:
        np.testing.assert_allclose(history[-1][name], other[-1][name], rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in LEARNED if n != "reweight"])
def test_every_leaf_of_the_network_learns_and_only_where_it_should(name):
    before, after, *_ = case(name).states
    moved = jax.tree.map(lambda a, b: np.any(a != b), before.params, after.params)
    assert all(jax.tree.leaves(moved["weighting"]))
    frozen, outer = setup(name, control="frozen")
    assert not outer
    still, _ = harness.run(frozen, fed(False), n_steps=2)
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), before.params, still.params)
    assert all(jax.tree.leaves(same["weighting"])) and not all(jax.tree.leaves(same["student"]))


def test_permuting_examples_permutes_weights():
    made, _ = setup("trilateral")
    current, batch = made.init(jax.random.key(0)), harness.make_batch()
    order = jax.random.permutation(jax.random.key(1), 16)

    def weights(batch):
        nets = steps.bind_networks(made.models, current, made.frozen, key=jax.random.key(0))
        return made.objective.example_weights(nets, batch, current.memory, jnp.int32(0))["weights"]

    shuffled = jax.tree.map(lambda x: x[order], batch)
    np.testing.assert_allclose(weights(batch)[order], weights(shuffled), rtol=1e-5)


def test_controls_change_what_the_student_gets_and_nothing_else():
    made, _ = setup("trilateral", control="shuffled")
    mean, _ = setup("trilateral", control="batch_mean")
    weights = jax.random.uniform(jax.random.key(0), (16, 2))
    mask = jnp.ones(16).at[3].set(0)
    shuffled = made.objective.used(weights, mask, jnp.int32(4))
    assert not np.allclose(shuffled, weights)
    np.testing.assert_array_equal(np.sort(shuffled, axis=0), np.sort(weights, axis=0))
    other = made.objective.used(weights, mask, jnp.int32(5))
    assert not np.allclose(shuffled, other)
    averaged = mean.objective.used(weights, mask, jnp.int32(4))
    want = np.delete(np.asarray(weights), 3, axis=0).mean(0)
    np.testing.assert_allclose(averaged, np.broadcast_to(want, (16, 2)), rtol=1e-6)


def test_the_shuffled_control_leaves_the_weighers_own_gradient_alone():
    """It breaks the pairing for the student; the product still goes to the example it is of."""
    found = {}
    for control in ("none", "shuffled"):
        made, _ = setup("trilateral", control=control)
        current = made.init(jax.random.key(0))
        equal = jax.tree.map(jnp.zeros_like, current.params["weighting"])
        current = current.replace(params={**current.params, "weighting": equal})
        # Equal ratios for all examples: shuffling them changes nothing, so all must agree.
        new, _ = jax.jit(made.step)(current, made.frozen, fed(True), jax.random.key(0))
        found[control] = new.params
    assert harness.max_relative(found["none"], found["shuffled"]) < 1e-6


def test_parameters_that_reach_no_weight_are_found():
    made, _ = setup("trilateral")
    assert weighted_objective.dead_parameters(made.objective, made.models, made.shapes) == []
    alive = made.models["weighting"]

    def init(key, *inputs):
        params, model_state = alive.init(key, *inputs)
        return {**params, "idle": {"kernel": jnp.zeros(3)}}, model_state

    def apply(params, model_state, *inputs, **kwargs):
        used = {name: x for name, x in params.items() if name != "idle"}
        return alive.apply(used, model_state, *inputs, **kwargs)

    models = {**made.models, "weighting": type(alive)(init, apply)}
    shapes = state.infer_shapes(made.objective, models, harness.make_batch())
    assert weighted_objective.dead_parameters(made.objective, models, shapes) == [
        ("weighting", "idle/kernel")
    ]


def test_reweighting_equals_its_definition():
    """The first step of L2RW by brute force: the gradient in the weights, at weights of zero."""
    with jax.enable_x64(True):
        made, _ = setup("reweight", tx=optax.sgd(0.3))
        current = made.init(jax.random.key(0))
        batch, held_out = harness.make_batch(), harness.make_batch(8, seed=5)
        frozen = {r: p for r, (p, _) in made.frozen.items()}
        model_state = {r: s for r, (_, s) in made.frozen.items()} | dict(current.model_state)

        def terms(student, batch):
            params = {**frozen, "student": student}
            nets = steps.BoundNets(made.models, params, model_state, key=jax.random.key(0))
            return made.objective.objective.loss(nets, batch, {}, jnp.int32(0)).values

        def outer(weights):
            def inner(student):
                found = terms(student, batch)
                return sum((weights[:, j] * found[n]).mean() for j, n in enumerate(LOSS_TERMS))

            grads = jax.grad(inner)(current.params["student"])
            moved = jax.tree.map(lambda p, g: p - 0.3 * g, current.params["student"], grads)
            return terms(moved, held_out)["cross_entropy"].mean()

        gradient = jax.jit(jax.grad(outer))(jnp.zeros((16, 2)))
        weights = made.objective.weighting.from_gradient(gradient, batch["mask"])

        def final(student):
            found = terms(student, batch)
            return sum((weights[:, j] * found[n]).mean() for j, n in enumerate(LOSS_TERMS))

        grads = jax.jit(jax.grad(final))(current.params["student"])
        want = jax.tree.map(lambda p, g: p - 0.3 * g, current.params["student"], grads)
        new, _ = jax.jit(made.step)(current, made.frozen, fed(True), jax.random.key(0))
        assert harness.max_relative(want, new.params["student"]) < 1e-6


def test_class_means_equal_numpy_and_empty_classes_are_uniform():
    made, _ = setup("trilateral")
    current = made.init(jax.random.key(0))
    batch = harness.make_batch(40)
    batch["label"] = jnp.where(batch["label"] == 2, 0, batch["label"])
    batch["mask"] = batch["mask"].at[5].set(0.0)
    nets = steps.bind_networks(made.models, current, made.frozen, key=jax.random.key(0))
    sums, counts = made.objective.class_sums(nets, batch, current.memory)
    table = np.asarray(weighted_objective.class_means(sums, counts))
    params, model_state = made.frozen["teacher"]
    outputs, _ = made.models["teacher"].apply(
        params, model_state, batch["input"], train=False, rngs={}
    )
    logits = np.asarray(outputs["logits"], np.float64)
    probs = softmax(logits)
    label, real = np.asarray(batch["label"]), np.asarray(batch["mask"]) > 0
    for c in range(harness.K):
        rows = real & (label == c)
        want = probs[rows].mean(0) if rows.any() else np.full(harness.K, 1 / harness.K)
        np.testing.assert_allclose(table[c], want, rtol=1e-5)


@pytest.mark.parametrize(
    "kwargs, word",
    [
        ({"control": "shufled"}, "did you mean 'shuffled'"),
        ({"loss_terms": ()}, "the loss terms are"),
        ({"loss_terms": ("cross_entropy", "cross_entropy")}, "once"),
    ],
)
def test_wrong_arguments_are_refused(kwargs, word):
    made, _ = setup("constant")
    good = {"objective": KD(), "weighting": made.objective.weighting, "loss_terms": LOSS_TERMS}
    with pytest.raises(ConfigError, match=word):
        WeightedObjective(**(good | kwargs))


def test_an_unknown_signal_is_refused():
    made, _ = setup("constant")
    wrong = WeightedObjective(
        objective=KD(),
        weighting=made.objective.weighting,
        loss_terms=("cross_entropy", "destillation"),
    )
    with pytest.raises(ConfigError, match="did you mean 'distillation'"):
        state.infer_shapes(wrong, made.models, harness.make_batch())
