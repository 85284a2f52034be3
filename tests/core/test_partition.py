"""The mesh, the rules, and tensor parallelism of transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from distill_jax.core import partition, state, steps
from distill_jax.core.api import Model
from distill_jax.core.errors import ConfigError
from distill_jax.core.precision import cast
from distill_jax.models import tabular_transformer, vit
from distill_jax.run import collectives
from tests import harness

B, TOKENS, WIDTH = 8, 5, 16


def test_sizes_of_the_mesh():
    assert partition.make_mesh().shape == {"data": 8, "fsdp": 1, "model": 1}
    mesh = partition.make_mesh(data=2, fsdp=2, model=-1)
    assert mesh.shape == {"data": 2, "fsdp": 2, "model": 2}
    assert partition.batch_shards(mesh) == 4
    assert partition.over_batch(mesh).shard_shape((8, 3)) == (2, 3)


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (-1, 3, 1), (8, 0, 1), (2, 2, 1)])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(ConfigError, match="does not fit 8 devices"):
        partition.make_mesh(**dict(zip(partition.AXES, sizes, strict=True)))


def test_a_batch_splits_over_data_and_fsdp_alone():
    mesh = partition.make_mesh(data=2, model=4)
    partition.check_batch(6, mesh, where="batch_size")
    with pytest.raises(ConfigError, match="7 does not split evenly over 2 parts of the mesh"):
        partition.check_batch(7, mesh, where="batch_size")


@pytest.mark.parametrize(
    "entry, message",
    [
        ("transformers", "did you mean 'transformer'"),
        (("(", ("fsdp",)), "is not a regex"),
        (("kernel$", "fsdp", 3), "is not a rule"),
        (3, "3 is not a rule"),
    ],
)
def test_entries_that_are_no_rules(entry, message):
    with pytest.raises(ConfigError, match=r"^partition\.rules: ") as error:
        partition.read_rules([entry], where="partition.rules")
    assert message in str(error.value)


def test_rules_of_ones_own_go_before_a_set():
    own = (r"Dense_0/kernel$", (None, "model"))
    rules = partition.read_rules([own, "transformer"], where="partition.rules")
    assert next(iter(rules.items())) == own
    assert dict(rules) == {own[0]: own[1], **partition.RULE_SETS["transformer"]}


def wide(model: Model) -> Model:
    def init(key, *inputs):
        params, model_state = model.init(key, *inputs)
        return cast(params, jnp.float64), model_state

    return Model(init, model.apply)


def make_training():
    """A student of one block and a wider teacher; returns step, state and frozen networks."""
    widths = {"student": WIDTH, "teacher": 3 * WIDTH}
    models = {
        role: wide(vit.make(num_classes=harness.K, width=width, depth=1, heads=4, patch_size=3))
        for role, width in widths.items()
    }
    objective, tx, batch = harness.make_objective("kd"), optax.sgd(0.1), harness.make_batch(B)
    shapes = state.infer_shapes(objective, models, batch)
    init = state.make_init(objective, models, tx, shapes, trainable=("student",), ema={})
    make_teacher = lambda key: {"teacher": models["teacher"].init(key, batch["input"])}  # noqa: E731
    like = jax.eval_shape(lambda key: (init(key), make_teacher(key)), jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(x):
        scale = 0.3 if jnp.issubdtype(x.dtype, jnp.floating) else 0.0
        return (scale * rng.normal(size=x.shape)).astype(x.dtype)

    return steps.make_train_step(objective, models, tx), *jax.tree.map(draw, like)


def train(training, mesh, rules):
    """Two steps of distillation; returns the state, the metrics and the compiled step."""
    step, start, frozen = training
    place = lambda tree: partition.infer(tree, mesh, rules=rules)  # noqa: E731
    current, frozen = jax.device_put((start, frozen), (place(start), place(frozen)))
    batch = jax.device_put(harness.make_batch(B), partition.over_batch(mesh))
    key = jax.device_put(jax.random.key(0), partition.replicated(mesh))
    jitted = jax.jit(step, out_shardings=(place(start), None))
    compiled = jitted.lower(current, frozen, batch, key).compile()
    for _ in range(2):
        current, metrics = compiled(current, frozen, batch, key)
    return current, metrics, compiled


def test_tensor_parallel_equals_one_device_and_exchanges_what_megatron_does():
    rules = partition.RULE_SETS["transformer"]
    with jax.enable_x64(True):
        training = make_training()
        one, losses, _ = train(training, partition.make_mesh(devices=jax.devices()[:1]), rules)
        split, others, step = train(training, partition.make_mesh(data=2, model=4), rules)
        assert one.params["student"]["Dense_0"]["kernel"].dtype == jnp.float64
        assert harness.max_relative(one.params, split.params) < 1e-10
        assert harness.max_relative(losses, others) < 1e-10
    block = split.params["student"]["Block_0"]
    for layers in (block, block["Attention_0"]):
        first, second = layers["Dense_0"], layers["Dense_1"]
        assert first["kernel"].sharding.spec[1] == first["bias"].sharding.spec[0] == "model"
        assert second["kernel"].sharding.spec[0] == "model"
    found = collectives.totals(collectives.of_compiled(step))
    # Each branch of a block: a sum of its output, and where it learns of its input's gradient;
    # the teacher is three times as wide.
    activation = B // 2 * TOKENS * WIDTH * 8
    assert found["all-reduce", 4].nbytes == (2 + 2 + 2 * 3) * activation
    own = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(split.params))
    assert found["all-reduce", 2].nbytes == own + 3 * 8  # examples, two terms
    assert len(found) == 2


def test_the_set_covers_tables_and_both_parallelisms():
    model = tabular_transformer.make(
        num_classes=2, cardinalities=(3, 4), width=WIDTH, depth=2, heads=4
    )
    x = {"categorical": jnp.zeros((4, 2), jnp.int32), "numeric": jnp.zeros((4, 3))}
    params, _ = jax.eval_shape(model.init, jax.random.key(0), x)
    mesh = partition.make_mesh(data=2, fsdp=2, model=2)
    rules = partition.RULE_SETS["transformer"]
    shardings = partition.named_leaves(partition.infer(params, mesh, rules=rules))
    specs = {name: s.spec for name, s in shardings.items() if any(s.spec)}
    branches = ("Attention_0/Dense", "Dense")
    columns, rows = P("fsdp", "model"), P("model", "fsdp")
    assert specs == {
        f"Block_{block}/{branch}_{layer}": spec
        for block in range(2)
        for branch in branches
        for layer, spec in (("0/kernel", columns), ("0/bias", P("model")), ("1/kernel", rows))
    }


def test_a_rule_that_does_not_divide_its_leaf_names_its_path():
    params = {"Attention_0": {"Dense_0": {"kernel": np.zeros((6, 9)), "bias": np.zeros(9)}}}
    mesh = partition.make_mesh(data=4, model=2)
    with pytest.raises(ConfigError, match=r"axis of size 9 of .* over model=2") as error:
        partition.infer(
            params,
            mesh,
            rules=partition.RULE_SETS["transformer"],
            where="partition.frozen_rules",
        )
    assert error.value.where.startswith("partition.frozen_rules[")


def test_gathering_changes_no_value_and_no_derivative():
    model = Model(lambda key, x: ({}, {}), lambda p, s, x, **_: (jnp.tanh(x @ p["w"]).sum(), s))
    mesh = partition.make_mesh(data=2, fsdp=4)
    w, x = jnp.arange(32.0).reshape(8, 4) / 32, jnp.ones((8, 8)) / 8
    shardings = partition.infer({"w": w}, mesh, rules={}, min_size=1)
    split = partition.gathered(model, shardings)

    def derivatives(model, w):
        f = lambda p: model.apply({"w": p}, {}, x, train=True, rngs={})[0]  # noqa: E731
        pushed = jax.vmap(lambda t: jax.jvp(f, (w,), (t,))[1])(jnp.stack([w, w**2]))
        return f(w), jax.grad(f)(w), pushed, jax.grad(lambda w: (jax.grad(f)(w) ** 2).sum())(w)

    expected = jax.jit(lambda w: derivatives(model, w))(w)
    found = jax.jit(lambda w: derivatives(split, w))(jax.device_put(w, shardings["w"]))
    assert harness.max_relative(expected, found) < 1e-5
