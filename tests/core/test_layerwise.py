"""Frozen parts keep their bits, and the rates of layers are in the updates."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax.core import layerwise
from distill_jax.core.errors import ArgumentError
from distill_jax.models import vit


def params():
    random = np.random.default_rng(0)
    names = ("patches", "cls", "Block_0/Dense_0", "Block_1/Dense_0", "Block_10/gain", "Dense_0")
    tree: dict = {}
    for name in names:
        *groups, last = f"{name}/kernel".split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = random.normal(size=3).astype(np.float32)
    tree["cls"]["kernel"][:] = -0.0
    return {"student": tree, "head": {"kernel": np.ones(2, np.float32)}}


def gradients(step):
    random = np.random.default_rng(1 + step)
    return jax.tree.map(lambda p: random.normal(size=p.shape).astype(np.float32), params())


def trained(optimizer, steps=3):
    first = jax.tree.map(jnp.asarray, params())
    state = optimizer.init(first)
    for step in range(steps):
        updates, state = jax.jit(optimizer.update)(gradients(step), state, first)
        first = optax.apply_updates(first, updates)
    return jax.device_get(first), jax.device_get(state)


OPTIMIZERS = {
    "sgd": lambda: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)),
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_parts_keep_every_bit_and_the_others_learn_as_before(name):
    freeze = {"student": ("cls", "Block_0*", "patches/kernel")}
    whole, _ = trained(OPTIMIZERS[name]())
    found, state = trained(layerwise.by_layer(OPTIMIZERS[name](), freeze=freeze))
    first = params()["student"]
    for part in ("cls", "Block_0", "patches"):
        for before, after in zip(
            jax.tree.leaves(first[part]), jax.tree.leaves(found["student"][part]), strict=True
        ):
            assert before.tobytes() == after.tobytes()
    for part in ("Block_1", "Block_10", "Dense_0"):
        jax.tree.map(np.testing.assert_array_equal, found["student"][part], whole["student"][part])
    assert jax.tree.structure(state) == jax.tree.structure(trained(OPTIMIZERS[name]())[1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rate_of_a_layer_is_in_its_update(name):
    rules = (("student/Block_1/", 0.25), ("Block_", 4.0))
    make, first = OPTIMIZERS[name], params()
    moved = lambda tx: jax.tree.map(np.subtract, trained(tx, 1)[0], first)  # noqa: E731
    plain, found = moved(make()), moved(layerwise.by_layer(make(), lr_by_layer=rules))
    for part, factor in {"Block_0": 4, "Block_1": 0.25, "Block_10": 4, "Dense_0": 1}.items():
        jax.tree.map(
            lambda ours, whole, f=factor: np.testing.assert_allclose(ours, f * whole, rtol=1e-5),
            found["student"][part],
            plain["student"][part],
        )


def test_a_frozen_gradient_is_not_in_the_norm():
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    parts = ("Block_*", "patches", "cls", "Dense_0")
    tx = layerwise.by_layer(clipped, freeze={"student": parts[:3]})
    tree = jax.tree.map(lambda p: 100.0 * np.ones_like(p), params())
    updates: Any = tx.update(tree, tx.init(params()), params())[0]
    free = [updates["student"]["Dense_0"], updates["head"]]
    assert optax.tree.norm(free) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(
    ("names", "heights"),
    [
        (
            ("patches", "cls", "Block_0", "Block_2", "Block_10", "LayerNorm_0", "Dense_0"),
            (4, 4, 3, 2, 1, 0, 0),
        ),
        (
            ("stem", "stem_norm", "stage1_block0", "stage1_block1", "stage2_down", "stage2_block0"),
            (4, 4, 3, 2, 1, 1),
        ),
        (("Conv_0", "BatchNorm_0", "Bottleneck_0", "Bottleneck_1", "head"), (3, 3, 2, 1, 0)),
        (("token_embedding", "block1", "block2", "final_norm"), (3, 2, 1, 0)),
    ],
)
def test_blocks_decay_from_behind(names, heights):
    tree = {"student": {name: {"kernel": np.ones(1)} for name in names}, "head": np.ones(1)}
    found = layerwise.rates(tree, {}, (), 0.5)
    assert [found["student"][name]["kernel"] for name in names] == [0.5**h for h in heights]
    assert found["head"] == 1
    ruled = layerwise.rates(tree, {"student": (names[1],)}, ((names[0], 3.0),), 0.5)
    assert [ruled["student"][name]["kernel"] for name in names[:2]] == [3.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"freeze": {"student": ("Block_3*",)}},
            r"student\.freeze: 'Block_3\*' .*no parameter\n.*",
        ),
        ({"freeze": {"studnt": ("cls",)}}, r"studnt\.freeze: .*not trained.*\n.*'student'"),
        ({"freeze": {"head": ("*",)}}, r"head\.freeze: nothing of it would learn"),
        ({"lr_by_layer": (("Block_7", 2.0),)}, r"lr_by_layer: .*'Block_7' matches no parameter"),
        ({"lr_by_layer": (("Block_1", 0.0),)}, r"lr_by_layer: .*factor 0"),
        ({"lr_by_layer": (("(", 1.0),)}, r"lr_by_layer: .*regex"),
        ({"lr_by_layer": ("Block_1",)}, r"lr_by_layer: .*no rule"),
        ({"layer_decay": 1.5}, r"layer_decay: "),
    ],
)
def test_what_names_nothing_is_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        jax.eval_shape(layerwise.by_layer(optax.sgd(0.1), **arguments).init, params())


def test_a_decay_over_layers_needs_layers():
    with pytest.raises(ArgumentError, match="layer_decay: no network has numbered blocks"):
        layerwise.by_layer(optax.sgd(0.1), layer_decay=0.5).init({"student": {"a": np.ones(1)}})


def test_a_vision_transformer_decays_as_in_beit():
    """Bao et al. 2021: embeddings count as layer 0, blocks from 1, what follows has all of it."""
    model = vit.make(num_classes=3, variant="micro", depth=3)
    x = jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32)
    shapes, _ = jax.eval_shape(model.init, jax.random.key(0), x)
    found = layerwise.rates({"student": shapes}, {}, (), 0.75)["student"]
    layers = {"patches": 0, "cls": 0, "positions": 0, "Block_0": 1, "Block_1": 2, "Block_2": 3}
    for name, factor in found.items():
        assert set(jax.tree.leaves(factor)) == {0.75 ** (4 - layers.get(name, 4))}, name
