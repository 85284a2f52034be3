"""Weightings where a label is no single class: those that work, and those that say why not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ArgumentError
from distill_jax.weighting import (
    annealed,
    constant,
    meta_weight_net,
    reweight,
    teacher_margin,
    trilateral,
    wsl,
)
from tests.weighting.evidence import B, K, draw, giving, on_device, refused, weights

BLOCKS = ("sg", "tg", "st", "s", "t", "g")
LOSSES = {
    "annealed": (annealed.make(total_steps=10), (B, 2)),
    "constant": (constant.make(), (B, 2)),
    "meta_weight_net": (meta_weight_net.make(), (B, 2)),
    "reweight": (reweight.make(), (B, 2)),
}


def evidence(task):
    bits = (np.random.RandomState(1).rand(B, K) < 0.5).astype(np.float64)
    label = bits if task == "multilabel" else None
    return dataclasses.replace(draw(), task=task, label_probs=label, class_means=None)


def test_the_triangle_of_several_labels_is_one_of_sigmoids():
    found = evidence("multilabel")
    s, t = (1 / (1 + np.exp(-found.logits[role])) for role in ("student", "teacher"))
    g = found.label_probs
    with jax.enable_x64(True):
        got = jax.jit(trilateral.make(blocks=BLOCKS).features)(on_device(found))
    np.testing.assert_allclose(got, np.stack([g - s, g - t, t - s, s, t, g], 1), rtol=1e-12)
    assert weights(trilateral.make(blocks=BLOCKS), found, giving((B, 1))).shape == (B, 2)


@pytest.mark.parametrize("task", ["multilabel", "regression"])
@pytest.mark.parametrize("name", LOSSES)
def test_rules_of_losses_alone_serve_every_task(name, task):
    rule, shape = LOSSES[name]
    assert weights(rule, evidence(task), giving(shape)).shape == shape


@pytest.mark.parametrize(
    ("rule", "task", "message"),
    [
        (trilateral.make(blocks=BLOCKS), "regression", "labels as probabilities"),
        (trilateral.make(blocks=("s", "t", "g"), compact=True), "multilabel", "compact"),
        (trilateral.make(), "multilabel", "none were prepared"),
        (teacher_margin.make(granularity="sample"), "multilabel", "margin between classes"),
        (teacher_margin.make(granularity="sample"), "regression", "margin between classes"),
        (wsl.make(), "multilabel", "distribution over classes"),
        (wsl.make(), "regression", "labels as probabilities"),
    ],
)
def test_rules_of_classes_are_refused(rule, task, message):
    with pytest.raises(ArgumentError, match=message) as caught:
        refused(rule, evidence(task), giving((B, 1)))
    assert "class means" in str(caught.value) or "meta_weight_net" in str(caught.value)


def test_the_task_is_no_array():
    assert len(jax.tree.leaves(evidence("multilabel"))) == len(jax.tree.leaves(draw())) - 1
    assert jnp.shape(on_device(evidence("regression")).mask) == (B,)
