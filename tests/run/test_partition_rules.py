"""Rules that networks offer for their own parameters, named in a config."""

import numpy as np
import pytest
from distill_jax.configs.language import kd

from distill_jax.core import partition
from distill_jax.core.errors import ConfigError
from distill_jax.run import build, collectives
from distill_jax.run import config as config_lib

NETWORK = {"width": 32, "depth": 1, "heads": 2, "mlp_width": 64}


def make_config(folder, **changes):
    tokens = np.random.default_rng(0).integers(1, 64, 4000)
    tokens[::50] = 0
    np.save(folder / "tokens.npy", tokens.astype(np.uint16))
    config = kd.get_config()
    config.data.name, config.data.held_out, config.eval.metric = "token_file", 0.0, ""
    path = str(folder / "tokens.npy")
    config.data.kwargs = {"path": path, "vocabulary": 64, "end": 0, "length": 16}
    config.batch_size, config.total, config.evaluators = 8, 10, {}
    config.optim.warmup = None
    config.roles.student = config_lib.role("transformer", **NETWORK)
    config.roles.teacher = config_lib.role("transformer", **NETWORK, top=4)
    config.roles.teacher.frozen, config.roles.teacher.init = True, "unread"
    rules = {"partition.rules": ("networks",), "partition.frozen_rules": ("networks",)}
    return config_lib.override(config, {"mesh.model": 2, **rules, **changes})


def test_transformers_are_split_by_their_own_rules(tmp_path):
    experiment = build.build(make_config(tmp_path), shapes_only=True)
    for tree in (experiment.abstract_state.params, experiment.abstract_frozen):
        split = {
            name: leaf.sharding.spec.index("model")
            for name, leaf in partition.named_leaves(tree).items()
            if "model" in leaf.sharding.spec
        }
        layers = {name.rpartition("block0/")[2]: axis for name, axis in split.items()}
        columns = ("attention/query", "attention/key", "attention/value", "mlp/up", "mlp/gate")
        rows = ("attention/out", "mlp/down")
        wanted = {f"{x}/kernel": 1 for x in columns} | {f"{x}/kernel": 0 for x in rows}
        assert layers == wanted
    step = build.compile_step(experiment, build.feed_shapes(experiment))
    assert {kind for kind, _ in collectives.totals(collectives.of_compiled(step))} == {"all-reduce"}


def test_heads_that_do_not_divide(tmp_path):
    with pytest.raises(ConfigError, match=r"heads 2 does not split over model=4"):
        build.build(make_config(tmp_path, **{"mesh.model": 4}), shapes_only=True)
