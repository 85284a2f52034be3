"""Weightings where a label is no single class: those that work, and those that say why not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ArgumentError
from distill_jax.run.resolve import available, resolve
from distill_jax.weighting import (
    annealed,
    teacher_margin,
    trilateral,
    wsl,
)
from tests.weighting.evidence import B, K, draw, giving, on_device, refused, weights

BLOCKS = ("sg", "tg", "st", "s", "t", "g")


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


LOSSES = {"annealed", "constant", "meta_weight_net", "reweight"}
"""Rules that look at losses alone."""

SERVED = {
    "multilabel": LOSSES | {"trilateral"},
    "regression": LOSSES,
    "classification": set(available("weighting")),
}
RULES = {
    "annealed": (annealed.make(total_steps=10), (B, 2)),
    "trilateral": (trilateral.make(blocks=BLOCKS), (B, 1)),
    "teacher_margin": (teacher_margin.make(granularity="sample"), (B, 1)),
}


@pytest.mark.parametrize("task", SERVED)
@pytest.mark.parametrize("name", available("weighting"))
def test_every_weighting_serves_a_task_or_refuses_it_by_name(name, task):
    """A weighting that is added is here by itself."""
    if name in RULES:
        rule, shape = RULES[name]
    else:
        rule, shape = resolve("weighting", name, where="weighting")(), (B, 2)
    found = draw() if task == "classification" else evidence(task)
    if name in SERVED[task]:
        assert weights(rule, found, giving(shape)).shape == (B, 2)
        return
    with pytest.raises(ArgumentError, match=f"the task of the data is {task}"):
        refused(rule, found, giving(shape))


def test_the_task_is_no_array():
    assert len(jax.tree.leaves(evidence("multilabel"))) == len(jax.tree.leaves(draw())) - 1
    assert jnp.shape(on_device(evidence("regression")).mask) == (B,)
