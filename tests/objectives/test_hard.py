"""HARD: who learns from which term, the terms' values, and the affine warp."""

import dataclasses
import functools

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
from tests.reference import softmax

warp = jax.jit(augmentor_affine.warp, static_argnames="border")


def terms_of(made, batch, params, state):
    nets = steps.BoundNets(
        made.models,
        {"teacher": made.frozen["teacher"][0]} | params,
        {"teacher": made.frozen["teacher"][1]} | dict(state.model_state),
        key=jax.random.key(1),
    )
    return made.objective.loss(nets, batch, state.memory, jnp.int32(0))


def against(made, adversary, **kwargs):
    """The same networks with another adversary."""
    return made._replace(
        objective=dataclasses.replace(made.objective, adversary=adversary, **kwargs)
    )


def test_each_player_learns_from_its_own_term():
    made = harness.setup("hard", kwargs={"label_weight": 1.0})
    batch, state = harness.make_batch(), jax.jit(made.init)(jax.random.key(0))

    def means(params):
        return {
            adversary: {
                name: value.mean()
                for name, value in terms_of(
                    against(made, adversary), batch, params, state
                ).values.items()
            }
            for adversary in hard.ADVERSARIES
        }

    for grads in jax.device_get(jax.jit(jax.jacrev(means))(dict(state.params))).values():
        assert set(grads) == {"augmented", "augmentor", "cross_entropy", "distillation"}
        for name, grad in grads.items():
            learns = {r for r, g in grad.items() if any(np.any(x) for x in jax.tree.leaves(g))}
            assert learns == ({"augmentor"} if name == "augmentor" else {"student"})


def test_terms_against_a_transcription():
    kwargs = {"temperature": 2.0, "student_weight": 3.0, "teacher_weight": 0.5}
    with jax.enable_x64(True):
        made = harness.setup("hard", kwargs=kwargs)
        batch, state = harness.make_batch(8), jax.jit(made.init)(jax.random.key(0))
        params = {**state.params, "teacher": made.frozen["teacher"][0]}

        @jax.jit
        def noise(batch):
            keys = rng.example_keys(jax.random.fold_in(jax.random.key(0), 0), batch)
            return jax.vmap(lambda key: jax.random.normal(key, (6,), batch["input"].dtype))(keys)

        @functools.partial(jax.jit, static_argnums=0)
        def ask(role, params, x):
            return made.models[role].apply(params, {}, x, train=False, rngs={})[0]["logits"]

        real, eps, augmentor = jax.device_get((batch["input"], noise(batch), params["augmentor"]))
        affine = np.eye(2, 3) + (augmentor["mean"] + eps @ augmentor["mix"]).reshape(-1, 2, 3)
        moved = np.stack([warp_loops(x, a, wrap=False) for x, a in zip(real, affine, strict=True)])
        answer = {}
        for role in ("student", "teacher"):
            for name, images in (("real", real), ("moved", moved)):
                for i, z in enumerate(np.asarray(ask(role, params[role], images)) / 2):
                    answer[role, name, i] = softmax(z)

        def d(i, p, q):
            pairs = zip(answer[*p, i], answer[*q, i], strict=True)
            return 4 * sum(a * np.log(a / b) for a, b in pairs)

        t, tm, s, sm = ((r, x) for r in ("teacher", "student") for x in ("real", "moved"))
        first = {"student_change": s, "disagreement": tm}
        gains = {a: [d(i, first[a], sm) for i in range(8)] for a in hard.ADVERSARIES}
        cases = {a: against(made, a, bound=float(np.median(g))) for a, g in gains.items()}

        @jax.jit
        def values(state):
            params = dict(state.params)
            return {a: terms_of(case, batch, params, state).values for a, case in cases.items()}

        for adversary, got in jax.device_get(values(state)).items():
            for i in range(8):
                np.testing.assert_allclose(got["augmented"][i], d(i, tm, sm), rtol=1e-6)
                gain = min(gains[adversary][i], cases[adversary].objective.bound)
                want = 0.5 * d(i, t, tm) - 3.0 * gain
                np.testing.assert_allclose(got["augmentor"][i], want, rtol=1e-6)


def test_the_gain_compares_answers_of_one_mode():
    """An augmentor that changes nothing gains nothing from batch statistics."""

    def nets(role, x, *rest, train=False, stop_gradient_params=False):
        if role == "augmentor":
            return {"output": x}, {}
        return {"logits": x.reshape(16, -1)[:, :5] * (3 if train else 1)}, {}

    objective = harness.make_objective("hard")
    values = jax.jit(lambda batch: objective.loss(nets, batch, {}, jnp.int32(0)).values)
    np.testing.assert_allclose(values(harness.make_batch())["augmentor"], 0, atol=1e-6)


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
        got = np.asarray(warp(images, affine, border=border))
        want = [
            warp_loops(x, a, wrap=border == "wrap") for x, a in zip(images, affine, strict=True)
        ]
        np.testing.assert_allclose(got, want, atol=1e-12)
        np.testing.assert_allclose(got[0], images[0], atol=1e-12)

        @jax.jit
        def total(a):
            weight = jnp.asarray(np.random.default_rng(1).normal(size=images.shape))
            return (weight * augmentor_affine.warp(jnp.asarray(images), a, border=border)).sum()

        check_grads(
            total, (jnp.asarray(affine) + 0.013,), order=1, modes=("rev",), eps=1e-6, rtol=1e-5
        )


def test_a_wrapped_shift_is_a_roll():
    images = np.random.default_rng(0).normal(size=(2, 1, 40, 1)).astype(np.float32)
    affine = np.repeat(np.array([[[1.0, 0, 2 * 3 / 40], [0, 1, 0]]], np.float32), 2, 0)
    got = warp(images, affine, border="wrap")
    np.testing.assert_allclose(got, np.roll(images, -3, axis=2), atol=1e-5)


@pytest.mark.parametrize(
    "make, kwargs",
    [
        (hard.make, {"adversary": "both"}),
        (hard.make, {"bound": 0.0}),
        (hard.make, {"teacher_weight": -1}),
        (augmentor_affine.make, {"border": "mirror"}),
        (augmentor_affine.make, {"scale": 0.0}),
    ],
)
def test_hyperparameters_are_checked(make, kwargs):
    with pytest.raises(ConfigError, match=next(iter(kwargs))):
        make(**kwargs)
