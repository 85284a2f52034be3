"""What several CPU devices may read from the compilation cache."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from distill_jax.run.program_cache import is_ordered


def text_of(function):
    mesh = Mesh(np.array(jax.devices()[:2]), "d")
    both = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=PartitionSpec("d"),
        out_specs=PartitionSpec("d"),
        check_vma=False,
    )
    text = jax.jit(both).lower(jnp.ones((4, 8))).compile().as_text()
    assert text is not None
    return text


def total(x):
    return jax.lax.psum(x, "d")


def test_programs_without_collectives_are_ordered():
    assert is_ordered(text_of(lambda x: jnp.tanh(x @ x.T)))


def test_collectives_that_need_each_other_are_ordered():
    text = text_of(lambda x: total(jnp.sin(total(jnp.tanh(total(x))))))
    assert len(re.findall(r" all-reduce\(", text)) == 3
    assert is_ordered(text)


def test_a_collective_in_a_branch_or_a_loop_is_not():
    assert not is_ordered(text_of(lambda x: jax.lax.cond(x.sum() > 0, total, jnp.sin, x)))
    assert not is_ordered(text_of(lambda x: jax.lax.fori_loop(0, 9, lambda i, x: total(x), x)))


UNORDERED = """HloModule jit_f
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %r = f32[] add(%a, %b)
}
ENTRY %main (x: f32[4], y: f32[4]) -> (f32[4], f32[4]) {
  %x = f32[4]{0} parameter(0)
  %y = f32[4]{0} parameter(1)
  %one = f32[4]{0} all-reduce(%x), channel_id=1, to_apply=%sum
  %two = f32[4]{0} all-reduce(%y), channel_id=2, control-predecessors={%one}, to_apply=%sum
  ROOT %t = (f32[4]{0}, f32[4]{0}) tuple(%one, %two)
}
"""


def test_collectives_that_do_not_need_each_other_are_not():
    assert not is_ordered(UNORDERED)
    assert is_ordered(UNORDERED.replace("all-reduce(%y)", "all-reduce(%one)"))


PROGRAM = """
import sys, jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from distill_jax.run import environment
assert environment.cache_compiled_programs()
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
mesh = Mesh(np.array(jax.devices()), "d")
total = lambda x: jax.lax.psum(x, "d")
def chain(x):
    for _ in range(6):
        x = jnp.tanh(total(x @ jnp.ones((64, 64))) + x)
    return x
branch = lambda x: jax.lax.cond(x.sum() > 0, total, jnp.sin, x)
x = jax.device_put(np.ones((16, 64), np.float32), NamedSharding(mesh, P("d")))
for f in (chain, branch):
    found.clear()
    g = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False))
    g = g.lower(x).compile()
    print("READ" if any(name.endswith("cache_hits") for name in found) else "COMPILED")
    y = x
    for i in range(200):
        y = g(y)
        if i % 8 == 7:  # more programs in flight can block each other, also freshly compiled ones
            y.block_until_ready()
    print(float(y.sum()))
"""


@pytest.mark.slow
def test_a_program_read_back_runs_as_before(tmp_path):
    env = {**os.environ, "DISTILL_JAX_CACHE": str(tmp_path), "XLA_FLAGS": ""}
    said = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=300
        ).stdout.split()
        for _ in range(2)
    ]
    assert said[0][::2] == ["COMPILED", "COMPILED"] and said[1][::2] == ["READ", "COMPILED"]
    assert said[0][1::2] == said[1][1::2]
