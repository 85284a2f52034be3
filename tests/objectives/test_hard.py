"""HARD: who learns from which term, the terms' values, and the affine warp."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from distill_jax.core import rng, steps
from distill_jax.core.errors import ConfigError
from distill_jax.models import augmentor_affine
from distill_jax.objectives import hard
from tests import harness


def terms_of(made, batch, params, state):
    nets = steps.BoundNets(
        made.models,
        {"teacher": made.frozen["teacher"][0]} | params,
        {"teacher": made.frozen["teacher"][1]} | dict(state.model_state),
        key=jax.random.key(1),
    )
    return made.objective.loss(nets, batch, state.memory, jnp.int32(0))


@pytest.mark.parametrize("adversary", hard.ADVERSARIES)
def test_each_player_learns_from_its_own_term(adversary):
    made = harness.setup("hard", kwargs={"adversary": adversary, "label_weight": 1.0})
    batch, state = harness.make_batch(), made.init(jax.random.key(0))
    names = tuple(terms_of(made, batch, dict(state.params), state).values)

    def means(params):
        return {k: v.mean() for k, v in terms_of(made, batch, params, state).values.items()}

    grads = jax.jit(jax.jacrev(means))(dict(state.params))
    assert set(names) == {"augmented", "augmentor", "cross_entropy", "distillation"}
    for name in names:
        learns = {r for r, g in grads[name].items() if any(np.any(x) for x in jax.tree.leaves(g))}
        assert learns == ({"augmentor"} if name == "augmentor" else {"student"})


@pytest.mark.parametrize("adversary", hard.ADVERSARIES)
def test_terms_against_a_transcription(adversary):
    kwargs: dict = {"adversary": adversary, "temperature": 2.0}
    kwargs |= {"student_weight": 3.0, "teacher_weight": 0.5}
    with jax.enable_x64(True):
        made = harness.setup("hard", kwargs=kwargs)
        batch, state = harness.make_batch(8), made.init(jax.random.key(0))
        params = dict(state.params)
        eps = [
            jax.random.normal(key, (6,), batch["input"].dtype)
            for key in rng.example_keys(jax.random.fold_in(jax.random.key(0), 0), batch)
        ]
        answer = {}
        for i in range(8):
            moved = warp_loops(
                np.asarray(batch["input"][i]),
                np.eye(2, 3)
                + (
                    np.asarray(params["augmentor"]["mean"])
                    + np.asarray(eps[i]) @ np.asarray(params["augmentor"]["mix"])
                ).reshape(2, 3),
                wrap=False,
            )
            for role, p in (("student", params["student"]), ("teacher", made.frozen["teacher"][0])):
                for name, x in (("real", batch["input"][i]), ("moved", moved)):
                    logits = made.models[role].apply(
                        p, {}, jnp.asarray(x)[None], train=False, rngs={}
                    )[0]["logits"]
                    z = np.asarray(logits)[0] / 2
                    e = np.exp(z - z.max())
                    answer[role, name, i] = e / e.sum()

        def d(i, p, q):
            pairs = zip(answer[*p, i], answer[*q, i], strict=True)
            return 4 * sum(a * np.log(a / b) for a, b in pairs)

        t, tm, s, sm = ((r, x) for r in ("teacher", "student") for x in ("real", "moved"))
        first = tm if adversary == "disagreement" else s
        gains = [d(i, first, sm) for i in range(8)]
        bound = float(np.median(gains))
        made = made._replace(objective=dataclasses.replace(made.objective, bound=bound))
        got = terms_of(made, batch, params, state)
        for i in range(8):
            np.testing.assert_allclose(got.values["augmented"][i], d(i, tm, sm), rtol=1e-6)
            want = 0.5 * d(i, t, tm) - 3.0 * min(gains[i], bound)
            np.testing.assert_allclose(got.values["augmentor"][i], want, rtol=1e-6)


def test_the_gain_compares_answers_of_one_mode():
    """An augmentor that changes nothing gains nothing from batch statistics."""

    def nets(role, x, *rest, train=False, learn=True):
        if role == "augmentor":
            return {"output": x}, {}
        return {"logits": x.reshape(16, -1)[:, :5] * (3 if train else 1)}, {}

    terms = harness.make_objective("hard").loss(nets, harness.make_batch(), {}, jnp.int32(0))
    np.testing.assert_allclose(terms.values["augmentor"], 0, atol=1e-6)


def warp_loops(image, affine, *, wrap):
    h, w, _ = image.shape
    out = np.zeros_like(image)
    for i in range(h):
        for j in range(w):
            x, y = (2 * j + 1) / w - 1, (2 * i + 1) / h - 1
            u, v = affine @ np.array([x, y, 1.0])
            u, v = ((u + 1) * w - 1) / 2, ((v + 1) * h - 1) / 2
            for row in (int(np.floor(v)), int(np.floor(v)) + 1):
                for column in (int(np.floor(u)), int(np.floor(u)) + 1):
                    share = (1 - abs(u - column)) * (1 - abs(v - row))
                    if wrap:
                        out[i, j] += share * image[row % h, column % w]
                    elif 0 <= row < h and 0 <= column < w:
                        out[i, j] += share * image[row, column]
    return out


@pytest.mark.parametrize("border", augmentor_affine.BORDERS)
def test_warp_against_loops(border):
    r = np.random.default_rng(0)
    images, affine = r.normal(size=(3, 5, 4, 2)), np.eye(2, 3) + 0.4 * r.normal(size=(3, 2, 3))
    affine[0] = np.eye(2, 3)
    with jax.enable_x64(True):
        got = augmentor_affine.warp(jnp.asarray(images), jnp.asarray(affine), border=border)
        want = [
            warp_loops(x, a, wrap=border == "wrap") for x, a in zip(images, affine, strict=True)
        ]
        np.testing.assert_allclose(got, want, atol=1e-12)
        np.testing.assert_allclose(got[0], images[0], atol=1e-12)

        def total(a):
            weight = jnp.asarray(np.random.default_rng(1).normal(size=images.shape))
            return (weight * augmentor_affine.warp(jnp.asarray(images), a, border=border)).sum()

        check_grads(
            total, (jnp.asarray(affine) + 0.013,), order=1, modes=("rev",), eps=1e-6, rtol=1e-5
        )


def test_a_wrapped_shift_is_a_roll():
    images = np.random.default_rng(0).normal(size=(2, 1, 40, 1)).astype(np.float32)
    affine = np.repeat(np.array([[[1.0, 0, 2 * 3 / 40], [0, 1, 0]]], np.float32), 2, 0)
    got = augmentor_affine.warp(jnp.asarray(images), jnp.asarray(affine), border="wrap")
    np.testing.assert_allclose(got, np.roll(images, -3, axis=2), atol=1e-5)


@pytest.mark.parametrize("kwargs", [{"adversary": "both"}, {"bound": 0.0}, {"teacher_weight": -1}])
def test_hyperparameters_are_checked(kwargs):
    with pytest.raises(ConfigError, match=next(iter(kwargs))):
        hard.make(**kwargs)


@pytest.mark.parametrize("kwargs", [{"border": "mirror"}, {"scale": 0.0}])
def test_the_augmentor_is_checked(kwargs):
    with pytest.raises(ConfigError, match=next(iter(kwargs))):
        augmentor_affine.make(**kwargs)
