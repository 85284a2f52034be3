"""Language models through the console: a teacher, students that ask it or read what is stored."""

import ast
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import main
from distill_jax.core import partition
from distill_jax.core.errors import UserError
from distill_jax.run import build, flags
from distill_jax.run.config import override
from distill_jax.run.preflight import constants
from distill_jax.trainer.io import teacher_cache

TOP = ("top_index", "top_log_probs", "tail_log_prob")


def test_ids_are_stored_as_they_are():
    """They are integers, and a type of 16 bits does not hold those of a large vocabulary."""
    outputs = {
        "top_index": jnp.array([[49_151, 3]], jnp.int32),
        "top_log_probs": jnp.array([[-0.5, -2.0]]),
    }
    plan = teacher_cache.make_plan(
        transform=lambda key, batch, step: batch,
        raw={"input": jax.ShapeDtypeStruct((1, 2), jnp.int32)},
        outputs={"teacher": jax.eval_shape(lambda: outputs)},
        networks={},
        views=1,
        batch_size=1,
        dtype="bfloat16",
    )
    stored = plan.encode(outputs)
    assert [x.dtype for x in stored.values()] == [jnp.int32, jnp.bfloat16]
    back = plan.decode({"teacher": stored})["teacher"]
    np.testing.assert_array_equal(back["top_index"], outputs["top_index"])
    np.testing.assert_array_equal(back["top_log_probs"], outputs["top_log_probs"])


def test_terms_of_top_tokens_are_not_taken_for_constants():
    """The random outputs that stand for networks are log-probabilities where they are so named."""
    experiment = build.build(flags.load("language/kd:top,smoke"), shapes_only=True)
    assert constants.constant_terms(experiment) == {}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "next_token",
            "roles.student.kwargs.vocabulary=200",
            "student has 200 tokens, the data 257",
        ),
        (
            "kd",
            "roles.teacher.kwargs.vocabulary=300",
            "the teacher has 300 tokens and the student 257",
        ),
        ("kd", "data.train_transforms=()", "a batch has no target"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_message(name, change, message):
    config = flags.load(f"language/{name}:smoke")
    key, _, value = change.partition("=")
    config = override(config, {key: ast.literal_eval(value)})
    with pytest.raises(UserError) as error:
        build.build(config, shapes_only=True)
    assert message in str(error.value)


def run(*args):
    assert main.main(["", *args, "--config.log.tensorboard=false"]) in (0, None)


def metrics(workdir):
    return json.loads((workdir / "result.json").read_text())["metrics"]


@pytest.mark.slow
def test_a_stored_teacher_teaches_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_mesh, devices = partition.make_mesh, jax.devices()[:1]
    monkeypatch.setattr(
        partition, "make_mesh", lambda **sizes: make_mesh(**{**sizes, "devices": devices})
    )
    run("--config=language/next_token:smoke", "--workdir=lm")
    common = ("--config=language/kd:top,smoke", "--config.roles.teacher.init=lm")
    run(*common, "--workdir=asked")
    stored = ("--config.cache.dir=answers", f"--config.cache.outputs={','.join(TOP)}")
    run(*common, *stored, "--workdir=stored")
    asked, read = metrics(tmp_path / "asked"), metrics(tmp_path / "stored")
    assert asked == pytest.approx(read, rel=1e-6)
    teacher = ("--config.roles.teacher.init=lm", "--workdir=ratio")
    run("--config=language/salt_learned:smoke", *teacher)
    assert metrics(tmp_path / "ratio")
