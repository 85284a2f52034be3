"""Distillation of logits against loop-style NumPy transcriptions and PyTorch."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core import state
from distill_jax.core.errors import ConfigError
from distill_jax.losses import logits as losses
from distill_jax.losses.classification import distillation_kl
from distill_jax.objectives import dist, divergence, dkd, logit_standardization, tf_kd
from tests import harness
from tests.reference import difference, kl, softmax

R = np.random.RandomState(0)
B, K = 7, 4
STUDENT, TEACHER = 2 * R.randn(B, K), 3 * R.randn(B, K)
LABEL = R.randint(0, K, B).astype(np.int32)
MASK = np.array([1.0, 1, 0, 1, 1, 0, 1])
T = 2.5


def pearson(x, y):
    mx, my = sum(x) / len(x), sum(y) / len(y)
    top = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return top / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))


def per_row(one):
    """The mean over the batch of a function of one row of each network."""
    return lambda s, t: sum(one(s[i], t[i], i) for i in range(B)) / B


def reverse(s, t, _, floor=-math.inf):
    p, q = softmax(s, T), softmax(t, T)
    return T**2 * sum(
        a * (math.log(a) - max(math.log(b), floor)) for a, b in zip(p, q, strict=True)
    )


def js(s, t, _):
    p, q = softmax(s, T), softmax(t, T)
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return T**2 * (kl(p, m) + kl(q, m)) / 2


def cross_entropy(s, t, _):
    return -(T**2) * sum(b * math.log(a) for a, b in zip(softmax(s, T), softmax(t, T), strict=True))


def tckd(s, t, i):
    p, q = softmax(s, T)[LABEL[i]], softmax(t, T)[LABEL[i]]
    return T**2 * kl([q, 1 - q], [p, 1 - p])


def nckd(s, t, i):
    s, t = np.delete(s, LABEL[i]), np.delete(t, LABEL[i])
    return T**2 * kl(softmax(t, T), softmax(s, T))


def z_score(row):
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row))
    return [(x - mean) / deviation for x in row]


def standardized(s, t, _):
    return T**2 * kl(softmax(z_score(t), T), softmax(z_score(s), T))


def inter(s, t, _):
    return T**2 * (1 - pearson(softmax(s, T), softmax(t, T)))


def intra(s, t, *, mask=MASK):
    kept = [i for i in range(B) if mask[i]]
    p, q = [softmax(s[i], T) for i in kept], [softmax(t[i], T) for i in kept]
    columns = [pearson([r[c] for r in p], [r[c] for r in q]) for c in range(K)]
    return T**2 * (1 - sum(columns) / K)


def masked_mean(values, mask=MASK):
    mask = jnp.asarray(mask, values.dtype)
    return (mask * values).sum() / mask.sum()


def decoupled(part):
    return lambda s, t: losses.decoupled_kl(s, t, jnp.asarray(LABEL), temperature=T)[part].mean()


CASES = {
    "reverse": (lambda s, t: losses.reverse_kl(s, t, temperature=T).mean(), per_row(reverse)),
    "floor": (
        lambda s, t: losses.reverse_kl(s, t, temperature=T, floor=-2.0).mean(),
        per_row(functools.partial(reverse, floor=-2.0)),
    ),
    "js": (lambda s, t: losses.jensen_shannon(s, t, temperature=T).mean(), per_row(js)),
    "cross_entropy": (
        lambda s, t: losses.teacher_cross_entropy(s, t, temperature=T).mean(),
        per_row(cross_entropy),
    ),
    "tckd": (decoupled(0), per_row(tckd)),
    "nckd": (decoupled(1), per_row(nckd)),
    "standardized": (
        lambda s, t: distillation_kl(
            losses.standardize(s), losses.standardize(t), temperature=T
        ).mean(),
        per_row(standardized),
    ),
    "inter": (lambda s, t: losses.inter_class(s, t, temperature=T).mean(), per_row(inter)),
    "intra": (
        lambda s, t: masked_mean(
            losses.intra_class(s, t, jnp.asarray(MASK, s.dtype), temperature=T)
        ),
        intra,
    ),
}


NAMES = [pytest.param(name, marks=pytest.mark.xdist_group(f"logits_{name}")) for name in CASES]
gradients = {name: jax.jit(jax.value_and_grad(ours)) for name, (ours, _) in CASES.items()}


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name):
    plain = CASES[name][1]
    with jax.enable_x64(True):
        value, grad = gradients[name](STUDENT, TEACHER)
    np.testing.assert_allclose(value, plain(STUDENT, TEACHER), rtol=1e-9)
    want = difference(lambda s: plain(s, TEACHER), STUDENT)
    np.testing.assert_allclose(grad, want, atol=1e-7)
    single, _ = gradients[name](STUDENT.astype(np.float32), TEACHER.astype(np.float32))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, value, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_in_pytorch(name):
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    s = torch.tensor(STUDENT, requires_grad=True)
    t, label = torch.tensor(TEACHER), torch.tensor(LABEL).long()
    p, q = F.softmax(s / T, 1), F.softmax(t / T, 1)

    def relation(p, q):
        p, q = p - p.mean(1, keepdim=True), q - q.mean(1, keepdim=True)
        return T**2 * (1 - F.cosine_similarity(p, q, dim=1).mean())

    def batch_kl(log_q, p):
        return T**2 * F.kl_div(log_q, p, reduction="batchmean")

    def z(x):
        return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, correction=0)

    def pair(p):
        target = p.gather(1, label[:, None])
        return torch.cat([target, 1 - target], 1)

    others = ~F.one_hot(label, K).bool()
    s_others, t_others = (x[others].reshape(B, K - 1) / T for x in (s, t))
    kept, mean = torch.tensor(MASK).bool(), (p + q) / 2
    want = {
        "reverse": lambda: batch_kl(q.log(), p),
        "floor": lambda: batch_kl(q.log().clamp(min=-2.0), p),
        "js": lambda: (batch_kl(mean.log(), p) + batch_kl(mean.log(), q)) / 2,
        "cross_entropy": lambda: T**2 * F.cross_entropy(s / T, q),
        "tckd": lambda: batch_kl(pair(p).log(), pair(q)),
        "nckd": lambda: batch_kl(F.log_softmax(s_others, 1), F.softmax(t_others, 1)),
        "standardized": lambda: batch_kl(F.log_softmax(z(s) / T, 1), F.softmax(z(t) / T, 1)),
        "inter": lambda: relation(p, q),
        "intra": lambda: relation(p[kept].T, q[kept].T),
    }[name]()
    want.backward()
    with jax.enable_x64(True):
        value, grad = gradients[name](STUDENT, TEACHER)
    np.testing.assert_allclose(value, want.item(), rtol=1e-7)
    np.testing.assert_allclose(grad, s.grad.numpy(), atol=1e-8)


FAR = np.zeros((B, K))
FAR[::3, :2], FAR[1::3, 1:3] = (1e4, -1e4), (-80.0, 80.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("student", [FAR, 0 * FAR], ids=["far", "constant"])
def test_extreme_and_constant_logits_stay_finite(name, student):
    value, grad = gradients[name](student.astype(np.float32), -FAR.astype(np.float32))
    assert np.isfinite(value)
    assert np.abs(grad).max() < 1e5  # false for nan, too


def terms_of(objective, *, step=0, student=STUDENT, teacher=TEACHER, **batch):
    """The terms of an objective on given logits."""
    made = {"student": student, "teacher": teacher}

    def nets(role, *inputs, train=False, stop_gradient_params=False):
        del inputs, train, stop_gradient_params
        # A copy: JAX 0.10 keeps the precision in which a program met a constant first.
        return {"logits": jnp.asarray(made[role], copy=True)}, {}

    b = student.shape[0]
    batch = {"input": jnp.zeros((b, 1)), "label": LABEL, "mask": np.ones(b), **batch}
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    return objective.loss(nets, batch, {}, jnp.int32(step))


def loss_of(terms, mask=None):
    mask = np.ones(B) if mask is None else mask
    return sum(terms.coef.get(k, 1.0) * masked_mean(v, mask) for k, v in terms.values.items())


def label_term(s):
    return sum(-math.log(softmax(s[i], 1)[LABEL[i]]) for i in range(B)) / B


def test_dkd_adds_its_parts_after_the_warmup():
    objective = dkd.make(
        weight=0.5, alpha=2.0, beta=3.0, temperature=T, warmup="2 epochs", steps_per_epoch=5.0
    )
    loss = jax.jit(lambda step: loss_of(terms_of(objective, step=step)))
    for step, ramp in ((0, 0.1), (4, 0.5), (9, 1.0), (30, 1.0)):
        want = label_term(STUDENT) + 0.5 * ramp * (
            2 * CASES["tckd"][1](STUDENT, TEACHER) + 3 * CASES["nckd"][1](STUDENT, TEACHER)
        )
        np.testing.assert_allclose(loss(step), want, rtol=1e-5)
    at_once = dkd.make(warmup=0)
    assert float(jax.jit(lambda: terms_of(at_once).coef["nckd"])()) == at_once.beta


def test_dkd_parts_make_up_the_divergence():
    first, second = jax.device_get(
        jax.jit(functools.partial(losses.decoupled_kl, temperature=T))(STUDENT, TEACHER, LABEL)
    )
    rest = [1 - softmax(TEACHER[i], T)[LABEL[i]] for i in range(B)]
    want = [T**2 * kl(softmax(TEACHER[i], T), softmax(STUDENT[i], T)) for i in range(B)]
    np.testing.assert_allclose(first + np.array(rest) * second, want, rtol=1e-5, atol=1e-6)


def test_dkd_target_of_mixed_labels_and_standardized_logits():
    def make(**kwargs):
        return dkd.make(temperature=T, steps_per_epoch=5.0, **kwargs)

    plain = terms_of(make()).values
    mixed = 0.6 * np.eye(K)[LABEL] + 0.4 * np.eye(K)[(LABEL + 1) % K]
    other = terms_of(make(), label_probs=mixed, label=(LABEL + 1) % K).values
    scaled = terms_of(make(standardize=True), student=3 * STUDENT + 1).values
    z = [np.array([z_score(row) for row in x]) for x in (STUDENT, TEACHER)]
    for name in ("tckd", "nckd"):
        np.testing.assert_array_equal(other[name], plain[name])
        np.testing.assert_allclose(scaled[name].mean(), CASES[name][1](*z), rtol=1e-4)


def test_dist_over_the_mask():
    objective = dist.make(weight=0.5, beta=2.0, gamma=3.0, temperature=T, label_weight=0.0)
    kept = MASK > 0
    rows = sum(inter(STUDENT[i], TEACHER[i], i) for i in range(B) if kept[i]) / MASK.sum()
    want = 0.5 * (2 * rows + 3 * intra(STUDENT, TEACHER))
    np.testing.assert_allclose(loss_of(terms_of(objective, mask=MASK), MASK), want, rtol=1e-5)
    assert objective.couples_batch


def test_logit_standardization_with_its_published_weights():
    objective = logit_standardization.make(temperature=T)
    want = 0.1 * label_term(STUDENT) + 9 * CASES["standardized"][1](STUDENT, TEACHER)
    np.testing.assert_allclose(loss_of(terms_of(objective)), want, rtol=1e-5)


def forward(s, t, _):
    return T**2 * kl(softmax(t, T), softmax(s, T))


def test_divergence_needs_no_labels():
    parts = {name: CASES[name][1] for name in ("reverse", "js", "cross_entropy")}
    parts["forward"] = per_row(forward)
    parts["jeffreys"] = lambda s, t: (parts["forward"](s, t) + parts["reverse"](s, t)) / 2
    assert set(parts) == set(divergence.make().kinds)
    for kind, want in parts.items():
        terms = terms_of(divergence.make(kind=kind, temperature=T))
        assert set(terms.values) == {"divergence"}
        np.testing.assert_allclose(loss_of(terms), want(STUDENT, TEACHER), rtol=1e-5)
    floored = divergence.make(kind="jeffreys", temperature=T, floor=-2.0)
    want = (parts["forward"](STUDENT, TEACHER) + CASES["floor"][1](STUDENT, TEACHER)) / 2
    np.testing.assert_allclose(loss_of(terms_of(floored)), want, rtol=1e-5)


def test_gradient_of_ssld():
    """With r = log(s / t): d / d z_c = (s_c - t_c) / 2 + s_c (r_c - sum_k s_k r_k) / 2."""
    with jax.enable_x64(True):
        grad = jax.grad(lambda s: terms_of(divergence.make(), student=s).values["divergence"].sum())
        got = np.asarray(jax.jit(grad)(STUDENT))
    for i in range(B):
        s, t = softmax(STUDENT[i], 1), softmax(TEACHER[i], 1)
        r = [math.log(a / b) for a, b in zip(s, t, strict=True)]
        mean = sum(a * b for a, b in zip(s, r, strict=True))
        want = [(s[c] - t[c]) / 2 + s[c] * (r[c] - mean) / 2 for c in range(K)]
        np.testing.assert_allclose(got[i], want, atol=1e-12)


def virtual(s, *, a, soft, label):
    total = 0.0
    for i in range(B):
        target = [a * y + (1 - a) / (K - 1) * (1 - y) for y in label[i]]
        powers = [x ** (1 / T) for x in target]
        target = [x / sum(powers) for x in powers]
        total += kl(target, softmax(s[i], T if soft else 1)) / B
    return total


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
def test_tf_kd(soft, mixed):
    objective = tf_kd.make(alpha=0.3, a=0.9, temperature=T, weight=2.0, soften_student=soft)
    label = np.eye(K)[LABEL]
    batch = {}
    if mixed:
        batch["label_probs"] = label = 0.6 * label + 0.4 * np.roll(label, 1, axis=1)

    def plain(s):
        hard = 0.0
        for i in range(B):
            p = softmax(s[i], 1)
            hard -= sum(y * math.log(x) for y, x in zip(label[i], p, strict=True)) / B
        return 0.7 * hard + 0.3 * 2 * virtual(s, a=0.9, soft=soft, label=label)

    with jax.enable_x64(True):
        ours = jax.value_and_grad(lambda s: loss_of(terms_of(objective, student=s, **batch)))
        value, grad = jax.jit(ours)(STUDENT)
    np.testing.assert_allclose(value, plain(STUDENT), rtol=1e-9)
    np.testing.assert_allclose(grad, difference(plain, STUDENT), atol=1e-7)


@pytest.mark.parametrize(
    "make, kwargs, match",
    [
        (dkd.make, {"beta": -1.0, "steps_per_epoch": 5.0}, "beta"),
        (dkd.make, {"steps_per_epoch": 0.0}, "steps_per_epoch"),
        (dist.make, {"gamma": -1.0}, "gamma"),
        (dist.make, {"temperature": 0.0}, "temperature"),
        (logit_standardization.make, {"weight": -1.0}, "weight"),
        (divergence.make, {"kind": "jeffrey"}, "jeffreys"),
        (divergence.make, {"kind": "js", "floor": -10.0}, "floor"),
        (divergence.make, {"floor": 1.0}, "floor"),
        (tf_kd.make, {"alpha": 2.0}, "alpha"),
        (tf_kd.make, {"a": 1.0}, "a is"),
        (tf_kd.make, {"weight": -1.0}, "weight"),
    ],
)
def test_hyperparameters_are_checked(make, kwargs, match):
    with pytest.raises(ConfigError, match=match):
        make(**kwargs)


@pytest.mark.parametrize("name", ["dkd", "dist", "logit_standardization", "divergence"])
def test_class_mismatch_is_refused_on_shapes(name):
    model = harness.tiny_model()

    def narrow(*args, **kwargs):
        out, st = model.apply(*args, **kwargs)
        return {"logits": out["logits"][:, :3]}, st

    models = {"student": model, "teacher": model._replace(apply=narrow)}
    with pytest.raises(ConfigError, match="teacher has 3 classes and the student 5"):
        state.infer_shapes(harness.make_objective(name), models, harness.make_batch())


def test_virtual_teacher_must_prefer_the_label():
    with pytest.raises(ConfigError, match="above 1 / k"):
        terms_of(tf_kd.make(a=0.2))
