"""What a compiled step exchanges and holds, read from the program itself."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distill_jax.configs.distill import kd
from jax.sharding import PartitionSpec as P

from distill_jax.core import partition
from distill_jax.core.errors import ConfigError
from distill_jax.run import build, collectives, describe
from distill_jax.run import config as config_lib
from distill_jax.run.collectives import Collective, parse

SPLIT = P("data", "model")


def compiled(body, *shapes, out=SPLIT):
    mesh = partition.make_mesh(data=2, model=4)
    mapped = jax.shard_map(body, mesh=mesh, in_specs=SPLIT, out_specs=out, check_vma=False)
    return jax.jit(mapped).lower(*[jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]).compile()


RING = [(i, (i + 1) % 4) for i in range(4)]


@pytest.mark.parametrize(
    "body, found",
    [
        (lambda x: jax.lax.psum(x, "model"), ("all-reduce", 16, 4)),
        (lambda x: jax.lax.psum(x, ("data", "model")), ("all-reduce", 16, 8)),
        (lambda x: jax.lax.psum(x.astype(jnp.int8), "data"), ("all-reduce", 4, 2)),
        (lambda x: jax.lax.all_gather(x, "model", axis=1, tiled=True), ("all-gather", 64, 4)),
        (
            lambda x: jax.lax.psum_scatter(x, "data", scatter_dimension=0, tiled=True),
            ("reduce-scatter", 16, 2),
        ),
        (
            lambda x: jax.lax.all_to_all(x, "data", split_axis=0, concat_axis=1, tiled=True),
            ("all-to-all", 16, 2),
        ),
        (lambda x: jax.lax.ppermute(x, "model", RING), ("collective-permute", 16, 8)),
    ],
)
def test_collectives_of_compiled_programs(body, found):
    [one] = collectives.of_compiled(compiled(body, (4, 8)))  # [2, 2] on each device
    assert one == Collective(*found)


def test_a_loop_counts_as_often_as_it_runs():
    def body(x):
        step = lambda _, x: jnp.tanh(jax.lax.psum(x, "model"))  # noqa: E731
        inner = lambda _, x: jax.lax.fori_loop(0, 3, step, x)  # noqa: E731
        return jax.lax.psum(jax.lax.fori_loop(0, 5, inner, x), "data")

    found = collectives.totals(collectives.of_compiled(compiled(body, (4, 8))))
    assert found["all-reduce", 4] == (15, 15 * 16, 15 * 16 * 2 * 3 / 4)
    assert found["all-reduce", 2] == (1, 16, 16)


def test_combined_arrays_count_whole():
    body = lambda x, y: jax.lax.psum((x, y[:1]), "model")  # noqa: E731
    found = collectives.of_compiled(compiled(body, (4, 8), (4, 8), out=P("data")))
    assert sum(one.nbytes for one in found) == 16 + 8 and {one.group for one in found} == {4}


# Spellings of accelerators, which XLA:CPU does not produce.
LINES = {
    "%r = f32[8]{0} all-reduce-start(%a), replica_groups=[2,4]<=[4,2]T(1,0)": ("all-reduce", 32, 4),
    "%r = f32[8]{0} all-reduce-done(%r0)": None,
    "%g = (bf16[4,128]{1,0:T(4,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}) all-gather-start(%a), "
    "replica_groups={{0,1,2,3,4,5,6,7}}": ("all-gather", 8192, 8),
    "%g = ((f32[2]{0}, s8[4]{0}), (f32[4]{0}, s8[8]{0})) all-gather-start(%a, %b), "
    "replica_groups={{0,1},{2,3}}": ("all-gather", 24, 2),
    "%s = (f32[2]{0}, /*index=1*/f32[4]{0}) reduce-scatter(%a, %b), "
    "replica_groups=mesh['x'=2,'y'=4] {'y'}": ("reduce-scatter", 96, 4),
    "%s = ((f32[16]{0}), f32[2]{0}) reduce-scatter-start(%a), "
    "replica_groups=mesh['x'=16] {'x':(2)8}": ("reduce-scatter", 64, 8),
    "%p = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%a), "
    "source_target_pairs={{0,1},{1,2},{2,0}}": ("collective-permute", 16, 3),
    "%t = (f32[4]{0}, f32[4]{0}) all-to-all(%a, %b), replica_groups={{0,1}}": ("all-to-all", 32, 2),
    "%r = pred[3]{0} all-reduce(%a), replica_groups={}": ("all-reduce", 3, 8),
    '%f = f32[2]{0} fusion(%a), metadata={op_name="x all-reduce(y"}': None,
}


@pytest.mark.parametrize("line", LINES)
def test_spellings(line):
    text = f"HloModule m\n\nENTRY %main (a: f32[2]) -> f32[2] {{\n  {line}\n}}\n"
    expected = LINES[line]
    assert parse(text, devices=8) == ([Collective(*expected)] if expected else [])


def test_a_ring_sends_what_it_must():
    sent = [Collective(kind, 80, 4).sent for kind in ("all-reduce", "all-gather")]
    assert sent == [120, 60] and Collective("collective-permute", 80, 8, 2).sent == 160


def make_config(student, teacher, *, batch_norm=False, **mesh):
    config = config_lib.smoke(kd.get_config())
    for role, hidden in {"student": student, "teacher": teacher}.items():
        config.roles[role].model = "mlp"
        config.roles[role].kwargs = {"hidden": hidden, "batch_norm": batch_norm}
    config.mesh.update(mesh)
    return config


def size_of(tree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def on_device(tree) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def test_a_data_parallel_step_sums_the_gradient_once():
    config = make_config((8, 6), (32,), batch_norm=True)
    text = describe.describe(config).split("== step")[1]
    experiment = build.build(config, shapes_only=True)
    student = experiment.shapes.roles["student"]
    step = build.compile_step(experiment, build.feed_shapes(experiment))
    found = collectives.of_compiled(step)
    # Of batch norm the sums of x and x^2 go forwards; those that go backwards are its gradient.
    scalars = 1 + len(experiment.shapes.terms.values)  # the number of examples, and each term
    expected = size_of(student.params) + size_of(student.state) + 4 * scalars
    assert {(one.kind, one.group) for one in found} == {("all-reduce", 8)}
    assert sum(one.nbytes for one in found) == expected  # nothing of the teacher
    held = collectives.memory(step)
    assert held["in_place"] == size_of(experiment.abstract_state)  # donated as a whole
    line = next(line for line in text.splitlines() if line.startswith("all-reduce"))
    shown = f"{expected / 1024:.1f} KiB" if expected >= 1024 else f"{expected} B"
    assert line.split()[1:3] == [str(len(found)), "8"] and shown in line
    assert f"peak       {held['peak'] / 1024:.1f} KiB" in text


def test_fsdp_divides_parameters_and_optimizer():
    config = make_config((512, 512), (1024, 512), data=1, fsdp=8)
    experiment = build.build(config, shapes_only=True)
    state, frozen = experiment.abstract_state, experiment.abstract_frozen
    held = (state.params, state.opt_state)
    assert on_device(held) <= 1.1 / 8 * size_of(held)
    assert on_device(frozen) <= 1.1 / 8 * size_of(frozen)
    fed, key = build.feed_shapes(experiment), 8
    step = build.compile_step(experiment, fed)
    assert collectives.memory(step)["arguments"] == on_device((state, frozen, fed)) + key
    found = collectives.totals(collectives.of_compiled(step))
    # Weights are gathered once, though the activations of this batch are smaller.
    split = [x for x in jax.tree.leaves((state.params, frozen)) if any(x.sharding.spec)]
    assert found["all-gather", 8].nbytes == size_of(split)
    # XLA:CPU sums whole gradients where accelerators scatter the sum.
    flags = sum(any(x.sharding.spec) for x in jax.tree.leaves(state.params))  # are they finite
    assert found["all-reduce", 8].nbytes == size_of(state.params) + 3 * 4 + flags
    assert len(found) == 2


def test_gradients_are_summed_over_fsdp_and_their_parts_over_data():
    config = make_config((512, 512), (32,), data=2, fsdp=4)
    experiment = build.build(config, shapes_only=True)
    params = jax.tree.leaves(experiment.abstract_state.params)
    split = [x for x in params if any(x.sharding.spec)]
    whole = [x for x in params if not any(x.sharding.spec)]
    step = build.compile_step(experiment, build.feed_shapes(experiment))
    found = collectives.totals(collectives.of_compiled(step))
    assert {key: total.nbytes for key, total in found.items()} == {
        ("all-gather", 4): size_of(split),
        ("all-reduce", 4): size_of(split) + len(split),  # and whether each is finite
        ("all-reduce", 2): size_of(split) // 4,
        ("all-reduce", 8): size_of(whole) + 3 * 4,
    }


def test_float64_must_be_allowed():
    config = make_config((4,), (4,))
    config.precision = "float64"
    with pytest.raises(ConfigError, match="JAX_ENABLE_X64"):
        build.build(config, shapes_only=True)
    with jax.enable_x64(True):
        state = build.build(config, shapes_only=True).abstract_state
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype(np.float64)}


def test_an_axis_without_work_is_refused():
    config = make_config((4,), (4,), data=4, model=2)
    with pytest.raises(ConfigError, match="no rule splits anything over 2 devices"):
        build.build(config, shapes_only=True)
    rules = {"partition.frozen_rules": (("teacher/0/Dense_0/kernel$", (None, "model")),)}
    config = config_lib.override(config, rules)
    experiment = build.build(config, shapes_only=True)
    kernel = experiment.abstract_frozen["teacher"][0]["Dense_0"]["kernel"]
    assert kernel.sharding.spec == P(None, "model")
    assert not any(any(x.sharding.spec) for x in jax.tree.leaves(experiment.abstract_state))
