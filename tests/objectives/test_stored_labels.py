"""FKD's codecs, FerKD's label policy and SelfMix, each against plain NumPy."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.data import transforms
from distill_jax.losses import stored_labels
from distill_jax.objectives.stored_labels import teacher_probs
from tests import harness

CODECS = {"hard": (1, "drop"), "smoothing": (1, "spread")}
CODECS |= {"marginal_smoothing": (3, "spread"), "marginal_renorm": (3, "drop")}


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def decoded(p, codec):
    """The labels of FKD's section 3.2, class by class."""
    out = np.zeros_like(p)
    for row, q in zip(p, out, strict=True):
        order = sorted(range(len(row)), key=lambda c: -row[c])
        kept = order[: 1 if codec in ("hard", "smoothing") else 3]
        mass = sum(row[c] for c in kept)
        for c in range(len(row)):
            if codec == "hard":
                q[c] = float(c in kept)
            elif codec == "marginal_renorm":
                q[c] = row[c] / mass if c in kept else 0.0
            else:
                q[c] = row[c] if c in kept else (1 - mass) / (len(row) - len(kept))
    return out


@pytest.mark.parametrize("codec", CODECS)
def test_codecs(codec):
    k, rest = CODECS[codec]
    logits = np.random.RandomState(0).randn(9, 6).astype(np.float32) * 2
    index, value = stored_labels.keep_top(jnp.asarray(logits), k=k)
    found = stored_labels.restore_top(index, value, num_classes=6, rest=rest)
    np.testing.assert_allclose(
        jax.nn.softmax(found), decoded(softmax(logits), codec), rtol=1e-5, atol=1e-6
    )
    assert np.isfinite(np.exp(found) * found).all()


def test_all_classes_kept_are_the_answer_itself():
    logits = jnp.asarray(np.random.RandomState(0).randn(4, 5), jnp.float32)
    index, value = stored_labels.keep_top(logits, k=5)
    for rest in ("spread", "drop"):
        found = stored_labels.restore_top(index, value, num_classes=5, rest=rest)
        np.testing.assert_allclose(found, jax.nn.log_softmax(logits), rtol=1e-6, atol=1e-6)


def ferkd(p, label, *, low, mid, high, smoothing, score):
    target, weight = p.copy(), np.ones(len(p))
    for i, row in enumerate(p):
        c = row.max() if score == "max" else row[label[i]]
        if c < low or c > high:
            weight[i] = 0.0
        if c < mid:
            target[i] = smoothing / p.shape[1]
            target[i, label[i]] += 1 - smoothing
    return target, weight


@pytest.mark.parametrize("score", ["max", "label"])
@pytest.mark.parametrize("low, mid, high", [(0.3, 0.6, 0.9), (0.0, 0.0, 1.0), (0.0, 2.0, 1.0)])
def test_the_policy_and_its_gradient(low, mid, high, score):
    kwargs = {"low": low, "mid": mid, "high": high, "smoothing": 0.2, "score": score}
    made = harness.setup("stored_labels", kwargs=kwargs)
    batch = harness.make_batch(32)
    batch["mask"] = batch["mask"].at[20:24].set(0.0)
    state = made.init(jax.random.key(0))
    model, teacher = made.models["student"], made.models["teacher"]
    z, _ = teacher.apply(*made.frozen["teacher"], batch["input"], train=False, rngs={})
    p = softmax(3 * np.asarray(z["logits"], np.float64))
    student, _ = model.apply(
        state.params["student"], state.model_state["student"], batch["input"], train=True, rngs={}
    )
    s, label = np.asarray(student["logits"], np.float64), np.asarray(batch["label"])
    target, weight = ferkd(p, label, **kwargs)
    mask = np.asarray(batch["mask"], np.float64)
    weight = weight * mask
    log_p = np.log(softmax(s))
    want = -(weight * (target * log_p).sum(1)).sum() / weight.sum()
    gradient = (weight / weight.sum())[:, None] * (softmax(s) - target)

    def loss(logits):
        def nets(role, *inputs, train=False, learn=True):
            del inputs, train, learn
            return {"logits": logits if role == "student" else 3 * z["logits"]}, {}

        terms = made.objective.loss(cast(Any, nets), batch, {}, jnp.int32(0))
        value = (terms.values["stored_labels"] * batch["mask"]).sum() / batch["mask"].sum()
        return value, terms.values["kept"]

    (value, kept), found = jax.value_and_grad(loss, has_aux=True)(student["logits"])
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(found, gradient, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(np.asarray(kept) * mask, weight)
    assert made.objective.couples_batch == (low > 0)
    if low > 0:
        assert 0 < weight.sum() < mask.sum()


def test_a_batch_without_a_usable_crop_has_no_loss():
    made = harness.setup("stored_labels", kwargs={"low": 1.0})
    _, history = harness.run(made, harness.make_batch())
    assert history[0]["loss"] == history[0]["kept"] == 0.0


@pytest.mark.parametrize(
    "kwargs", [{"score": "mean"}, {"low": 0.5, "high": 0.4}, {"mid": -1.0}, {"smoothing": 1.0}]
)
def test_mistakes_are_refused(kwargs):
    with pytest.raises(ConfigError):
        harness.make_objective("stored_labels", **kwargs)


def crop_by_hand(image, box, flip):
    h, w, _ = image.shape
    top, left, height, width = box
    out = np.zeros_like(image)
    for i in range(h):
        for j in range(w):
            y = np.clip((top + height * (i + 0.5) / h) * h - 0.5, 0, h - 1)
            x = np.clip((left + width * (j + 0.5) / w) * w - 0.5, 0, w - 1)
            for a in range(h):
                for b in range(w):
                    tap = max(0, 1 - abs(y - a)) * max(0, 1 - abs(x - b))
                    out[i, w - 1 - j if flip else j] += tap * image[a, b]
    return out


def test_a_resized_crop():
    r = np.random.RandomState(1)
    images = r.rand(3, 6, 5, 2).astype(np.float32)
    boxes = np.array([[0, 0, 1, 1], [0.2, 0.1, 0.5, 0.6], [0.5, 0.5, 0.5, 0.5]], np.float32)
    flip = np.array([False, True, False])
    found = transforms.resized_crop(jnp.asarray(images), jnp.asarray(boxes), jnp.asarray(flip))
    want = [crop_by_hand(*args) for args in zip(images, boxes, flip, strict=True)]
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[0], images[0], atol=1e-6)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_mixture_is_of_two_crops_of_the_same_image(kind):
    batch = harness.make_batch(12)
    apply = jax.jit(transforms.make_random_resized_crop(self_mix=kind, area=(0.3, 0.8)))
    plain = jax.jit(transforms.make_random_resized_crop(area=(0.3, 0.8)))
    key = jax.random.key(0)
    mixed, alone = apply(key, batch, jnp.int32(0)), plain(key, batch, jnp.int32(0))
    first, second = mixed["crops"][:, 0], mixed["crops"][:, 1]
    np.testing.assert_allclose(first, alone["input"], rtol=1e-5, atol=1e-6)
    share = np.asarray(mixed["mix"]).reshape(-1, 1, 1, 1)
    if kind == "mixup":
        np.testing.assert_allclose(mixed["input"], share * first + (1 - share) * second, rtol=1e-5)
    else:
        pasted = np.asarray(mixed["input"] == second) & np.asarray(first != second)
        np.testing.assert_allclose(1 - pasted.mean((1, 2, 3)), share.ravel(), atol=1e-6)
    order = jnp.array([7, 2, 5])
    part = apply(key, jax.tree.map(lambda x: x[order], batch), jnp.int32(4))
    np.testing.assert_allclose(part["input"], mixed["input"][order], rtol=1e-5, atol=1e-6)


def test_the_label_of_a_mixture_is_that_of_its_crops():
    batch = harness.make_batch(8)
    mix = jax.jit(transforms.make_random_resized_crop(self_mix="cutmix"))
    batch = mix(jax.random.key(0), batch, jnp.int32(0))
    made = harness.setup("stored_labels", batch=batch)

    def nets(role, x, **_):
        if role == "student":
            return {"logits": jnp.zeros((8, harness.K))}, {}
        return made.models["teacher"].apply(*made.frozen["teacher"], x, train=False, rngs={})

    first, second = (
        softmax(np.asarray(nets("teacher", batch["crops"][:, i])[0]["logits"])) for i in (0, 1)
    )
    share = np.asarray(batch["mix"])[:, None]
    np.testing.assert_allclose(
        teacher_probs(cast(Any, nets), batch), share * first + (1 - share) * second, rtol=1e-5
    )
