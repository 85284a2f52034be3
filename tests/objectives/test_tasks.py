"""Losses of several labels, of real values, with class weights and focal; objectives of them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distill_jax as dj
from distill_jax.core.api import TASKS
from distill_jax.core.errors import ConfigError
from distill_jax.losses import classification, multilabel, regression
from distill_jax.objectives import _distillation, kd, multi_teacher, supervised
from distill_jax.run.resolve import resolve
from tests.objectives import task_losses_torch as reference
from tests.reference import softmax

X = reference.inputs()
STORED = json.loads(reference.PATH.read_text(encoding="utf-8"))
BITS, KNOWN, LABEL, WEIGHTS = (X[name] for name in ("bits", "known", "label", "weights"))
ONE_HOT = np.eye(reference.K)[LABEL]

LOSSES = {
    "bce": lambda s: multilabel.binary_cross_entropy(s, BITS),
    "bce_known": lambda s: multilabel.binary_cross_entropy(s, BITS, known=KNOWN),
    "bce_weighted": lambda s: multilabel.binary_cross_entropy(s, BITS, positive_weights=WEIGHTS),
    "focal_of_bits": lambda s: multilabel.binary_cross_entropy(s, BITS, gamma=reference.GAMMA),
    "binary_distillation": lambda s: multilabel.binary_distillation(
        s, X["teacher"], temperature=reference.TEMPERATURE
    ),
    "focal": lambda s: classification.focal(s, LABEL, gamma=reference.GAMMA),
    "cross_entropy_weighted": lambda s: classification.weighted_cross_entropy(
        s, ONE_HOT, WEIGHTS, smoothing=0.1
    ),
    "squared": lambda s: regression.squared_error(s, X["target"], scale=X["scale"]),
    "huber": lambda s: regression.huber(s, X["target"], delta=reference.DELTA, scale=X["scale"]),
}


def logistic(z):
    return 1 / (1 + np.exp(-z))


def two_point_kl(p, q):
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def transcribed():
    """The equations, in NumPy."""
    s, t, gamma = X["student"], X["teacher"] / reference.TEMPERATURE, reference.GAMMA
    p, own = logistic(s), softmax(s)[np.arange(reference.B), LABEL]
    bce = -(BITS * np.log(p) + (1 - BITS) * np.log(1 - p))
    right = np.where(BITS > 0, p, 1 - p)
    r = (s - X["target"]) / X["scale"]
    d = reference.DELTA
    smooth = 0.9 * ONE_HOT + 0.1 / reference.K
    kl = two_point_kl(logistic(t), logistic(s / reference.TEMPERATURE))
    return {
        "bce": bce.mean(1),
        "bce_known": (bce * KNOWN).sum(1) / np.maximum(KNOWN.sum(1), 1),
        "bce_weighted": (np.where(BITS > 0, WEIGHTS, 1) * bce).mean(1),
        "focal_of_bits": (-((1 - right) ** gamma) * np.log(right)).mean(1),
        "binary_distillation": reference.TEMPERATURE**2 * kl.mean(1),
        "focal": -((1 - own) ** gamma) * np.log(own),
        "cross_entropy_weighted": -(smooth * WEIGHTS * np.log(softmax(s))).sum(1),
        "squared": (r**2).mean(1),
        "huber": np.where(np.abs(r) <= d, r**2 / 2, d * (np.abs(r) - d / 2)).mean(1),
    }


@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_numpy_and_pytorch(name):
    with jax.enable_x64(True):
        student = jnp.asarray(X["student"])
        value, pull = jax.vjp(LOSSES[name], student)
        gradient = pull(jnp.ones_like(value))[0]
    assert value.shape == (reference.B,)
    np.testing.assert_allclose(value, transcribed()[name], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(value, STORED[name]["value"], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(gradient, STORED[name]["gradient"], rtol=1e-6, atol=1e-9)


def test_stored_values_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    for name, found in reference.measure(torch).items():
        for key, values in found.items():
            np.testing.assert_allclose(values, STORED[name][key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_far_outputs_stay_finite(name):
    rows = np.where(np.arange(reference.B)[:, None] % 2 == 0, 1e4, -1e4) * np.ones(reference.K)
    rows[0] = [1e4, -1e4, 0, 0]
    far = jnp.asarray(rows)
    value, gradient = jax.value_and_grad(lambda s: LOSSES[name](s).sum())(far)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_a_sigmoid_is_the_softmax_of_two():
    two = lambda z: jnp.stack([z, jnp.zeros_like(z)], -1)  # noqa: E731
    s, t = (jnp.asarray(X[name][:, :1]) for name in ("student", "teacher"))
    got = multilabel.binary_distillation(s, t, temperature=2.0)
    want = classification.distillation_kl(two(s[:, 0]), two(t[:, 0]), temperature=2.0)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def terms(objective, batch, student=X["student"], teacher=X["teacher"]):
    def nets(role, *inputs, train=False, stop_gradient_params=False):
        del inputs, train, stop_gradient_params
        return {"logits": jnp.asarray(student if role == "student" else teacher)}, {}

    return objective.loss(nets, {"input": jnp.zeros((reference.B, 2)), **batch}, {}, jnp.int32(0))


def test_distillation_of_each_task_has_a_label_term_and_a_teacher_s():
    cases = {
        "classification": (LABEL, "cross_entropy"),
        "multilabel": (BITS, "cross_entropy"),
        "regression": (X["target"], "squared_error"),
    }
    for task, (label, name) in cases.items():
        found = terms(kd.make(task=task, alpha=0.25), {"label": jnp.asarray(label)})
        assert found.coef == {"distillation": 0.25, name: 0.75}
        alone = terms(supervised.make(task=task), {"label": jnp.asarray(label)}).values[name]
        np.testing.assert_array_equal(found.values[name], alone)
        assert all(value.shape == (reference.B,) for value in found.values.values())
    np.testing.assert_allclose(
        found.values["distillation"], ((X["student"] - X["teacher"]) ** 2).mean(1), rtol=1e-5
    )


TEACHERS = {"teacher1": X["teacher"], "teacher2": X["teacher"][::-1].copy()}
SHARES = (0.25, 0.75)


def several(task, **kwargs):
    """The terms of two teachers."""
    weights = kwargs.get("combination") != "confidence"
    kwargs |= {"weights": SHARES} if weights else {}
    outputs = {"student": X["student"], **TEACHERS}

    def nets(role, *inputs, **kwargs):
        return {"logits": jnp.asarray(outputs[role])}, {}

    label = {"multilabel": BITS, "regression": X["target"]}[task]
    batch = {"input": jnp.zeros((reference.B, 2)), "label": jnp.asarray(label)}
    objective = multi_teacher.make(task=task, **kwargs)
    return objective.loss(nets, batch, {}, jnp.int32(0))


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_several_teachers_of_each_task(task):
    found = several(task)
    one = kd.make(task=task)
    for (role, logits), share in zip(TEACHERS.items(), SHARES, strict=True):
        want = one.distillation(X["student"], jnp.asarray(logits), temperature=4.0)
        np.testing.assert_allclose(found.values[f"distillation/{role}"], want, rtol=1e-6)
        assert found.coef[f"distillation/{role}"] == share
    values = [logistic(z) if task == "multilabel" else z for z in TEACHERS.values()]
    mixed = logistic(found.logits["teacher"]) if task == "multilabel" else found.logits["teacher"]
    np.testing.assert_allclose(mixed, 0.25 * values[0] + 0.75 * values[1], rtol=1e-4, atol=1e-6)
    mean = 0.25 * TEACHERS["teacher1"] + 0.75 * TEACHERS["teacher2"]
    together = several(task, combination="logits").values["distillation"]
    want = one.distillation(X["student"], jnp.asarray(mean), temperature=4.0)
    np.testing.assert_allclose(together, want, rtol=1e-5)


def test_confidence_of_several_labels_is_by_their_cross_entropy():
    losses = np.stack([LOSSES["bce"](jnp.asarray(logits)) for logits in TEACHERS.values()], axis=1)
    found = several("multilabel", combination="confidence").weights
    for m, role in enumerate(TEACHERS):
        want = 1 - softmax(losses)[:, m]
        np.testing.assert_allclose(found[f"distillation/{role}"], want, rtol=1e-5)
    with pytest.raises(ConfigError, match="the task is regression"):
        multi_teacher.make(task="regression", combination="confidence")


@pytest.mark.parametrize(
    ("task", "name"), [("multilabel", "cross_entropy"), ("regression", "huber")]
)
def test_features_are_distilled_beside_the_terms_of_each_task(task, name):
    """The frame of the feature methods has the label's and the teacher's term of `kd`."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Method(_distillation.Distillation):
        tasks = TASKS

        def loss_terms(self, nets, student, teacher, batch, memory, step):
            return _distillation.Signals(values={"signal": jnp.zeros(reference.B)})

    kwargs = {"task": task, "regression_loss": "huber", "temperature": 2.0}
    batch = {"label": jnp.asarray(BITS if task == "multilabel" else X["target"])}
    found = terms(Method(**kwargs, distillation_weight=3.0, label_weight=0.5), batch)
    want = terms(kd.make(**kwargs), batch)
    assert found.coef == {"signal": 1.0, name: 0.5, "distillation": 3.0}
    for term in (name, "distillation"):
        np.testing.assert_array_equal(found.values[term], want.values[term])


def test_which_methods_serve_every_task():
    features = "ab attention_transfer correlation_congruence crd factor_transfer fitnet fsp ickd"
    features += " nst pkt review_kd rkd similarity simkd srrl vid"
    for name in f"kd supervised finetune multi_teacher {features}".split():
        made = resolve("objectives", name, where="objective")
        assert made.tasks == TASKS, name
    for name in ("dkd", "dist", "divergence", "logit_standardization", "hard", "tf_kd"):
        assert resolve("objectives", name, where="objective").tasks == ("classification",), name
    with pytest.raises(ConfigError, match="negatives of other classes need classes"):
        dj.objectives.CRD(task="regression", class_aware=True)


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_unknown_labels_have_no_label_loss_and_are_distilled(task):
    label = BITS if task == "multilabel" else X["target"]
    known = KNOWN.copy()
    known[0] = 0
    objective = kd.make(task=task)

    def values(label, name):
        found = terms(objective, {"label": jnp.asarray(label), "labelled": jnp.asarray(known)})
        return found.values[name]

    name = "cross_entropy" if task == "multilabel" else "squared_error"
    np.testing.assert_array_equal(values(label, name), values(label * known, name))
    assert values(label, name)[0] == 0
    assert values(label, name)[1] > 0
    assert values(label, "distillation")[0] > 0


def test_unknown_classes_have_no_label_loss_whatever_its_form():
    labelled = jnp.arange(reference.B) % 2 * 2.0
    for kwargs in ({}, {"focal_gamma": 2.0}, {"class_weights": tuple(WEIGHTS)}):
        batch = {"label": jnp.asarray(LABEL), "labelled": labelled}
        found = terms(supervised.make(**kwargs), batch).values["cross_entropy"]
        whole = terms(supervised.make(**kwargs), {"label": batch["label"]}).values["cross_entropy"]
        np.testing.assert_allclose(found, whole * labelled, rtol=1e-6)
        assert found[0] == 0


def test_balanced_weights():
    """Of classes as `sklearn.utils.class_weight`, of several labels absent over present."""
    counts = np.bincount(LABEL, minlength=reference.K)
    objective = supervised.make(class_weights="balanced", label_counts=(*counts, len(LABEL)))
    want = len(LABEL) / (reference.K * counts)
    got = terms(objective, {"label": jnp.asarray(LABEL)}).values["cross_entropy"]
    plain = terms(supervised.make(), {"label": jnp.asarray(LABEL)}).values["cross_entropy"]
    np.testing.assert_allclose(got, want[LABEL] * plain, rtol=1e-6)
    theirs = pytest.importorskip("sklearn.utils.class_weight").compute_class_weight
    classes = np.arange(reference.K)
    np.testing.assert_allclose(want, theirs("balanced", classes=classes, y=LABEL))
    present = BITS.sum(0)
    objective = supervised.make(
        task="multilabel", class_weights="balanced", label_counts=(*present, len(BITS))
    )
    weights = (len(BITS) - present) / present
    want = multilabel.binary_cross_entropy(
        jnp.asarray(X["student"]), BITS, positive_weights=jnp.asarray(weights)
    )
    got = terms(objective, {"label": jnp.asarray(BITS)}).values["cross_entropy"]
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"task": "ranking"}, "unknown task 'ranking'"),
        ({"regression_loss": "absolute"}, "unknown regression_loss"),
        ({"class_weights": "even"}, "one number for each class"),
        ({"class_weights": (1.0, -1.0)}, "class_weights"),
        ({"class_weights": "balanced"}, "need the label counts"),
        ({"focal_gamma": -1.0}, "focal_gamma"),
        ({"huber_delta": 0.0}, "huber_delta"),
        ({"label_scale": (0.0,)}, "label_scale"),
        ({"focal_gamma": 1.0, "label_smoothing": 0.1}, "label_smoothing or focal_gamma to 0"),
        ({"task": "regression", "label_smoothing": 0.1}, "a regression has no label_smoothing"),
        ({"task": "regression", "focal_gamma": 1.0}, "a regression has no focal_gamma"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        supervised.make(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "batch", "message"),
    [
        ({"task": "multilabel"}, {"label": BITS[:, :2]}, "4 outputs and labels are"),
        ({"class_weights": (1.0, 2.0)}, {"label": LABEL}, "2 class weights for 4 outputs"),
        ({"task": "regression", "label_scale": (1.0,)}, {"label": BITS}, "1 scales for 4 targets"),
        ({"focal_gamma": 1.0}, {"label": LABEL, "label_probs": ONE_HOT}, "labels are mixed"),
    ],
)
def test_batches_that_do_not_fit_are_refused(kwargs, batch, message):
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    with pytest.raises(ConfigError, match=message):
        terms(supervised.make(**kwargs), batch)


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_a_trainer_learns_each_task(task):
    r = np.random.RandomState(0)
    x = r.randn(64, 3).astype(np.float32)
    z = x @ r.randn(3, 2).astype(np.float32)
    model = dj.models.mlp.make(num_classes=2, hidden=(8,))
    trainer = dj.Trainer(
        dj.objectives.KD(task=task, alpha=0.0),
        student=model,
        frozen={"teacher": model},
        optimizer=optax.adam(3e-2),
    )
    batch = {"input": x, "label": (z > 0).astype(np.float32) if task == "multilabel" else z}
    state = trainer.init(jax.random.key(0), batch)
    losses = []
    for _ in range(100):
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.25 * losses[0]
