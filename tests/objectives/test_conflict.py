"""Conflicting rewards, and where they make a student wrong, by the definitions of the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ArgumentError
from distill_jax.evaluators import deception
from distill_jax.objectives import conflict, weak_to_strong
from tests.reference import draw, log_softmax, softmax


@pytest.mark.parametrize("kind", ["labels", "task"])
def test_terms_are_those_of_the_paper(kind):
    student, teacher = draw(16, 2), draw(16, 2, seed=1)
    label, other = np.arange(16) % 2, np.arange(16) // 8

    def nets(role, *_, **__):
        return {"logits": jnp.asarray({"student": student}.get(role, teacher))}, {}

    batch = {"input": None, "label": label, "conflict": other, "mask": np.ones(16)}
    with jax.enable_x64(True):
        made = conflict.make(conflict=kind, conflict_weight=0.3, alpha=0.5, ramp=0)
        got = made.loss(nets, batch, {}, jnp.int32(0))
        plain = weak_to_strong.make(alpha=0.5, ramp=0).loss(nets, batch, {}, jnp.int32(0))
    log_p = log_softmax(student)
    wrong = student.argmax(1) != label
    # With two classes the released loss against 1 - y, of the examples that are wrong.
    want = -log_p[np.arange(16), other if kind == "task" else 1 - label]
    np.testing.assert_allclose(got.values["conflict"], want if kind == "task" else wrong * want)
    assert got.coef["conflict"] == 0.3 and 0 < wrong.sum() < 16
    for name, value in plain.values.items():
        np.testing.assert_array_equal(got.values[name], value)


def test_deception_is_counted_as_defined():
    random = np.random.default_rng(0)
    label = random.integers(0, 2, 300)
    logits = {role: 2 * random.normal(size=(300, 2)) for role in ("student", "teacher", "ceiling")}
    logits["aligned"] = logits["student"] + 3 * np.eye(2)[label]
    outputs = {role: {"logits": z} for role, z in logits.items()}
    got = deception.make(threshold=0.8)(outputs, {"label": label})
    flips = unseen = sure = sure_unseen = 0
    for i in range(300):
        if logits["aligned"][i].argmax() != label[i]:
            continue
        weak = softmax(logits["teacher"][i]).max() >= 0.8
        if softmax(logits["ceiling"][i]).max() >= 0.8:
            sure, sure_unseen = sure + 1, sure_unseen + (not weak)
            if logits["student"][i].argmax() != label[i]:
                flips, unseen = flips + 1, unseen + (not weak)
    assert np.isclose(got["deception"], unseen / flips)
    assert np.isclose(got["deception_expected"], sure_unseen / sure)
    assert np.isclose(got["flipped_cells"].sum(), got["flipped"])
    same = deception.make()({**outputs, "aligned": outputs["student"]}, {"label": label})
    assert same["flipped"] == 0 and "deception" not in same


def test_an_unknown_conflict_is_named():
    with pytest.raises(ArgumentError, match="conflict"):
        conflict.make(conflict="label", ramp=0)
