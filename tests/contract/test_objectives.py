"""What every training method must satisfy; new modules in `objectives/` are found by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax.core import partition, rng, steps
from distill_jax.core.errors import ConfigError
from distill_jax.run.checkpoint import Checkpointer
from tests import harness

OBJECTIVES = harness.modules("objectives")
pytestmark = pytest.mark.parametrize("name", OBJECTIVES)


def gradients(made, batch, *, mesh=None):
    """The mean loss and its gradient, one device or a mesh."""
    mesh = partition.make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    state = made.init(jax.random.key(0))

    def loss_fn(params, batch):
        nets = steps.BoundNets(
            made.models,
            {r: p for r, (p, _) in made.frozen.items()} | params,
            {r: s for r, (_, s) in made.frozen.items()} | dict(state.model_state),
            key=jax.random.key(1),
        )
        terms = made.objective.loss(nets, batch, state.memory, jnp.int32(0))
        return sum(terms.coef.get(k, 1.0) * v.mean() for k, v in terms.values.items())

    batch = jax.device_put(batch, partition.over_batch(mesh))
    params = jax.device_put(dict(state.params), partition.replicated(mesh))
    return jax.jit(jax.value_and_grad(loss_fn))(params, batch)


def test_jit_equals_eager(name):
    made, batch = harness.setup(name), harness.make_batch()
    state = made.init(jax.random.key(0))
    eager = made.step(state, made.frozen, batch, jax.random.key(3))
    jitted = jax.jit(made.step)(state, made.frozen, batch, jax.random.key(3))
    assert harness.max_relative(eager, jitted) < 1e-5


@pytest.mark.parametrize("x64, tolerance, batch_norm", [(False, 1e-5, False), (True, 1e-10, True)])
def test_one_device_equals_eight(name, x64, tolerance, batch_norm):
    with jax.enable_x64(x64):
        made = harness.setup(name, batch_norm=batch_norm)
        batch = harness.make_batch()
        one = gradients(made, batch)
        eight = gradients(made, batch, mesh=partition.make_mesh())
        assert one[0].dtype == (jnp.float64 if x64 else jnp.float32)
        assert harness.max_relative(one, eight) < tolerance


def test_sharded_parameters_equal_replicated(name):
    made, batch = harness.setup(name), harness.make_batch()
    whole, history = harness.run(made, batch, n_steps=3)
    mesh = partition.make_mesh(data=2, fsdp=4)
    sharded, other = harness.run(made, batch, mesh=mesh, n_steps=3)
    assert harness.max_relative(whole.params, sharded.params) < 1e-5
    assert harness.max_relative(history[-1]["loss"], other[-1]["loss"]) < 1e-5


def test_parameters_are_really_sharded(name):
    made, mesh = harness.setup(name), partition.make_mesh(data=1, fsdp=8)
    shapes = jax.eval_shape(made.init, jax.random.key(0))
    shardings = partition.infer(shapes, mesh, rules={}, min_size=1)
    state = jax.jit(made.init, out_shardings=shardings)(jax.random.key(0))
    kernel = state.params["student"]["first"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8


def test_accumulation_is_exact_or_refused(name):
    full = harness.setup(name)
    batch = harness.make_batch()
    batch["mask"] = batch["mask"].at[jnp.array([1, 6, 7])].set(0.0)
    if full.objective.couples_batch:
        with pytest.raises(ConfigError, match="couples the examples"):
            harness.setup(name, accum_steps=4)
        return
    want, history = harness.run(full, batch, n_steps=2)
    for unroll in (True, False) if name == "supervised" else (True,):  # of the step, not of a loss
        made = harness.setup(name, accum_steps=4, unroll=unroll)
        got, other = harness.run(made, batch, n_steps=2)
        assert harness.max_relative(want.params, got.params) < 1e-5
        for key in history[-1]:
            np.testing.assert_allclose(history[-1][key], other[-1][key], rtol=1e-5)


def test_frozen_networks_get_no_gradient_and_no_state(name):
    made, batch = harness.setup(name), harness.make_batch()
    state = made.init(jax.random.key(0))

    def loss(frozen):
        return made.step(state, frozen, batch, jax.random.key(0))[1]["loss"]

    grads = jax.grad(loss)(made.frozen)
    assert all(not np.any(g) for g in jax.tree.leaves(grads))
    for part in (state.params, state.model_state, state.targets):
        assert not set(part) & set(made.frozen)


def test_every_trainable_leaf_learns(name):
    made, batch = harness.setup(name), harness.make_batch()
    _, grads = gradients(made, batch)
    dead = [n for n, g in partition.named_leaves(grads).items() if not np.any(g)]
    assert not dead


def test_one_compilation_donation_and_stable_types(name):
    made, batch = harness.setup(name), harness.make_batch()
    step = jax.jit(made.step, donate_argnums=0)
    state = jax.jit(made.init)(jax.random.key(0))
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


def test_padding_changes_nothing(name):
    batch = harness.make_batch(16)
    padded = jax.tree.map(lambda x: jnp.concatenate([x, x[:4] * 0 + 3]), batch)
    padded["mask"] = padded["mask"].at[16:].set(0.0)
    padded["label"] = padded["label"].at[16:].set(0)
    want, history = harness.run(harness.setup(name), batch)
    got, other = harness.run(harness.setup(name, batch=padded), padded)
    assert harness.max_relative(want.params, got.params) < 1e-5
    np.testing.assert_allclose(history[0]["loss"], other[0]["loss"], rtol=1e-5)


def test_resume_is_bitwise(name, tmp_path):
    made, batch = harness.setup(name, tx=optax.adamw(1e-2)), harness.make_batch()
    step = jax.jit(made.step)
    states = [jax.jit(made.init)(jax.random.key(0))]
    for _ in range(4):
        states.append(step(states[-1], made.frozen, batch, jax.random.key(0))[0])
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(states[2], {}, metric=None)
    checkpointer.wait()
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), states[0]
    )
    state = checkpointer.restore(like).state
    for _ in range(2):
        state, _ = step(state, made.frozen, batch, jax.random.key(0))
    checkpointer.close()
    same = jax.tree.map(lambda a, b: bool((a == b).all()), state, states[4])
    assert all(jax.tree.leaves(same))


def test_finite_in_bfloat16(name):
    made = harness.setup(name, precision="bfloat16")
    state, history = harness.run(made, harness.make_batch(), n_steps=2)
    assert np.isfinite(history[-1]["loss"])
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(state.params))


def test_keys_depend_on_names_not_on_order(name):
    del name
    key = jax.random.key(0)
    a, b = rng.stream(key, "student", "dropout"), rng.stream(key, "teacher", "dropout")
    assert not (jax.random.key_data(a) == jax.random.key_data(b)).all()
