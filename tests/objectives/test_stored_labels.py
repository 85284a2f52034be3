"""FKD's codecs, FerKD's label policy and SelfMix, each against plain NumPy."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core import state
from distill_jax.core.errors import ConfigError
from distill_jax.core.means import mean_loss
from distill_jax.data import transforms
from distill_jax.losses import stored_labels
from distill_jax.objectives.stored_labels import teacher_probs
from tests import harness
from tests.reference import softmax

CODECS = {"hard": (1, "drop"), "smoothing": (1, "spread")}
CODECS |= {"marginal_smoothing": (3, "spread"), "marginal_renorm": (3, "drop")}


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

    @jax.jit
    def decode(logits):
        index, value = stored_labels.keep_top(logits, k=k)
        found = stored_labels.restore_top(index, value, num_classes=6, rest=rest)
        return found, jax.nn.softmax(found)

    found, probs = jax.device_get(decode(logits))
    np.testing.assert_allclose(probs, decoded(softmax(logits), codec), rtol=1e-5, atol=1e-6)
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
    objective = harness.make_objective("stored_labels", **kwargs)
    r, mask = np.random.RandomState(0), np.ones(32, np.float32)
    mask[20:24] = 0
    s, z = (scale * r.randn(32, harness.K).astype(np.float32) for scale in (1, 2))
    label = r.randint(0, harness.K, 32)
    batch = {"input": np.zeros((32, 1)), "label": label, "mask": mask}
    target, weight = ferkd(softmax(z.astype(np.float64)), label, **kwargs)
    weight = weight * mask
    s = s.astype(np.float64)
    log_p = np.log(softmax(s))
    want = -(weight * (target * log_p).sum(1)).sum() / weight.sum()
    gradient = (weight / weight.sum())[:, None] * (softmax(s) - target)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(student, teacher, batch):
        def nets(role, *inputs, train=False, stop_gradient_params=False):
            del inputs, train, stop_gradient_params
            return {"logits": student if role == "student" else teacher}, {}

        terms = objective.loss(cast(Any, nets), batch, {}, jnp.int32(0))
        return mean_loss(terms, batch["mask"])[0], terms.values["kept"]

    (value, kept), found = jax.device_get(loss(s, z, batch))
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(found, gradient, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(np.asarray(kept) * mask, weight)
    assert not objective.couples_batch
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
    found = np.asarray(jax.jit(transforms.resized_crop)(images, boxes, flip))
    want = [crop_by_hand(*args) for args in zip(images, boxes, flip, strict=True)]
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[0], images[0], atol=1e-6)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_mixture_is_of_two_crops_of_the_same_image(kind):
    batch, key = jax.device_get(harness.make_batch(12)), jax.random.key(0)
    apply = transforms.make_random_resized_crop(self_mix=kind, area=(0.3, 0.8))
    plain = transforms.make_random_resized_crop(area=(0.3, 0.8))
    both = jax.jit(lambda *x: (apply(*x), plain(*x)["input"]))
    mixed, alone = jax.device_get(both(key, batch, jnp.int32(0)))
    first, second = mixed["crops"][:, 0], mixed["crops"][:, 1]
    np.testing.assert_allclose(first, alone, rtol=1e-5, atol=1e-6)
    share = mixed["mix"].reshape(-1, 1, 1, 1)
    if kind == "mixup":
        np.testing.assert_allclose(mixed["input"], share * first + (1 - share) * second, rtol=1e-5)
    else:
        pasted = (mixed["input"] == second) & (first != second)
        np.testing.assert_allclose(1 - pasted.mean((1, 2, 3)), share.ravel(), atol=1e-6)
    order = np.array([7, 2, 5])
    part = jax.jit(apply)(key, jax.tree.map(lambda x: x[order], batch), jnp.int32(4))
    np.testing.assert_allclose(part["input"], mixed["input"][order], rtol=1e-5, atol=1e-6)

    # Its label is that of its crops.
    objective = harness.make_objective("stored_labels")
    state.infer_shapes(objective, {r: harness.role_model(r) for r in objective.roles}, mixed)
    kernel = np.random.RandomState(1).randn(36, harness.K).astype(np.float32)

    def nets(role, x, **_):
        assert role == "teacher"
        return {"logits": x.reshape(12, -1) @ kernel}, {}

    share, probs = share[:, :, 0, 0], jax.jit(lambda x: teacher_probs(cast(Any, nets), x))(mixed)
    first, second = (softmax(nets("teacher", x)[0]["logits"]) for x in (first, second))
    np.testing.assert_allclose(probs, share * first + (1 - share) * second, rtol=1e-5)


@pytest.mark.parametrize("accum_steps", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_discarded_crops_leave_accumulation_exact(accum_steps):
    """Micro-batches that keep different numbers of crops."""
    with jax.enable_x64(True):
        kwargs = {"low": 0.25, "high": 0.6}
        whole = harness.setup("stored_labels", kwargs=kwargs)
        parts = harness.setup("stored_labels", kwargs=kwargs, accum_steps=accum_steps, unroll=False)
        start, batch = jax.jit(whole.init)(jax.random.key(0)), harness.make_batch()
        (one, metrics), (other, summed) = (
            jax.jit(made.step)(start, made.frozen, batch, jax.random.key(3))
            for made in (whole, parts)
        )
        assert 2 < metrics["counts/stored_labels"] < 14
        assert harness.max_relative(one.params, other.params) < 1e-12
        assert harness.max_relative(metrics, summed) < 1e-12
