"""What every training method must satisfy; new modules in `objectives/` are found by themselves.

Tests of one method share its setup and its compiled step, and run in one process.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax.analysis import dependence
from distill_jax.core import api, means, partition, rng, steps
from distill_jax.core.errors import ConfigError
from tests import harness

OBJECTIVES = harness.modules("objectives")


ON_A_MESH = {"kd", "barlow_twins", "moco", "dino"}
"""Methods that the fast suite tries on a mesh: no state, batch statistics, a queue, a centre. The
full suite and `benchmarks/devices.py` try all."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in OBJECTIVES],
)
def name(request):
    return request.param


@functools.lru_cache(maxsize=1)
def case(name) -> harness.Case:
    made = harness.setup(name)
    return harness.follow(made, harness.batch_of(name), n_steps=3, donate=True)


def nets_of(made, state, batch, params=None):
    """The networks at a state, with other parameters if given."""
    return steps.BoundNets(
        made.models,
        {r: p for r, (p, _) in made.frozen.items()}
        | dict(state.targets)
        | (params or dict(state.params)),
        {r: s for r, (_, s) in made.frozen.items()} | dict(state.model_state),
        key=jax.random.key(1),
        batch=batch,
    )


@pytest.mark.slow
def test_jit_equals_eager(name):
    made, batch, _, states, _ = case(name)
    state = harness.fresh(states[0])

    def loss(params, batch):
        nets = nets_of(made, state, batch, params)
        terms = made.objective.loss(nets, batch, state.memory, jnp.int32(2))
        return terms.values, terms.coef, terms.weights, terms.state, terms.memory

    arguments = dict(state.params), batch
    assert harness.max_relative(loss(*arguments), jax.jit(loss)(*arguments)) < 1e-5


def test_every_leaf_learns(name):
    states = case(name).states
    first, last = states[0].params, states[harness.STEPS_TO_LEARN.get(name, 1)].params
    moved = jax.tree.map(lambda a, b: np.any(a != b), first, last)
    assert not [n for n, has_moved in partition.named_leaves(moved).items() if not has_moved]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[
                pytest.mark.xdist_group(name),
                *([] if name in ON_A_MESH else [pytest.mark.slow]),
            ],
        )
        for name in OBJECTIVES
    ],
    scope="module",
)
def test_one_device_equals_a_mesh_of_eight(name):
    """Two devices along the batch, four that share every parameter; in float64."""
    with jax.enable_x64(True):
        made, batch = harness.setup(name, batch_norm=True), harness.batch_of(name)
        n, mesh = harness.STEPS_TO_LEARN.get(name, 1), partition.make_mesh(data=2, fsdp=4)
        one, alone = harness.run(made, batch, n_steps=n)
        eight, split = harness.run(made, batch, mesh=mesh, n_steps=n)
        assert jax.tree.leaves(one.params["student"])[0].dtype == jnp.float64
        kernels = partition.named_leaves(eight.params["student"])
        kernel = next(x for n, x in kernels.items() if n.endswith("kernel") and x.size % 4 == 0)
        assert kernel.addressable_shards[0].data.size == kernel.size // 4
        one, eight = jax.device_get((one, eight))
        assert harness.max_relative(one.params, eight.params) < 1e-10
        assert harness.max_relative(one.targets, eight.targets) < 1e-10
        assert harness.max_relative(one.memory, eight.memory) < 1e-10
        assert harness.max_relative(alone[-1]["loss"], split[-1]["loss"]) < 1e-10


def test_padding_and_accumulation_change_nothing(name):
    """Rows of mask 0, and micro-batches that hold different numbers of rows."""
    made, batch, _, states, metrics = case(name)
    padded = harness.padded(batch, 4)
    if made.objective.couples_batch:
        with pytest.raises(ConfigError, match="couples the examples"):
            harness.setup(name, accum_steps=2)
        ways = [made]
    else:
        # Scanned or unrolled is a matter of the step, not of a loss: one method tries both.
        loops = (True, False) if name == "supervised" else (True,)
        ways = [harness.setup(name, accum_steps=2, unroll=unroll) for unroll in loops]
    for way in ways:
        got, other = jax.jit(way.step)(states[0], made.frozen, padded, jax.random.key(3))
        assert harness.max_relative(states[1].params, got.params) < 1e-5
        assert harness.max_relative(states[1].memory, got.memory) < 1e-5
        for key in metrics[0]:
            np.testing.assert_allclose(metrics[0][key], other[key], rtol=1e-5, atol=1e-7)


def test_frozen_networks_get_no_gradient_and_no_state(name):
    made, batch, _, states, _ = case(name)

    def loss(frozen):
        key = jax.random.key(0)
        nets = steps.bind_networks(made.models, states[0], frozen, key=key, batch=batch)
        terms = made.objective.loss(nets, batch, states[0].memory, states[0].step)
        return means.mean_loss(terms, batch["mask"])[0]

    gradient = dependence.of(jax.grad(loss), made.frozen) if made.frozen else {}
    assert all(leaf.zero for leaf in jax.tree.leaves(gradient))
    for part in (states[0].params, states[0].model_state, states[0].targets):
        assert not set(part) & set(made.frozen)


def test_one_compilation_donation_and_stable_types(name):
    made, batch, step, states, _ = case(name)
    assert step._cache_size() <= 2  # arguments from the host, and from the device
    state = harness.fresh(states[0])
    before = jax.tree.map(jax.typeof, state)
    leaf = jax.tree.leaves(state.params)[0]
    batch, key = jax.device_put(batch), jax.random.key(0)
    state, _ = step(state, made.frozen, batch, key)
    assert leaf.is_deleted()
    assert jax.tree.map(jax.typeof, state) == before
    with jax.no_tracing():
        for _ in range(3):
            state, _ = step(state, made.frozen, batch, key)
    assert int(state.step) == 4


def test_resume_is_bitwise(name, tmp_path):
    made, batch, step, states, _ = case(name)
    if name == "supervised":  # an optimizer with more state
        made = harness.setup(name, tx=optax.adamw(1e-2))
        made, batch, step, states, _ = harness.follow(made, batch, n_steps=3, donate=True)
    state = harness.saved_and_restored(states[1], tmp_path)
    for _ in range(2):
        state, _ = step(harness.fresh(state), made.frozen, batch, jax.random.key(3))
    same = jax.tree.map(np.array_equal, *jax.device_get((state, states[3])))
    assert all(jax.tree.leaves(same))


@pytest.mark.slow
def test_finite_in_bfloat16(name):
    *_, states, _ = case(name)
    made, batch = harness.setup(name, precision="bfloat16"), case(name).batch
    state, metrics = jax.jit(made.step)(
        harness.fresh(states[0]), made.frozen, batch, jax.random.key(3)
    )
    assert np.isfinite(metrics["loss"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(state.params))


def test_keys_depend_on_names_not_on_order():
    key = jax.random.key(0)
    a, b = rng.stream(key, "student", "dropout"), rng.stream(key, "teacher", "dropout")
    assert not (jax.random.key_data(a) == jax.random.key_data(b)).all()


def test_methods_of_every_task_read_no_label_or_take_the_task(name):
    objective = harness.make_objective(name)
    if objective.tasks != api.TASKS or hasattr(objective, "task"):
        return
    made, batch, _, states, _ = case(name)
    state = harness.fresh(states[0])

    def loss(label):
        given = {**batch, "label": label}
        nets = nets_of(made, state, given)
        terms = made.objective.loss(nets, given, state.memory, jnp.int32(2))
        return terms.values, terms.weights, terms.memory

    leaves = jax.tree.leaves(dependence.of(loss, batch["label"]))
    assert not dependence.union(leaves)


@pytest.mark.parametrize("task", ["multilabel", "regression"])
@pytest.mark.parametrize(
    "name",
    [
        "supervised",
        "kd",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("finetune", "fitnet", "multi_teacher", "srrl")
        ),
    ],
)
def test_padding_and_accumulation_change_nothing_in_other_tasks(name, task):
    r = np.random.RandomState(0)
    label = r.rand(16, harness.K).round() if task == "multilabel" else r.randn(16, harness.K)
    known = (r.rand(16, harness.K) < 0.7).astype(np.float32)
    batch = {**harness.make_batch(), "label": jnp.asarray(label * known, jnp.float32)}
    batch["labelled"] = jnp.asarray(known)
    made = harness.setup(name, batch=batch, kwargs={"task": task})
    start = harness.fresh(jax.jit(made.init)(jax.random.key(0)))
    want, metrics = jax.jit(made.step)(start, made.frozen, batch, jax.random.key(3))
    split = harness.setup(name, batch=batch, kwargs={"task": task}, accum_steps=2)
    padded = harness.padded(batch, 4)
    got, other = jax.jit(split.step)(start, made.frozen, padded, jax.random.key(3))
    assert harness.max_relative(want.params, got.params) < 1e-5
    assert metrics.keys() == other.keys()
    for key in metrics:
        np.testing.assert_allclose(metrics[key], other[key], rtol=1e-5, atol=1e-7)
