"""Views of student and teacher: the same, none, another; and views that come back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.configs import common
from distill_jax.core.errors import ConfigError
from distill_jax.data import transforms
from distill_jax.run import build
from distill_jax.run import config as config_lib

KEY, STEP = jax.random.key(3), jnp.int32(5)


def make_batch(n=8, *, epoch=0):
    random = np.random.RandomState(0)
    return {
        "input": jnp.asarray(random.rand(n, 8, 8, 1), jnp.float32),
        "label": jnp.arange(n, dtype=jnp.int32) % 3,
        "index": jnp.arange(n, dtype=jnp.int32),
        "epoch": jnp.full(n, epoch, jnp.int32),
        "mask": jnp.ones(n, jnp.float32),
    }


def pipeline(*, mixing=""):
    made = {
        "normalize": transforms.make_normalize(mean=0.5, std=0.5),
        "random_crop": transforms.make_random_crop(padding=2),
        "horizontal_flip": transforms.make_horizontal_flip(),
    }
    if mixing:
        made[mixing] = transforms.resolve(mixing)(num_classes=3)
    return made


CLEAN = transforms.compose({"normalize": transforms.make_normalize(mean=0.5, std=0.5)})


def test_the_students_view_does_not_depend_on_the_teachers():
    made = pipeline()
    made = {name: jax.jit(transform) for name, transform in made.items()}
    alone = transforms.compose(made)(KEY, make_batch(), STEP)
    for clean in (None, CLEAN):
        both = transforms.two_views(made, clean, shared=())(KEY, make_batch(), STEP)
        np.testing.assert_array_equal(both["input"], alone["input"])
        assert set(both) == {*alone, "teacher_input"}


def test_a_clean_view_is_that_of_evaluation_in_every_epoch():
    views = [
        transforms.two_views(pipeline(), CLEAN, shared=())(KEY, make_batch(epoch=e), STEP)
        for e in (0, 1)
    ]
    want = CLEAN(KEY, make_batch(), STEP)["input"]
    for view in views:
        np.testing.assert_array_equal(view["teacher_input"], want)
    assert (views[0]["input"] != views[1]["input"]).any()


def test_an_independent_view_is_another_draw_of_the_same_transforms():
    apply = jax.jit(transforms.two_views(pipeline(), None, shared=()))
    student, teacher = [], []
    for epoch in range(40):
        both = apply(KEY, make_batch(epoch=epoch), STEP)
        student.append(both["input"])
        teacher.append(both["teacher_input"])
    student, teacher = np.stack(student), np.stack(teacher)
    same = (student == teacher).reshape(40 * 8, -1).all(1).mean()
    assert same < 0.06  # 50 equally likely crops and flips
    # Both are draws from one distribution: an example has the same mean over many of them.
    np.testing.assert_allclose(student.mean((0, 2, 3)), teacher.mean((0, 2, 3)), atol=0.1)


@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
def test_mixing_is_shared_or_drawn_apart(mixing):
    made = pipeline(mixing=mixing)
    made = {name: jax.jit(made[name]) for name in ("normalize", mixing)}
    clean_view = made["normalize"]
    shared = transforms.two_views(made, None, shared=(mixing,))(KEY, make_batch(), STEP)
    np.testing.assert_array_equal(shared["teacher_input"], shared["input"])
    apart = transforms.two_views(made, None, shared=())(KEY, make_batch(), STEP)
    assert (apart["teacher_input"] != apart["input"]).any()
    np.testing.assert_array_equal(apart["label_probs"], shared["label_probs"])  # the student's
    clean = transforms.two_views(made, clean_view, shared=(mixing,))(KEY, make_batch(), STEP)
    np.testing.assert_allclose(clean["teacher_input"], clean["input"], rtol=1e-6)
    unmixed = transforms.two_views(made, clean_view, shared=())(KEY, make_batch(), STEP)
    want = clean_view(KEY, make_batch(), STEP)
    np.testing.assert_array_equal(unmixed["teacher_input"], want["input"])


def test_views_come_back_in_turn():
    transform = transforms.in_turn(transforms.compose(pipeline()), 3)
    seen = [transform(KEY, make_batch(epoch=e), STEP) for e in range(6)]
    for e in range(3):
        np.testing.assert_array_equal(seen[e]["input"], seen[e + 3]["input"])
        assert int(seen[e + 3]["epoch"][0]) == e + 3
    assert (seen[0]["input"] != seen[1]["input"]).any()
    plain = transforms.compose(pipeline())(KEY, make_batch(epoch=2), STEP)
    np.testing.assert_array_equal(seen[5]["input"], plain["input"])


def make_config(**changes):
    config = config_lib.smoke(common.fashion_mnist())
    config.objective.name = "kd"
    config.roles.student = config_lib.role("mlp", hidden=(8,))
    config.roles.teacher = config_lib.role("mlp", hidden=(16,))
    config.roles.teacher.frozen, config.roles.teacher.init = True, "unread"
    return config_lib.override(config, changes)


@pytest.mark.parametrize("view", ["same", "clean", "independent"])
def test_a_config_names_the_teachers_view(view):
    config = make_config(**{"data.teacher_view": view, "data.views": 2})
    batch = build.build(config, shapes_only=True).shapes.batch
    assert ("teacher_input" in batch) == (view != "same")


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"data.teacher_view": "cleen"}, "did you mean 'clean'"),
        ({"data.teacher_shares": "random_crop"}, "cannot share 'random_crop'"),
        ({"data.teacher_view": "clean", "data.teacher_shares": "mixup"}, "cannot share 'mixup'"),
        ({"data.views": -1}, "out of range"),
    ],
)
def test_views_that_cannot_be_are_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        build.build(make_config(**changes), shapes_only=True)
