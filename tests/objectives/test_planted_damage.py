"""A teacher that the data damage says something else wherever a method asks it."""

import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.losses.classification import shift_logits
from tests import harness

OBJECTIVES = ("hard", "kd", "simclr_v2", "ssld")


def found(name, teacher, batch):
    """Terms and what the survey learned, where the teacher's answer is a table."""
    said = {"student": np.random.RandomState(0).randn(16, harness.K), "teacher": teacher}
    said["teacher_head"] = teacher

    def nets(role, x, *rest, train=False, stop_gradient_params=False):
        if role == "augmentor":
            return {"output": x}, {}
        return {"logits": jnp.asarray(said[role], jnp.float32), "embedding": x}, {}

    objective = harness.make_objective(name)
    memory = {"kept": jnp.ones(64)}
    terms = objective.loss(nets, batch, memory, jnp.int32(0))
    rows = objective.dataset_pass(nets, batch, memory, jnp.int32(0))
    return {**terms.values, **{f"survey/{key}": x for key, x in rows.items()}}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_planted_damage_is_what_a_wrong_teacher_would_have_said(name):
    teacher = np.random.RandomState(1).randn(16, harness.K).astype(np.float32)
    batch, shift = harness.make_batch(), jnp.arange(16) % harness.K
    got = found(name, teacher, {**batch, "teacher_shift": shift})
    want = found(name, shift_logits(jnp.asarray(teacher), shift), batch)
    whole = found(name, teacher, batch)
    assert any(not np.allclose(got[key], whole[key]) for key in got)
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-5, atol=1e-6)
