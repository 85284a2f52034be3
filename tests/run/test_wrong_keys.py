"""A message names the key that is wrong, whole, and not the first place where it shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.api import TrainState
from distill_jax.core.errors import CheckpointError, ConfigError
from distill_jax.models import mlp, vit
from distill_jax.run import build, flags
from distill_jax.run import config as config_lib
from distill_jax.trainer.io import checkpoint
from distill_jax.trainer.io.network import read_network

SUPERVISED = "configs/distill/supervised.py:smoke"
KD = "configs/distill/kd.py:smoke"
TRUST = "configs/bilevel/tgeo_kd.py:smoke"

MIXUP = {"data.train_transforms": ("normalize", "mixup")}
VIT = {"roles.student.model": "vit"}

CASES = {
    "mixup": (
        SUPERVISED,
        MIXUP | {"data.transform_kwargs.mixup.num_classes": 7},
        "data.transform_kwargs.mixup.num_classes: labels become shares of 7 classes, the data have",
    ),
    "mixup under another objective": (
        KD,
        MIXUP | {"data.transform_kwargs.mixup.num_classes": 3},
        "data.transform_kwargs.mixup.num_classes: labels become shares of 3",
    ),
    "a transform that fails": (
        SUPERVISED,
        {"data.train_transforms": ("normalize", "tests.run.test_wrong_keys:make_broken")},
        "data.transform_kwargs.tests.run.test_wrong_keys:make_broken: fails on these inputs: Type",
    ),
    "heads": (
        SUPERVISED,
        VIT | {"roles.student.kwargs.heads": 3, "roles.student.kwargs.width": 64},
        "roles.student.kwargs.heads: 3 heads do not divide",
    ),
    "patches, found on inputs": (
        SUPERVISED,
        VIT | {"roles.student.kwargs.patch_size": 5},
        "roles.student.kwargs.patch_size: an image of 16x16",
    ),
    "a network for tables": (
        SUPERVISED,
        {"roles.student.model": "tabular_mlp"},
        "roles.student: the input is not a table",
    ),
    "classes by keyword": (
        SUPERVISED,
        {"roles.student.kwargs.num_classes": 7},
        "roles.student.kwargs.num_classes: student has 7 classes, the data 4\n  leave num_classes",
    ),
    "classes of an own network": (
        SUPERVISED,
        {"roles.student.model": "tests.run.test_wrong_keys:wide"},
        "roles.student.model: student has 9 classes, the data 4\n  as many logits as classes",
    ),
    "not a network": (
        SUPERVISED,
        {"roles.student.model": "tests.run.test_wrong_keys:number"},
        "roles.student.model: 3 is not a network",
    ),
    "the weighting's optimizer": (
        TRUST,
        {"bilevel.optim.name": "adamx"},
        "bilevel.optim.name: unknown optimizer 'adamx'",
    ),
    "an argument of it": (
        TRUST,
        {"bilevel.optim.kwargs.b7": 1},
        "bilevel.optim.kwargs.b7: adamw does not accept 'b7'",
    ),
    "the weighting": (
        TRUST,
        {"roles.weighting.kwargs.ratio": 2.0},
        "roles.weighting.kwargs.ratio: ratio is 2.0",
    ),
    "an evaluator's role": (
        SUPERVISED,
        {"evaluators.classification.role": "teacher"},
        "evaluators.classification.role: evaluator 'classification' reads 'teacher'",
    ),
    "arguments of an average": (
        "configs/ssl/moco.py:smoke",
        {"roles.target.model": "convnet", "roles.target.kwargs": {"widths": (4,)}},
        "roles.target.kwargs: a moving average of 'student'",
    ),
}


def wide():
    from distill_jax.models import mlp

    return mlp.make(num_classes=9)


def make_broken():
    return lambda key, batch, step: {**batch, "input": batch["input"] @ jnp.ones(99)}


def number():
    return 3


@pytest.mark.parametrize(("spec", "changes", "message"), CASES.values(), ids=CASES)
def test_the_key_that_is_wrong_is_named(spec, changes, message):
    config = config_lib.override(flags.load(spec), changes)
    for role in config.roles.values():
        if role.frozen:  # read from a checkpoint, which these tests need not have
            role.model, role.init = role.model or "convnet", "runs/absent"
    with pytest.raises(ConfigError) as error:
        build.build(config, shapes_only=True)
    assert str(error.value).startswith(message)


def test_positions_of_another_size_of_image(tmp_path):
    model = vit.make(num_classes=3, width=8, depth=1, heads=1, patch_size=4)
    init = lambda side: model.init(jax.random.key(0), jnp.zeros((1, side, side, 1)))  # noqa: E731
    params, model_state = init(8)
    state = TrainState(
        step=jnp.int32(1),
        params={"student": params},
        model_state={"student": model_state},
        targets={},
        opt_state=(),
        memory={},
    )
    saver = checkpoint.Checkpointer(tmp_path / "checkpoints")
    saver.save(state, {"config": {}}, metric=None)
    saver.close()
    like = jax.eval_shape(lambda: init(16))
    with pytest.raises(CheckpointError) as error:
        read_network(tmp_path, like=like, where="roles.student.init")
    text = str(error.value)
    assert text.startswith("roles.student.init: ") and "positions: (1, 5, 8) in the check" in text
    assert text.endswith(
        "learned positions fit one image size: give the size on which it was trained"
    )
    found, _ = read_network(tmp_path, like=(params, model_state), where="roles.student.init")
    np.testing.assert_array_equal(found["positions"], params["positions"])


def test_a_network_keeps_its_own_last_layer_beside_layers_of_another(tmp_path):
    def init(seed, **kwargs):
        model = mlp.make(hidden=(4, 3), **kwargs)
        return model.init(jax.random.key(seed), jnp.zeros((1, 5)))

    body, own = init(0, num_classes=0), init(1, num_classes=2)
    state = TrainState(jnp.int32(1), {"student": body[0]}, {}, {"student": {}}, (), {})
    saver = checkpoint.Checkpointer(tmp_path / "checkpoints")
    saver.save(state, {"config": {}}, metric=None)
    saver.close()
    found, _ = read_network(tmp_path, part="**", like=own)
    for layer, wanted in (("Dense_0", body), ("Dense_1", body), ("Dense_2", own)):
        np.testing.assert_array_equal(found[layer]["kernel"], wanted[0][layer]["kernel"])
    with pytest.raises(CheckpointError, match="absent from the checkpoint"):
        read_network(tmp_path, part="*", like=own)
    with pytest.raises(CheckpointError, match="no layer"):
        read_network(tmp_path, part="**", like=({"Conv_0": own[0]["Dense_0"]}, {}))


def test_a_message_that_ends_with_a_name_keeps_its_quote(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("import no_such_helper\n")
    with pytest.raises(ConfigError, match=r"own.py:1: .*: No module named 'no_such_helper'\n"):
        flags.load(str(path))
