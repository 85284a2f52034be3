"""SLA and SLA+SD against NumPy transcriptions of Lee et al. 2020, eqs. 2, 4, 6, view by view."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.core.means import mean_loss
from distill_jax.data import loader
from distill_jax.losses import view_bank
from distill_jax.run import build
from distill_jax.run import config as config_lib
from tests import harness
from tests.reference import softmax

K, B, M = harness.K, 3, 4
LABEL = np.array([4, 0, 2])


def test_views_are_rotations_and_colour_orders_sample_major():
    x = np.random.RandomState(0).randn(2, 4, 4, 3)
    got = view_bank.augmented_views(jnp.asarray(x), rotations=4, permutations=6)
    orders = list(itertools.permutations(range(3)))
    rows = [np.rot90(x[i], t)[..., list(o)] for i in range(2) for t in range(4) for o in orders]
    np.testing.assert_array_equal(got, np.stack(rows).astype(np.float32))
    two = view_bank.augmented_views(jnp.asarray(x), rotations=2, permutations=3)
    np.testing.assert_array_equal(two[3], np.rot90(x[0], 2).astype(np.float32))
    np.testing.assert_array_equal(two[1], x[0][..., [1, 2, 0]].astype(np.float32))


def own(joint, i, c):
    """The aggregated logit of class c for image i, by the definition."""
    return sum(joint[i * M + j, c * M + j] for j in range(M)) / M


def transcription(mode, plain, joint, t, beta):
    """Loss and gradients in the student's logits and in the head's, by loops."""
    loss, d_plain, d_joint = 0.0, np.zeros_like(plain), np.zeros_like(joint)

    def add_cross_entropy(grad, logits, row, y, share):
        p = softmax(logits[row])
        grad[row] += share * (p - np.eye(len(p))[y])
        return -share * np.log(p[y])

    for i in range(B):
        for j in range(M):
            row, share = i * M + j, 1 / (B * M)
            if mode in ("sla", "sla_sd"):
                loss += add_cross_entropy(d_joint, joint, row, LABEL[i] * M + j, share)
            else:
                loss += add_cross_entropy(d_plain, plain, row, LABEL[i], share)
            if mode == "mt":
                loss += add_cross_entropy(d_joint, joint, row, j, share)
        if mode == "sla_sd":
            loss += add_cross_entropy(d_plain, plain, i * M, LABEL[i], beta / B)
            target = softmax(np.array([own(joint, i, c) for c in range(K)]) / t)
            q = softmax(plain[i * M] / t)
            loss += t**2 * (target * np.log(target / q)).sum() / B
            d_plain[i * M] += t * (q - target) / B
    return loss, d_plain, d_joint


@pytest.mark.parametrize("mode", ["sla", "sla_sd", "da", "mt"])
def test_losses_and_gradients(mode):
    rng = np.random.RandomState(1)
    plain, joint = rng.randn(B * M, K), 2 * rng.randn(B * M, M if mode == "mt" else K * M)
    made = harness.make_objective("sla", mode=mode, temperature=2.0, label_weight=0.3)
    with jax.enable_x64(True):
        mask = jnp.asarray(np.ones(B, np.float32))
        batch = {"input": np.zeros((B, 6, 6, 1)), "label": jnp.asarray(LABEL), "mask": mask}

        def loss(plain, joint):
            def nets(role, x, *, train=False, stop_gradient_params=False):
                if role == "joint":
                    return {"output": joint}, {}
                assert x.shape[0] == B * M
                return {"logits": plain, "embedding": jnp.zeros((B * M, 2))}, {}

            return mean_loss(made.loss(nets, batch, {}, jnp.int32(0)), mask)[0]

        value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(plain, joint)
    want, *want_grads = transcription(mode, plain, joint, 2.0, 0.3)
    np.testing.assert_allclose(value, want, rtol=1e-7)
    for a, b in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-12)


def test_mixed_labels_are_the_mixture_of_the_losses():
    rng = np.random.RandomState(2)
    joint, probs = rng.randn(B * M, K * M), rng.dirichlet(np.ones(K), B)
    loss = jax.jit(
        lambda labels: view_bank.joint_cross_entropy(jnp.asarray(joint), labels, views=M)
    )
    got, pure = loss(probs), [loss(np.eye(K)[np.full(B, c)]) for c in range(K)]
    np.testing.assert_allclose(got, (probs * np.stack(pure, 1)).sum(1), rtol=1e-5)


CLASSES = 4


def config(mode, role):
    found = config_lib.base()
    found.data.name = "synthetic"
    found.data.kwargs = {"n_train": 64, "n_test": 16, "image_size": 6, "channels": 1}
    found.data.train_transforms = found.data.eval_transforms = ("scale",)
    found.batch_size, found.total = 16, 2
    found.objective.name = "sla"
    found.objective.kwargs = {"mode": mode}
    classes = {"num_classes": 0} if mode == "sla" else {}
    found.roles.student = config_lib.role("mlp", hidden=(8,), **classes)
    if mode != "da":
        features = M * (1 if mode == "mt" else CLASSES)
        found.roles.joint = config_lib.role("projector", features=features)
    found.evaluators = {"classification": {"role": role}}
    found.eval.batch_size = 16
    return found


@pytest.mark.parametrize("mode", ["sla", "da"])
def test_evaluators_read_the_predictions(mode):
    experiment = build.build(config(mode, "aggregated"))
    state = experiment.init(jax.random.key(0))
    batch = next(loader.eval_batches(experiment.dataset.test, batch_size=16))
    got = experiment.predict(state, {}, batch)["aggregated"]["logits"]
    transform = build.make_transform(experiment.config, experiment.dataset, train=False)
    seen = np.asarray(jax.jit(transform)(jax.random.key(0), batch, jnp.int32(0))["input"])

    @jax.jit
    def answer(x):
        apply = {role: m.apply for role, m in experiment.models.items()}
        student, _ = apply["student"](state.params["student"], {}, x, train=False, rngs={})
        if mode == "da":
            return student["logits"]
        x = student["embedding"]
        return apply["joint"](state.params["joint"], {}, x, train=False, rngs={})[0]["output"]

    want = np.zeros((16, CLASSES))
    for j in range(M):
        found = np.asarray(answer(np.rot90(seen, j, (1, 2))))
        want += (found if mode == "da" else found[:, j::M]) / M
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_mistakes_are_refused():
    with pytest.raises(ConfigError, match="reads 'agregated', which the run does not have"):
        build.build(config("sla_sd", "agregated"))
    wrong = config("sla_sd", "aggregated")
    wrong.roles.joint.kwargs.features = 10
    with pytest.raises(ConfigError, match="the joint head has 10 outputs"):
        build.build(wrong)
    with pytest.raises(ConfigError, match="no colours to permute"):
        harness.setup("sla", kwargs={"permutations": 3})
    with pytest.raises(ConfigError, match="rotations is 3"):
        harness.make_objective("sla", rotations=3)
    with pytest.raises(ConfigError, match="unknown mode 'sl'"):
        harness.make_objective("sla", mode="sl")
