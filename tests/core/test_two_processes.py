"""Two processes train language models as one process does, in float64."""

import dataclasses
import functools
import pathlib
import socket
import subprocess
import sys
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax.core import partition, state, steps
from distill_jax.core.api import Objective
from distill_jax.models import transformer
from distill_jax.objectives import next_token
from tests import harness
from tests.core import test_sampled_objective as sampled

T, STEPS = 5, 3
ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows(Objective):
    """The next-token loss with `[b]` values: sums over the targets of a row, and their number."""

    roles: ClassVar[tuple[str, ...]] = ("student",)

    def loss(self, nets, batch, memory, step):
        terms = next_token.NextToken().loss(nets, batch, memory, step)
        return dataclasses.replace(
            terms,
            values={"cross_entropy": terms.values["cross_entropy"].sum(1)},
            counts={"cross_entropy": terms.counts["cross_entropy"].sum(1)},
        )


def text(b=8):
    """Rows whose halves, one for each process, have very different numbers of targets."""
    r = np.random.RandomState(1)
    lengths = np.arange(b) % 3 + np.where(np.arange(b) < b // 2, 0, 3)
    return {
        "input": r.randint(0, sampled.V, (b, T)).astype(np.int32),
        "target": r.randint(0, sampled.V, (b, T)).astype(np.int32),
        "target_mask": (np.arange(T)[None] < lengths[:, None]).astype(np.float32),
        "label": np.zeros(b, np.int32),
        "index": np.arange(b, dtype=np.int32),
        "epoch": np.zeros(b, np.int32),
        "mask": (np.arange(b) != 6).astype(np.float32),
    }


CASES = {
    "[b]": (Rows, text),
    "[b, t]": (next_token.NextToken, text),
    "sampled": (sampled.Rloo, sampled.batch_of),
}


def follow(name, mesh):
    """Returns parameters, memory and metrics of a few steps."""
    make, batch_of = CASES[name]
    batch, objective = jax.tree.map(np.asarray, batch_of()), make()
    models = {"student": sampled.wide(transformer.make(**sampled.SIZES))}
    shapes = state.infer_shapes(objective, models, jax.eval_shape(lambda: batch))
    tx = optax.adam(0.05)
    init = state.make_init(objective, models, tx, shapes, trainable=("student",), ema={})
    step = steps.make_train_step(objective, models, tx, precision="float64")
    made = harness.Setup(objective, models, shapes, init, step, {})
    current, metrics = harness.run(made, batch, mesh=mesh, n_steps=STEPS)
    return jax.device_get((current.params, current.memory, metrics))


def process(out):
    assert (jax.process_count(), len(jax.devices())) == (2, 2)
    found = {}
    for name in CASES:
        for i, leaf in enumerate(jax.tree.leaves(follow(name, partition.make_mesh(data=2)))):
            found[f"{name} {i}"] = leaf
    if jax.process_index() == 0:
        np.savez(out, **found)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "found.npz"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = (
        "import sys, jax; jax.config.update('jax_platforms', 'cpu');"
        "jax.config.update('jax_num_cpu_devices', 1); jax.config.update('jax_enable_x64', True);"
        "jax.distributed.initialize(f'127.0.0.1:{sys.argv[1]}', 2, int(sys.argv[2]));"
        "from tests.core.test_two_processes import process; process(sys.argv[3])"
    )
    command = [sys.executable, "-c", code, str(port)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    both = [subprocess.Popen([*command, str(i), str(out)], **pipes) for i in range(2)]
    try:
        said = [one.communicate(timeout=900)[0] for one in both]
    finally:
        for one in both:
            one.kill()
    assert [one.returncode for one in both] == [0, 0], "\n".join(said)
    return dict(np.load(out))


@functools.cache
def of_one(name):
    with jax.enable_x64(True):
        return follow(name, partition.make_mesh(devices=jax.devices()[:1]))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_exactly_one(name, of_two):
    wanted = jax.tree.leaves(of_one(name))
    found = [of_two[f"{name} {i}"] for i in range(len(wanted))]
    assert wanted[0].dtype == found[0].dtype == np.float64
    assert harness.max_relative(wanted, found) < 1e-12
    with jax.enable_x64(True):
        start, _ = transformer.make(**sampled.SIZES).init(jax.random.key(0), jnp.zeros((1, 2), int))
    assert harness.max_relative(jax.tree.leaves(start)[0], wanted[0]) > 1e-3, "nothing was learned"
